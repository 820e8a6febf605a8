//! Links: loopback, the interfaces that the VE was given, and what all others have as these do.

use std::collections::HashMap;

use ckpt_format::{
    blocker::Blocker,
    network::{Link, Mac, Network},
};
use netlink_packet_route::{
    RouteNetlinkMessage,
    link::{
        AfSpecInet6, AfSpecUnspec, In6AddrGenMode, InfoKind, LinkAttribute, LinkFlags, LinkInfo,
        LinkMessage,
    },
    tc::{TcAttribute, TcMessage},
};

use super::{
    Expected, blocker,
    made::{self, Atlas, Told},
    no_link,
};
use crate::network::{
    NetworkError,
    interface::LOOPBACK,
    netlink::{CHANGE, Netlink},
};

/// The flags that a program can set.
const SETTABLE: LinkFlags = LinkFlags::Up
    .union(LinkFlags::Noarp)
    .union(LinkFlags::Promisc)
    .union(LinkFlags::Allmulti)
    .union(LinkFlags::Multicast);

/// The kinds that the kernel puts into every namespace when their module is loaded. They do
/// nothing while they are down.
const FALLBACK: [&str; 9] =
    ["sit0", "tunl0", "gre0", "gretap0", "erspan0", "ip_vti0", "ip6tnl0", "ip6gre0", "ip6_vti0"];

/// The links of a namespace by number and by name.
#[derive(Debug, Default)]
pub(super) struct Names {
    by_index: HashMap<u32, String>,
    by_name: HashMap<String, u32>,
}

impl Names {
    pub(super) fn name(&self, index: u32) -> Option<&str> {
        self.by_index.get(&index).map(String::as_str)
    }

    pub(super) fn index(&self, name: &str) -> Result<u32, NetworkError> {
        self.by_name.get(name).copied().ok_or_else(|| no_link(name))
    }
}

pub(super) fn names(netlink: &mut Netlink) -> Result<Names, NetworkError> {
    let mut names = Names::default();
    for link in list(netlink)? {
        let name = name_of(&link);
        names.by_index.insert(link.header.index, name.clone());
        names.by_name.insert(name, link.header.index);
    }
    Ok(names)
}

/// Reads the links of one network of the VE: `told` are they, `network` is its number.
pub(super) fn capture(
    netlink: &mut Netlink,
    (network, told, atlas): (usize, &[Told], &Atlas),
    expected: &[Expected],
    blockers: &mut Vec<Blocker>,
) -> Result<(Vec<Link>, Names), NetworkError> {
    let (mut links, mut names) = (Vec::new(), Names::default());
    for message in list(netlink)? {
        let name = name_of(&message);
        let up = message.header.flags.contains(LinkFlags::Up);
        let mut link = read(&message, &name);
        let wanted = expected.iter().find(|expected| expected.name == name);
        // One that is just being made is not told of yet.
        let Some(told) = told.iter().find(|told| told.index == message.header.index) else {
            continue;
        };
        told.put_into(&mut link);
        link.port = made::port(told, &atlas.names[network]);
        let given = match kind_of(&message) {
            None => name == LOOPBACK,
            Some(InfoKind::Veth) => wanted.is_some(),
            Some(_) => false,
        };
        if !given {
            let idle = !up && FALLBACK.contains(&name.as_str());
            match made::read(told, network, atlas) {
                _ if idle => continue,
                Ok(Some(made)) => link.made = Some(made),
                why => {
                    let why = why.err().unwrap_or("that is no program's");
                    let hint = "remove the link, or stop the VE before the move";
                    blockers.push(blocker(format!("network link {name} {why}"), hint));
                    continue;
                }
            }
        }
        if wanted.is_some_and(|wanted| link.mac != Some(wanted.mac)) {
            let hint = "set the hardware address of the VE's configuration again";
            blockers.push(blocker(format!("changed hardware address of {name}"), hint));
        }
        names.by_index.insert(message.header.index, name.clone());
        names.by_name.insert(name, message.header.index);
        links.push(link);
    }
    for missing in expected.iter().filter(|e| !names.by_name.contains_key(&e.name)) {
        let hint = "give the link its name again, or restart the VE";
        blockers.push(blocker(format!("missing network link {}", missing.name), hint));
    }
    find_traffic_control(netlink, &names, blockers)?;
    Ok((links, names))
}

/// A link of which only the name is known.
pub(super) fn empty(name: &str) -> Link {
    Link {
        name: name.into(),
        mac: None,
        mtu: 0,
        flags: 0,
        queue_length: 0,
        index: 0,
        group: 0,
        note: None,
        other_names: Vec::new(),
        port: None,
        made: None,
    }
}

fn read(message: &LinkMessage, name: &str) -> Link {
    let flags = (message.header.flags & SETTABLE).bits();
    let mut link = Link { flags, ..empty(name) };
    for attribute in &message.attributes {
        match attribute {
            LinkAttribute::Address(bytes) => link.mac = Mac::from_bytes(bytes),
            LinkAttribute::Mtu(mtu) => link.mtu = *mtu,
            LinkAttribute::TxQueueLen(length) => link.queue_length = *length,
            _ => {}
        }
    }
    link
}

