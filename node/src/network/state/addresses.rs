//! Addresses of links.

use ckpt_format::network::{Address, Network};
use netlink_packet_route::{
    AddressFamily, RouteNetlinkMessage,
    address::{
        AddressAttribute, AddressFlags, AddressMessage, AddressProtocol, AddressScope, CacheInfo,
    },
};

use super::links::Names;
use crate::network::{
    NetworkError,
    netlink::{CHANGE, Netlink, PUT},
};

/// The flags that a program can set. The others tell a state, which comes back by itself.
const SETTABLE: AddressFlags = AddressFlags::Homeaddress
    .union(AddressFlags::Managetempaddr)
    .union(AddressFlags::Noprefixroute)
    .union(AddressFlags::Mcautojoin);

pub(super) fn capture(netlink: &mut Netlink, names: &Names) -> Result<Vec<Address>, NetworkError> {
    let request = RouteNetlinkMessage::GetAddress(AddressMessage::default());
    let found = netlink.dump("list addresses", request)?;
    Ok(found
        .iter()
        .filter_map(|message| match message {
            RouteNetlinkMessage::NewAddress(message) => read(message, names),
            _ => None,
        })
        .collect())
}

fn read(message: &AddressMessage, names: &Names) -> Option<Address> {
    let (mut local, mut peer) = (None, None);
    let mut address = Address {
        link: names.name(message.header.index)?.into(),
        local: [0, 0, 0, 0].into(),
        peer: [0, 0, 0, 0].into(),
        prefix: message.header.prefix_len,
        broadcast: None,
        scope: message.header.scope.into(),
        flags: 0,
        label: None,
        metric: None,
        lifetime_s: (u32::MAX, u32::MAX),
        protocol: 0,
    };
    for attribute in &message.attributes {
        match attribute {
            AddressAttribute::Local(ip) => local = Some(*ip),
            AddressAttribute::Address(ip) => peer = Some(*ip),
            AddressAttribute::Broadcast(ip) => address.broadcast = Some((*ip).into()),
            AddressAttribute::Label(label) => address.label = Some(label.clone()),
            AddressAttribute::Flags(flags) => address.flags = (*flags & SETTABLE).bits(),
            AddressAttribute::RoutePriority(metric) => address.metric = Some(*metric),
            AddressAttribute::Protocol(protocol) => address.protocol = u8::from(*protocol),
            AddressAttribute::CacheInfo(info) => {
                address.lifetime_s = (info.ifa_preferred, info.ifa_valid);
            }
            _ => {}
        }
    }
    // IPv6 has only one of the two unless the link is point to point.
    address.local = local.or(peer)?;
    address.peer = peer.or(local)?;
    Some(address)
}

pub(super) fn rebuild(
    netlink: &mut Netlink,
    network: &Network,
    names: &Names,
) -> Result<(), NetworkError> {
    let found = capture(netlink, names)?;
    for address in found.iter().filter(|found| !network.addresses.iter().any(|a| same(a, found))) {
        let message = RouteNetlinkMessage::DelAddress(request(address, names)?);
        match netlink.change("remove an address", message, CHANGE) {
            // It went with another one whose secondary it was.
            Err(error) if error.errno() == Some(libc::EADDRNOTAVAIL) => {}
            result => result?,
        }
    }
    for address in &network.addresses {
        if !found.iter().any(|found| same(address, found)) {
            let message = RouteNetlinkMessage::NewAddress(request(address, names)?);
            netlink.change(&format!("add the address {}", address.local), message, PUT)?;
        }
    }
    Ok(())
}

/// Equal but for the lifetimes, which run.
fn same(one: &Address, other: &Address) -> bool {
    let for_ever = |address: &Address| address.lifetime_s.1 == u32::MAX;
    for_ever(one) == for_ever(other)
        && *one == Address { lifetime_s: one.lifetime_s, ..other.clone() }
}

fn request(address: &Address, names: &Names) -> Result<AddressMessage, NetworkError> {
    let mut message = AddressMessage::default();
    message.header.index = names.index(&address.link)?;
    message.header.prefix_len = address.prefix;
    message.header.scope = AddressScope::from(address.scope);
    message.header.family = AddressFamily::Inet;
    let mut flags = AddressFlags::from_bits_retain(address.flags) & SETTABLE;
    if address.local.is_ipv6() {
        message.header.family = AddressFamily::Inet6;
        // It was in use: nobody else has it.
        flags |= AddressFlags::Nodad;
    }
    let attributes = &mut message.attributes;
    attributes.push(AddressAttribute::Local(address.local));
    attributes.push(AddressAttribute::Address(address.peer));
    attributes.push(AddressAttribute::Flags(flags));
    if let Some(std::net::IpAddr::V4(broadcast)) = address.broadcast {
        attributes.push(AddressAttribute::Broadcast(broadcast));
    }
    attributes.extend(address.label.clone().map(AddressAttribute::Label));
    attributes.extend(address.metric.map(AddressAttribute::RoutePriority));
    if address.protocol != 0 {
        let protocol = AddressProtocol::from(address.protocol);
        attributes.push(AddressAttribute::Protocol(protocol));
    }
    if address.lifetime_s.1 != u32::MAX {
        let mut info = CacheInfo::default();
        (info.ifa_preferred, info.ifa_valid) = address.lifetime_s;
        attributes.push(AddressAttribute::CacheInfo(info));
    }
    Ok(message)
}
