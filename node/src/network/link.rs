//! Links, and the addresses and bridge ports on them, as short verbs over [`Netlink`].

use std::os::fd::{AsFd, AsRawFd};

use ckpt_engine::sys::netns::Netns;
use ckpt_format::network::{Cidr, Mac};
use netlink_packet_route::{
    AddressFamily, RouteNetlinkMessage,
    address::{AddressAttribute, AddressFlags, AddressMessage, AddressScope},
    link::{
        AfSpecInet6, AfSpecUnspec, BridgePortState, BridgeStpState, In6AddrGenMode, InfoBridge,
        InfoBridgePort, InfoData, InfoKind, InfoPortData, InfoPortKind, InfoVeth, LinkAttribute,
        LinkFlags, LinkInfo, LinkMessage,
    },
    neighbour::{NeighbourAttribute, NeighbourFlags, NeighbourMessage, NeighbourState},
};

use super::netlink::{CHANGE, NEW, Netlink, NetlinkError, PUT};

/// One end of a new veth pair.
#[derive(Debug)]
pub struct VethEnd<'a> {
    /// The interface's name.
    pub name: &'a str,
    /// Its address; the kernel picks one when there is none.
    pub mac: Option<Mac>,
    /// The namespace in which it is made; the socket's own when there is none.
    pub netns: Option<&'a Netns>,
}

impl Netlink {
    /// The index of the link with this name, when there is one.
    pub fn index_of(&mut self, name: &str) -> Result<Option<u32>, NetlinkError> {
        Ok(self.link(name)?.map(|link| link.header.index))
    }

    /// The index of the link with this name, which must be there.
    pub fn index(&mut self, name: &str) -> Result<u32, NetlinkError> {
        self.index_of(name)?.ok_or_else(|| NetlinkError::Refused {
            what: format!("find the interface {name}"),
            source: std::io::Error::from_raw_os_error(libc::ENODEV),
        })
    }