/// Queueing disciplines other than none, which is what a veth has.
fn find_traffic_control(
    netlink: &mut Netlink,
    names: &Names,
    blockers: &mut Vec<Blocker>,
) -> Result<(), NetworkError> {
    let request = RouteNetlinkMessage::GetQueueDiscipline(TcMessage::default());
    for message in netlink.dump("list queueing disciplines", request)? {
        let RouteNetlinkMessage::NewQueueDiscipline(message) = message else { continue };
        let index = u32::try_from(message.header.index).unwrap_or_default();
        let Some(name) = names.name(index) else { continue };
        for attribute in &message.attributes {
            // One with the handle 0 is what the kernel gives to every link of a kind.
            let own = u32::from(message.header.handle) != 0;
            if let TcAttribute::Kind(kind) = attribute
                && own
                && !matches!(kind.as_str(), "noqueue" | "noop")
            {
                let hint = "remove it (tc qdisc del), or stop the VE before the move";
                blockers.push(blocker(format!("traffic control {kind} on {name}"), hint));
            }
        }
    }
    Ok(())
}

/// Sets everything but the flags. Returns the links that [`settle`] is to be called for.
pub(super) fn prepare(
    netlink: &mut Netlink,
    network: &Network,
    names: &Names,
) -> Result<Vec<u32>, NetworkError> {
    let found = list(netlink)?;
    let mut held_back = Vec::new();
    for link in &network.links {
        let index = names.index(&link.name)?;
        let Some(message) = found.iter().find(|found| found.header.index == index) else {
            return Err(no_link(&link.name));
        };
        let now = read(message, &link.name);
        let mut attributes = Vec::new();
        if now.mtu != link.mtu {
            attributes.push(LinkAttribute::Mtu(link.mtu));
        }
        if now.queue_length != link.queue_length {
            attributes.push(LinkAttribute::TxQueueLen(link.queue_length));
        }
        if !attributes.is_empty() {
            netlink.set_attributes("set up a link", index, attributes)?;
        }
        let up = LinkFlags::Up.bits();
        if now.flags & up == 0 && link.flags & up != 0 {
            // The link-local address is among those captured. Made by the kernel, it would be
            // unusable for a second.
            address_generation(netlink, index, In6AddrGenMode::None)?;
            // Unless the VE itself has set how they are made.
            let path = format!("ipv6/conf/{}/addr_gen_mode", link.name);
            if !network.settings.iter().any(|setting| setting.path == path) {
                held_back.push(index);
            }
        }
    }
    Ok(held_back)
}

/// Leaves link-local addresses to the kernel again, now that they are there.
pub(super) fn settle(netlink: &mut Netlink, held_back: &[u32]) -> Result<(), NetworkError> {
    held_back
        .iter()
        .try_for_each(|index| address_generation(netlink, *index, In6AddrGenMode::Eui64))
}

/// Sets the flags.
pub(super) fn finish(
    netlink: &mut Netlink,
    network: &Network,
    names: &Names,
) -> Result<(), NetworkError> {
    let found = list(netlink)?;
    for link in &network.links {
        let index = names.index(&link.name)?;
        let now = found.iter().find(|found| found.header.index == index);
        let now = now.map_or(0, |now| (now.header.flags & SETTABLE).bits());
        if now == link.flags {
            continue;
        }
        let mut message = LinkMessage::default();
        message.header.index = index;
        message.header.flags = LinkFlags::from_bits_retain(link.flags) & SETTABLE;
        message.header.change_mask = SETTABLE;
        netlink.change("set up a link", RouteNetlinkMessage::SetLink(message), CHANGE)?;
    }
    Ok(())
}

/// Lets the kernel give the link its link-local address, or not.
fn address_generation(
    netlink: &mut Netlink,
    index: u32,
    mode: In6AddrGenMode,
) -> Result<(), NetworkError> {
    let mode = AfSpecUnspec::Inet6(vec![AfSpecInet6::AddrGenMode(mode)]);
    let attributes = vec![LinkAttribute::AfSpecUnspec(vec![mode])];
    match netlink.set_attributes("set how addresses are made", index, attributes) {
        // No IPv6 in this kernel or on this link.
        Err(error) if matches!(error.errno(), Some(libc::EAFNOSUPPORT | libc::EINVAL)) => Ok(()),
        result => Ok(result?),
    }
}

fn list(netlink: &mut Netlink) -> Result<Vec<LinkMessage>, NetworkError> {
    let request = RouteNetlinkMessage::GetLink(LinkMessage::default());
    let found = netlink.dump("list links", request)?;
    Ok(found
        .into_iter()
        .filter_map(|message| match message {
            RouteNetlinkMessage::NewLink(link) => Some(link),
            _ => None,
        })
        .collect())
}

fn name_of(message: &LinkMessage) -> String {
    let name = message.attributes.iter().find_map(|attribute| match attribute {
        LinkAttribute::IfName(name) => Some(name.clone()),
        _ => None,
    });
    name.unwrap_or_default()
}

fn kind_of(message: &LinkMessage) -> Option<&InfoKind> {
    message.attributes.iter().find_map(|attribute| match attribute {
        LinkAttribute::LinkInfo(infos) => infos.iter().find_map(|info| match info {
            LinkInfo::Kind(kind) => Some(kind),
            _ => None,
        }),
        _ => None,
    })
}
