//! What the network namespaces of a VE hold, its own and those of programs in it, read on the source and made again on the target.
//!
//! [`capture`] reads everything by netlink and from `/proc/sys/net`, and names what could not be
//! made again. [`rebuild`] compares the target's namespace with what was captured and changes
//! only what differs. So it runs in pre-copy, where it makes nearly everything, and once more in
//! the blackout, where it finds hardly anything to do.
//!
//! One file per object: how it is read and how it is made stand together.

use std::collections::BTreeMap;

use ckpt_engine::sys::netns::Netns;
use ckpt_format::{
    blocker::Blocker,
    network::{Mac, Network, Setting},
};

use self::made::{Atlas, Maker};
use super::{NetworkError, netlink::Netlink};

mod addresses;
mod attributes;
mod filter;
mod flows;
mod kinds;
mod links;
mod made;
mod neighbours;
mod routes;
mod rules;
mod sets;
mod settings;
mod setup;
mod stations;
mod tables;
mod tun;

/// The initial congestion window of routes while connections are rebuilt, in segments.
///
/// A restored connection may have more data on its way than a new one is allowed to send. It
/// would then wait for a timer, 35 to 50 ms, before it sends at all.
pub const RESTORE_WINDOW: u32 = 200;

/// Whether the routes are as captured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Routes {
    /// Exactly.
    Exact,
    /// With [`RESTORE_WINDOW`], until the connections are rebuilt.
    ForRestore,
}

/// An interface that the VE is supposed to have.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Expected {
    /// Its name inside the VE.
    pub name: String,
    /// Its hardware address.
    pub mac: Mac,
}

/// What was found in the network namespaces of a VE.
#[derive(Clone, Debug, Default)]
pub struct Captured {
    /// What can be made again, for each namespace.
    pub networks: Vec<Network>,
    /// What cannot.
    pub blockers: Vec<Blocker>,
}

/// Reads the network namespaces of a VE, its own first. `expected` are the interfaces that the VE
/// was given, `id_base` is the host's number of its user and group 0.
///
/// The settings take a few milliseconds; in the blackout give those of the last capture in
/// `known_settings`.
pub fn capture(
    namespaces: &[Netns],
    expected: &[Expected],
    id_base: u32,
    known_settings: Option<&[Vec<Setting>]>,
) -> Result<Captured, NetworkError> {
    let mut captured = Captured::default();
    let mut netlinks = open(namespaces)?;
    let lists = netlinks.iter_mut().map(made::list).collect::<Result<Vec<_>, _>>()?;
    let mut atlas = Atlas::of(&mut netlinks, namespaces, &lists, id_base)?;
    let fresh = if known_settings.is_none() { settings::fresh()? } else { BTreeMap::new() };
    for (number, (netns, netlink)) in namespaces.iter().zip(&mut netlinks).enumerate() {
        let blockers = &mut captured.blockers;
        let expected = if number == 0 { expected } else { &[] };
        let (links, names) =
            links::capture(netlink, (number, &lists[number], &atlas), expected, blockers)?;
        let tables = tables::capture(netns)?;
        let (filter, flows) = filter::capture(netns, !tables.is_empty())?;
        let known = known_settings.map(|known| known.get(number).cloned().unwrap_or_default());
        captured.networks.push(Network {
            filter,
            flows,
            stations: stations::capture(netlink, &links, &names)?,
            links,
            addresses: addresses::capture(netlink, &names)?,
            routes: routes::capture(netlink, &names, blockers)?,
            rules: rules::capture(netlink, blockers)?,
            neighbours: neighbours::capture(netlink, &names)?,
            settings: known.map_or_else(|| settings::capture(netns, &fresh), Ok)?,
            known: std::mem::take(&mut atlas.known[number]),
            ip_sets: filter::capture_sets(netns)?,
            tables,
        });
    }
    Ok(captured)
}

fn open(namespaces: &[Netns]) -> Result<Vec<Netlink>, NetworkError> {
    Ok(namespaces.iter().map(Netlink::open_in).collect::<Result<_, _>>()?)
}

/// Makes namespaces hold what was captured, but for the packet filter. The links that the VE was
/// given must be there. May be repeated.
pub fn rebuild(
    namespaces: &[Netns],
    networks: &[Network],
    id_base: u32,
    routes: Routes,
) -> Result<(), NetworkError> {
    let mut netlinks = open(namespaces)?;
    Maker::new(&mut netlinks, namespaces, networks, id_base).work()?;
    let mut prepared = Vec::new();
    // What is sent to the other end of a pair is lost until that is up.
    for ((netns, network), netlink) in namespaces.iter().zip(networks).zip(&mut netlinks) {
        let names = links::names(netlink)?;
        let held_back = links::prepare(netlink, network, &names)?;
        // Before the addresses: some settings decide what the kernel makes of those.
        settings::rebuild(netns, &network.settings)?;
        links::finish(netlink, network, &names)?;
        prepared.push((names, held_back));
    }
    for ((network, netlink), (names, held_back)) in
        networks.iter().zip(&mut netlinks).zip(&prepared)
    {
        addresses::rebuild(netlink, network, names)?;
        links::settle(netlink, held_back)?;
        routes::rebuild(netlink, network, names, routes)?;
        rules::rebuild(netlink, network)?;
        neighbours::rebuild(netlink, network, names)?;
        stations::rebuild(netlink, network, names)?;
    }
    Ok(())
}

/// Makes the packet filters as captured. To be called when the connections are rebuilt: that is
/// done by packets that the rules would not know.
pub fn set_filter(namespaces: &[Netns], networks: &[Network]) -> Result<(), NetworkError> {
    namespaces.iter().zip(networks).try_for_each(|(netns, network)| filter::rebuild(netns, network))
}

/// Whether [`set_filter`] will succeed.
pub fn check_filter(namespaces: &[Netns], networks: &[Network]) -> Result<(), NetworkError> {
    namespaces.iter().zip(networks).try_for_each(|(netns, network)| filter::check(netns, network))
}

/// Makes the routes as captured, or with [`RESTORE_WINDOW`]: what [`rebuild`] does for routes.
pub fn set_routes(
    namespaces: &[Netns],
    networks: &[Network],
    routes: Routes,
) -> Result<(), NetworkError> {
    for (netns, network) in namespaces.iter().zip(networks) {
        let mut netlink = Netlink::open_in(netns)?;
        let names = links::names(&mut netlink)?;
        routes::rebuild(&mut netlink, network, &names, routes)?;
    }
    Ok(())
}

/// Something in the namespace that cannot be made again. It belongs to no process.
fn blocker(object: impl Into<String>, hint: &str) -> Blocker {
    Blocker {
        pid: 1,
        command: "network".into(),
        fd: None,
        object: object.into(),
        hint: hint.into(),
    }
}

/// The name of a link that is referred to but not there. The kernel makes such references only
/// while links come and go.
fn no_link(name: &str) -> NetworkError {
    NetworkError::NoLink { name: name.into() }
}