    /// All that is known about the link with this name.
    pub fn link(&mut self, name: &str) -> Result<Option<LinkMessage>, NetlinkError> {
        let mut message = LinkMessage::default();
        message.attributes.push(LinkAttribute::IfName(name.into()));
        match self.get("find an interface", RouteNetlinkMessage::GetLink(message)) {
            Ok(RouteNetlinkMessage::NewLink(link)) => Ok(Some(link)),
            Ok(_) => Ok(None),
            Err(error) if error.errno() == Some(libc::ENODEV) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// All that is known about the link with this number.
    pub fn link_at(&mut self, index: u32) -> Result<Option<LinkMessage>, NetlinkError> {
        match self.get("find an interface", RouteNetlinkMessage::GetLink(indexed(index))) {
            Ok(RouteNetlinkMessage::NewLink(link)) => Ok(Some(link)),
            Ok(_) => Ok(None),
            Err(error) if error.errno() == Some(libc::ENODEV) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Makes a bridge without spanning tree, with a fixed address of its own. The address would
    /// otherwise change with every port that comes and goes, and hosts would lose it.
    pub fn add_bridge(&mut self, name: &str, mac: Mac) -> Result<(), NetlinkError> {
        let mut message = named(name);
        message.attributes.push(LinkAttribute::Address(mac.bytes().to_vec()));
        message.attributes.push(LinkAttribute::LinkInfo(vec![
            LinkInfo::Kind(InfoKind::Bridge),
            LinkInfo::Data(InfoData::Bridge(vec![
                InfoBridge::StpState(BridgeStpState::Disabled),
                InfoBridge::ForwardDelay(0),
                // Without a querier on the LAN, snooping only ever loses group traffic.
                InfoBridge::MulticastSnooping(false),
            ])),
        ]));
        let what = format!("make the bridge {name}");
        self.change(&what, RouteNetlinkMessage::NewLink(message), NEW)
    }

    /// Makes a veth pair, each end directly in its namespace. Neither end gets an IPv6
    /// link-local address by itself on the `near` side.
    pub fn add_veth(&mut self, near: &VethEnd<'_>, far: &VethEnd<'_>) -> Result<(), NetlinkError> {
        let end = |end: &VethEnd<'_>| {
            let mut message = named(end.name);
            if let Some(mac) = end.mac {
                message.attributes.push(LinkAttribute::Address(mac.bytes().to_vec()));
            }
            if let Some(netns) = end.netns {
                let fd = netns.as_fd().as_raw_fd();
                message.attributes.push(LinkAttribute::NetNsFd(fd));
            }
            message
        };
        let mut message = end(near);
        message.attributes.push(LinkAttribute::LinkInfo(vec![
            LinkInfo::Kind(InfoKind::Veth),
            LinkInfo::Data(InfoData::Veth(InfoVeth::Peer(end(far)))),
        ]));
        let what = format!("make the interface pair {} and {}", near.name, far.name);
        self.change(&what, RouteNetlinkMessage::NewLink(message), NEW)
    }

    /// Removes a link. That it is not there is no error.
    pub fn remove_link(&mut self, index: u32) -> Result<(), NetlinkError> {
        let message = RouteNetlinkMessage::DelLink(indexed(index));
        match self.change("remove an interface", message, CHANGE) {
            Err(error) if error.errno() == Some(libc::ENODEV) => Ok(()),
            result => result,
        }
    }

    /// Switches a link on.
    pub fn set_up(&mut self, index: u32) -> Result<(), NetlinkError> {
        let mut message = indexed(index);
        message.header.flags = LinkFlags::Up;
        message.header.change_mask = LinkFlags::Up;
        self.set_link("switch an interface on", message)
    }

    /// Applies attributes to a link.
    pub fn set_attributes(
        &mut self,
        what: &str,
        index: u32,
        attributes: Vec<LinkAttribute>,
    ) -> Result<(), NetlinkError> {
        let mut message = indexed(index);
        message.attributes = attributes;
        self.set_link(what, message)
    }

    /// Makes a link a port of a bridge.
    pub fn enslave(&mut self, port: u32, bridge: u32) -> Result<(), NetlinkError> {
        self.set_attributes(
            "put a port into a bridge",
            port,
            vec![LinkAttribute::Controller(bridge)],
        )
    }

    /// Keeps the kernel from giving the link an IPv6 link-local address and from speaking by
    /// itself on it. Works only before the link is switched on.
    pub fn keep_silent(&mut self, index: u32) -> Result<(), NetlinkError> {
        let mode = AfSpecInet6::AddrGenMode(In6AddrGenMode::None);
        let attributes = vec![LinkAttribute::AfSpecUnspec(vec![AfSpecUnspec::Inet6(vec![mode])])];
        match self.set_attributes("silence an interface", index, attributes) {
            // No IPv6 in this kernel: silent already.
            Err(error) if error.errno() == Some(libc::EAFNOSUPPORT) => Ok(()),
            result => result,
        }
    }

    /// Adds an address. IPv6 addresses are usable at once: duplicate detection would cost a
    /// second, and who owns an address is known.
    pub fn add_address(&mut self, index: u32, cidr: Cidr) -> Result<(), NetlinkError> {
        let mut message = AddressMessage::default();
        message.header.index = index;
        message.header.prefix_len = cidr.prefix();
        message.header.scope = AddressScope::Universe;
        message.attributes.push(AddressAttribute::Address(cidr.address()));
        message.attributes.push(AddressAttribute::Local(cidr.address()));
        message.header.family = AddressFamily::Inet;
        if cidr.address().is_ipv6() {
            message.header.family = AddressFamily::Inet6;
            message.attributes.push(AddressAttribute::Flags(AddressFlags::Nodad));
        }
        message.attributes.extend(cidr.broadcast().map(AddressAttribute::Broadcast));
        let what = format!("add the address {cidr}");
        self.change(&what, RouteNetlinkMessage::NewAddress(message), PUT)
    }

    /// Removes an address.
    pub fn remove_address(&mut self, index: u32, cidr: Cidr) -> Result<(), NetlinkError> {
        let mut message = AddressMessage::default();
        message.header.index = index;
        message.header.prefix_len = cidr.prefix();
        message.header.family =
            if cidr.address().is_ipv6() { AddressFamily::Inet6 } else { AddressFamily::Inet };
        message.attributes.push(AddressAttribute::Local(cidr.address()));
        let what = format!("remove the address {cidr}");
        self.change(&what, RouteNetlinkMessage::DelAddress(message), CHANGE)
    }

    fn set_link(&mut self, what: &str, message: LinkMessage) -> Result<(), NetlinkError> {
        self.change(what, RouteNetlinkMessage::SetLink(message), CHANGE)
    }
}

/// A request that changes properties of a bridge port.
pub fn port_request(port: u32, properties: Vec<InfoBridgePort>) -> (RouteNetlinkMessage, u16) {
    let mut message = indexed(port);
    message.attributes.push(LinkAttribute::LinkInfo(vec![
        LinkInfo::PortKind(InfoPortKind::Bridge),
        LinkInfo::PortData(InfoPortData::BridgePort(properties)),
    ]));
    (RouteNetlinkMessage::NewLink(message), CHANGE)
}

/// A request that sets the state of a bridge port: only `Forwarding` lets frames pass.
pub fn port_state_request(port: u32, state: BridgePortState) -> (RouteNetlinkMessage, u16) {
    port_request(port, vec![InfoBridgePort::State(state)])
}

/// A request that makes a bridge send all frames for `mac` to `port`, whatever it learns.
pub fn fdb_request(mac: Mac, port: u32) -> (RouteNetlinkMessage, u16) {
    (RouteNetlinkMessage::NewNeighbour(fdb_entry(mac, port)), PUT)
}

/// A request that removes what [`fdb_request`] made.
pub fn fdb_removal_request(mac: Mac, port: u32) -> (RouteNetlinkMessage, u16) {
    (RouteNetlinkMessage::DelNeighbour(fdb_entry(mac, port)), CHANGE)
}

fn fdb_entry(mac: Mac, port: u32) -> NeighbourMessage {
    let mut message = NeighbourMessage::default();
    message.header.family = AddressFamily::Bridge;
    message.header.ifindex = port;
    // Static and sticky: a frame with this source address that arrives at another port (a late
    // one of the source of a migration) does not move the entry.
    message.header.state = NeighbourState::Noarp;
    message.header.flags = NeighbourFlags::Controller | NeighbourFlags::Sticky;
    message.attributes.push(NeighbourAttribute::LinkLayerAddress(mac.bytes().to_vec()));
    message
}

fn named(name: &str) -> LinkMessage {
    let mut message = LinkMessage::default();
    message.attributes.push(LinkAttribute::IfName(name.into()));
    message
}

fn indexed(index: u32) -> LinkMessage {
    let mut message = LinkMessage::default();
    message.header.index = index;
    message
}
