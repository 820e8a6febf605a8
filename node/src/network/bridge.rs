//! The bridge that joins the VEs of a node with its LAN.

use ckpt_format::network::{Cidr, Mac};
use netlink_packet_route::link::{InfoKind, LinkAttribute, LinkInfo, LinkMessage};
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
}

fn is_bridge(link: &LinkMessage) -> bool {
    link.attributes.iter().any(|attribute| match attribute {
        LinkAttribute::LinkInfo(infos) => infos.contains(&LinkInfo::Kind(InfoKind::Bridge)),
        _ => false,
    })
}
