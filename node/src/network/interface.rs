//! The pair of interfaces that connects a VE with the node's bridge.
//!
//! A closed [`Gate`] lets nothing through in either direction. A VE that is being rebuilt sits
//! behind a closed gate, because its interface has the same hardware address as the one that is
//! still in use on the source: a single frame from it (IPv6 speaks as soon as a link is up)
//! would make every switch send the VE's traffic to the wrong host.

use ckpt_engine::sys::netns::Netns;
use ckpt_format::network::{Cidr, Mac};
use netlink_packet_route::{
    AddressFamily, RouteNetlinkMessage,
    link::InfoBridgePort,
    route::{
        RouteAddress, RouteAttribute, RouteHeader, RouteMessage, RouteProtocol, RouteScope,
        RouteType,
    },
};
use serde::{Deserialize, Serialize};

use super::{
    Bridge, NetworkError,
    link::{VethEnd, fdb_request, port_request},
    netlink::{Netlink, PUT},
    system,
};

/// The name of the loopback interface, which every namespace has.
pub(super) const LOOPBACK: &str = "lo";

/// What a VE's interface is to be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InterfaceConfig {
    /// The name on the host, e.g. `veth101.0`.
    pub host_name: String,
    /// The name inside the VE, e.g. `eth0`.
    pub name: String,
    /// The hardware address inside the VE. It stays the same on every host.
    pub mac: Mac,
    /// The addresses inside the VE.
    pub addresses: Vec<Cidr>,
    /// The default gateways, at most one of each family.
    pub gateways: Vec<std::net::IpAddr>,
}

/// Whether frames pass between the VE and the bridge.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Gate {
    /// They pass.
    Open,
    /// They do not, in either direction.
    Closed,
}

/// A VE's interface that is there.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Interface {
    /// The name on the host.
    pub host_name: String,
    /// The number on the host.
    pub host_index: u32,
    /// The hardware address inside the VE.
    pub mac: Mac,
    /// The bridge of which the host's end is a port.
    pub bridge: Bridge,
}

impl Interface {
    /// Connects a VE that starts: interface, addresses and routes, all ready when this returns.
    pub fn attach(
        netns: &Netns,
        bridge: &Bridge,
        config: &InterfaceConfig,
    ) -> Result<Self, NetworkError> {
        let interface = Self::create(netns, bridge, config, Gate::Open)?;
        match configure(netns, config) {
            Ok(()) => Ok(interface),
            Err(error) => {
                // The first error is the one to tell; without this the name would stay taken.
                let _ = interface.detach();
                Err(error)
            }
        }
    }

    /// Makes the pair of interfaces without switching on the VE's end or giving it addresses:
    /// what a VE that is being rebuilt needs.
    pub fn create(
        netns: &Netns,
        bridge: &Bridge,
        config: &InterfaceConfig,
        gate: Gate,
    ) -> Result<Self, NetworkError> {
        let mut netlink = Netlink::open()?;
        let host = VethEnd { name: &config.host_name, mac: None, netns: None };
        let inside = VethEnd { name: &config.name, mac: Some(config.mac), netns: Some(netns) };
        netlink.add_veth(&host, &inside)?;
        let connect = |netlink: &mut Netlink| {
            let host_index = netlink.index(&config.host_name)?;
            netlink.keep_silent(host_index)?;
            netlink.enslave(host_index, bridge.index)?;
            let interface = Self {
                host_name: config.host_name.clone(),
                host_index,
                mac: config.mac,
                bridge: bridge.clone(),
            };
            // Before anything is switched on, so that nothing ever passes a closed gate.
            interface.set_gate(netlink, gate)?;
            netlink.set_up(host_index)?;
            Ok(interface)
        };
        connect(&mut netlink).inspect_err(|_| {
            if let Ok(Some(index)) = netlink.index_of(&config.host_name) {
                let _ = netlink.remove_link(index);
            }
        })
    }

    /// Finds the interface of a VE that runs already, after a restart of the daemon.
    pub fn find(bridge: &Bridge, host_name: &str, mac: Mac) -> Result<Self, NetworkError> {
        let host_index = Netlink::open()?.index(host_name)?;
        Ok(Self { host_name: host_name.into(), host_index, mac, bridge: bridge.clone() })
    }

    /// Opens or closes the way between the VE and the bridge. Opening also undoes a hold whose
    /// daemon has died, so a daemon that finds a running VE calls this.
    pub fn set_gate(&self, netlink: &mut Netlink, gate: Gate) -> Result<(), NetworkError> {
        netlink.change_all("set a gate", gate_requests(self, gate))?;
        Ok(())
    }

    /// Removes both ends.
    pub fn detach(&self) -> Result<(), NetworkError> {
        let mut netlink = Netlink::open()?;
        // By name: the number may be somebody else's by now if the VE's namespace went away.
        if let Some(index) = netlink.index_of(&self.host_name)? {
            netlink.remove_link(index)?;
        }
        Ok(())
    }
}

type Request = (RouteNetlinkMessage, u16);

/// The requests that open or close a gate.
///
/// Closing needs no change of the port's state, which the bridge would set back at the next
/// event of the link: a *locked* port accepts only frames whose source address is known to be
/// behind it, and the VE's is not while no entry of the bridge says so.
pub(super) fn gate_requests(interface: &Interface, gate: Gate) -> Vec<Request> {
    let port = interface.host_index;
    match gate {
        Gate::Open => {
            vec![port_request(port, gate_properties(true, true)), fdb_request(interface.mac, port)]
        }
        Gate::Closed => vec![port_request(port, gate_properties(false, false))],
    }
}

/// What makes a port let frames out of the VE, and into it.
pub(super) fn gate_properties(outgoing: bool, incoming: bool) -> Vec<InfoBridgePort> {
    vec![
        InfoBridgePort::Locked(!outgoing),
        InfoBridgePort::UnicastFlood(incoming),
        InfoBridgePort::MulticastFlood(incoming),
        InfoBridgePort::BroadcastFlood(incoming),
    ]
}

fn configure(netns: &Netns, config: &InterfaceConfig) -> Result<(), NetworkError> {
    let mut netlink = Netlink::open_in(netns)?;
    let loopback = netlink.index(LOOPBACK)?;
    netlink.set_up(loopback)?;
    let index = netlink.index(&config.name)?;
    for address in &config.addresses {
        netlink.add_address(index, *address)?;
    }
    netlink.set_up(index)?;
    for gateway in &config.gateways {
        let what = format!("set the default gateway {gateway}");
        netlink.change(&what, default_route(*gateway, index), PUT)?;
    }
    Ok(())
}

fn default_route(gateway: std::net::IpAddr, index: u32) -> RouteNetlinkMessage {
    let mut message = RouteMessage::default();
    message.header.address_family =
        if gateway.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
    message.header.table = RouteHeader::RT_TABLE_MAIN;
    message.header.protocol = RouteProtocol::Boot;
    message.header.scope = RouteScope::Universe;
    message.header.kind = RouteType::Unicast;
    message.attributes.push(RouteAttribute::Gateway(RouteAddress::from(gateway)));
    message.attributes.push(RouteAttribute::Oif(index));
    RouteNetlinkMessage::NewRoute(message)
}

impl Interface {
    /// Reads the VE's network namespace for the process `pid`.
    pub fn netns_of(pid: i32) -> Result<Netns, NetworkError> {
        Netns::of_process(pid).map_err(system("open a network namespace"))
    }
}
