//! The bridge that joins the VEs of a node with its LAN.

use ckpt_format::network::{Cidr, Mac};
use netlink_packet_route::link::{InfoKind, LinkAttribute, LinkInfo, LinkMessage};
use nix::sys::socket::SockaddrStorage;
use serde::{Deserialize, Serialize};

use super::{NetworkError, netlink::Netlink};

/// The `[network]` section of the daemon's configuration.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct BridgeConfig {
    /// The bridge. It is made when it is missing.
    pub bridge: String,
    /// An interface of the host to put into the bridge.
    pub uplink: Option<String>,
    /// Addresses of the host to put on the bridge.
    pub addresses: Vec<Cidr>,
}

impl Default for BridgeConfig {
    fn default() -> Self {
        Self { bridge: "vzbr0".into(), uplink: None, addresses: Vec::new() }
    }
}

/// A bridge that is there.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Bridge {
    /// The interface's name.
    pub name: String,
    /// The interface's number.
    pub index: u32,
}

impl Bridge {
    /// Makes sure that the bridge is there, on, and connected as configured, in the network
    /// namespace of the calling thread. What is already right is left alone.
    pub fn ensure(config: &BridgeConfig) -> Result<Self, NetworkError> {
        let mut netlink = Netlink::open()?;
        let name = config.bridge.clone();
        if let Some(link) = netlink.link(&name)? {
            if !is_bridge(&link) {
                return Err(NetworkError::NotABridge { name });
            }
        } else {
            netlink.add_bridge(&name, Mac::local(rand::random()))?;
        }
        let index = netlink.index(&name)?;
        netlink.set_up(index)?;
        for address in &config.addresses {
            netlink.add_address(index, *address)?;
        }
        if let Some(uplink) = &config.uplink {
            let link = netlink
                .link(uplink)?
                .ok_or_else(|| NetworkError::NoUplink { name: uplink.clone() })?;
            if !link.attributes.contains(&LinkAttribute::Controller(index)) {
                netlink.enslave(link.header.index, index)?;
            }
            netlink.set_up(link.header.index)?;
        }
        Ok(Self { name, index })
    }

    /// The addresses that the host has on the bridge now, configured here or elsewhere. None when
    /// they cannot be read.
    pub fn addresses(&self) -> Vec<Cidr> {
        let found = nix::ifaddrs::getifaddrs().into_iter().flatten();
        let ours = found.filter(|it| it.interface_name == self.name);
        ours.filter_map(|it| cidr(&it.address?, &it.netmask?)).collect()
    }
}

fn cidr(address: &SockaddrStorage, mask: &SockaddrStorage) -> Option<Cidr> {
    if let (Some(address), Some(mask)) = (address.as_sockaddr_in(), mask.as_sockaddr_in()) {
        return Cidr::new(address.ip().into(), mask.ip().to_bits().count_ones() as u8);
    }
    let (address, mask) = (address.as_sockaddr_in6()?, mask.as_sockaddr_in6()?);
    Cidr::new(address.ip().into(), mask.ip().to_bits().count_ones() as u8)
}

fn is_bridge(link: &LinkMessage) -> bool {
    link.attributes.iter().any(|attribute| match attribute {
        LinkAttribute::LinkInfo(infos) => infos.contains(&LinkInfo::Kind(InfoKind::Bridge)),
        _ => false,
    })
}
