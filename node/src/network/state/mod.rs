//! What a VE's network namespace holds, read on the source and made again on the target.
//!
//! [`capture`] reads everything by netlink and from `/proc/sys/net`, and names what could not be
//! made again. [`rebuild`] compares the target's namespace with what was captured and changes
//! only what differs. So it runs in pre-copy, where it makes nearly everything, and once more in
//! the blackout, where it finds hardly anything to do.
//!
//! One file per object: how it is read and how it is made stand together.

use ckpt_engine::sys::netns::Netns;
use ckpt_format::{
    blocker::Blocker,
    network::{Mac, Network, Setting},
};

use super::{NetworkError, netlink::Netlink, system};

mod addresses;
mod filter;
mod links;
mod neighbours;
mod routes;
mod rules;
mod settings;

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

/// What was found in a VE's network namespace.
#[derive(Clone, Debug, Default)]
pub struct Captured {
    /// What can be made again.
    pub network: Network,
    /// What cannot.
    pub blockers: Vec<Blocker>,
}

/// Reads a VE's network namespace. `expected` are the interfaces that the VE was given.
///
/// The settings take a few milliseconds; in the blackout give those of the last capture in
/// `known_settings`.
pub fn capture(
    netns: &Netns,
    expected: &[Expected],
    known_settings: Option<&[Setting]>,
) -> Result<Captured, NetworkError> {
    let mut blockers = Vec::new();
    let mut netlink = Netlink::open_in(netns)?;
    let (links, names) = links::capture(&mut netlink, expected, &mut blockers)?;
    let (filter, flows) = filter::capture(netns)?;
    let network = Network {
        filter,
        flows,
        links,
        addresses: addresses::capture(&mut netlink, &names)?,
        routes: routes::capture(&mut netlink, &names, &mut blockers)?,
        rules: rules::capture(&mut netlink, &mut blockers)?,
        neighbours: neighbours::capture(&mut netlink, &names)?,
        settings: match known_settings {
            Some(known) => known.to_vec(),
            None => settings::capture(netns)?,
        },
    };
    let enter = "enter a network namespace";
    if filter::has_ip_sets(netns)? {
        let hint = "remove the sets (ipset destroy) or stop the VE before the move";
        blockers.push(blocker("sets of ipset", hint));
    }
    for (table, object) in
        [("ip_tables_names", "iptables rules"), ("ip6_tables_names", "ip6tables rules")]
    {
        let path = format!("/proc/thread-self/net/{table}");
        let text = netns.run(|| std::fs::read_to_string(path)).map_err(system(enter))?;
        // No such file: this kernel has no such tables.
        if text.is_ok_and(|text| !text.trim().is_empty()) {
            let hint = "unload the legacy tables or stop the VE before the move";
            blockers.push(blocker(object, hint));
        }
    }
    Ok(Captured { network, blockers })
}

/// Makes a namespace hold what was captured, but for the packet filter. Its links must be there.
/// May be repeated.
pub fn rebuild(netns: &Netns, network: &Network, routes: Routes) -> Result<(), NetworkError> {
    let mut netlink = Netlink::open_in(netns)?;
    let names = links::names(&mut netlink)?;
    let held_back = links::prepare(&mut netlink, network, &names)?;
    // Before the addresses: some settings decide what the kernel makes of those.
    settings::rebuild(netns, &network.settings)?;
    links::finish(&mut netlink, network, &names)?;
    addresses::rebuild(&mut netlink, network, &names)?;
    links::settle(&mut netlink, &held_back)?;
    routes::rebuild(&mut netlink, network, &names, routes)?;
    rules::rebuild(&mut netlink, network)?;
    neighbours::rebuild(&mut netlink, network, &names)
}

/// Makes the packet filter as captured. To be called when the connections are rebuilt: that is
/// done by packets that the rules would not know.
pub fn set_filter(netns: &Netns, network: &Network) -> Result<(), NetworkError> {
    filter::rebuild(netns, network)
}

/// Whether [`set_filter`] will succeed.
pub fn check_filter(netns: &Netns, network: &Network) -> Result<(), NetworkError> {
    filter::check(netns, network)
}

/// Makes the routes as captured, or with [`RESTORE_WINDOW`]: what [`rebuild`] does for routes.
pub fn set_routes(netns: &Netns, network: &Network, routes: Routes) -> Result<(), NetworkError> {
    let mut netlink = Netlink::open_in(netns)?;
    let names = links::names(&mut netlink)?;
    routes::rebuild(&mut netlink, network, &names, routes)
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
