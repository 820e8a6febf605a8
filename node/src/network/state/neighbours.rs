//! The neighbour cache, so that the first packet after a move waits for nobody.

use std::net::IpAddr;

use ckpt_format::network::{Mac, Neighbour, Network};
use netlink_packet_route::{
    AddressFamily, RouteNetlinkMessage,
    neighbour::{
        NeighbourAddress, NeighbourAttribute, NeighbourFlags, NeighbourMessage, NeighbourState,
    },
};

use super::links::Names;
use crate::network::{
    NetworkError,
    netlink::{Netlink, PUT},
};

const KEPT_FLAGS: NeighbourFlags = NeighbourFlags::Router.union(NeighbourFlags::Proxy);

pub(super) fn capture(
    netlink: &mut Netlink,
    names: &Names,
) -> Result<Vec<Neighbour>, NetworkError> {
    let mut neighbours = Vec::new();
    // Proxy entries are listed only when asked for.
    for flags in [NeighbourFlags::empty(), NeighbourFlags::Proxy] {
        let mut request = NeighbourMessage::default();
        request.header.flags = flags;
        let request = RouteNetlinkMessage::GetNeighbour(request);
        for message in netlink.dump("list neighbours", request)? {
            if let RouteNetlinkMessage::NewNeighbour(message) = message {
                neighbours.extend(read(&message, names));
            }
        }
    }
    Ok(neighbours)
}

fn read(message: &NeighbourMessage, names: &Names) -> Option<Neighbour> {
    let header = &message.header;
    let (mut address, mut mac) = (None, None);
    for attribute in &message.attributes {
        match attribute {
            NeighbourAttribute::Destination(NeighbourAddress::Inet(v4)) => {
                address = Some(IpAddr::from(*v4));
            }
            NeighbourAttribute::Destination(NeighbourAddress::Inet6(v6)) => {
                address = Some(IpAddr::from(*v6));
            }
            NeighbourAttribute::LinkLayerAddress(bytes) => mac = Mac::from_bytes(bytes),
            _ => {}
        }
    }
    let proxy = header.flags.contains(NeighbourFlags::Proxy);
    let known = matches!(
        header.state,
        NeighbourState::Reachable
            | NeighbourState::Stale
            | NeighbourState::Delay
            | NeighbourState::Probe
            | NeighbourState::Permanent
    );
    let usable = known && mac.is_some();
    if !(proxy || usable) {
        return None;
    }
    Some(Neighbour {
        link: names.name(header.ifindex)?.into(),
        address: address?,
        mac,
        permanent: header.state == NeighbourState::Permanent,
        flags: (header.flags & KEPT_FLAGS).bits(),
    })
}

/// Only adds: what the target has learned itself is as good.
pub(super) fn rebuild(
    netlink: &mut Netlink,
    network: &Network,
    names: &Names,
) -> Result<(), NetworkError> {
    let found = capture(netlink, names)?;
    let missing = network.neighbours.iter().filter(|neighbour| !found.contains(neighbour));
    let requests: Vec<_> = missing
        .map(|neighbour| Ok((RouteNetlinkMessage::NewNeighbour(request(neighbour, names)?), PUT)))
        .collect::<Result<_, NetworkError>>()?;
    if requests.is_empty() {
        return Ok(());
    }
    Ok(netlink.change_all("add a neighbour", requests)?)
}

fn request(neighbour: &Neighbour, names: &Names) -> Result<NeighbourMessage, NetworkError> {
    let mut message = NeighbourMessage::default();
    let header = &mut message.header;
    header.family =
        if neighbour.address.is_ipv6() { AddressFamily::Inet6 } else { AddressFamily::Inet };
    header.ifindex = names.index(&neighbour.link)?;
    header.flags = NeighbourFlags::from_bits_retain(neighbour.flags) & KEPT_FLAGS;
    // Stale is used at once and asked about a few seconds later.
    header.state =
        if neighbour.permanent { NeighbourState::Permanent } else { NeighbourState::Stale };
    let address = NeighbourAddress::from(neighbour.address);
    message.attributes.push(NeighbourAttribute::Destination(address));
    if let Some(mac) = neighbour.mac {
        message.attributes.push(NeighbourAttribute::LinkLayerAddress(mac.bytes().to_vec()));
    }
    Ok(message)
}
