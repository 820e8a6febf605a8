//! The network of a node and of its VEs.
//!
//! A node has one [`bridge`]. Each VE has a pair of interfaces, one end on the bridge and one
//! inside ([`interface`]). During a migration what the VE's network namespace holds is read and
//! made again ([`state`]), the frames that arrive meanwhile are kept ([`hold`]), and the LAN is
//! told where the VE is now ([`announce`]). Before a VE gets an address the LAN is asked whether
//! somebody else has it ([`probe`]).
//!
//! Everything here is synchronous and works in the network namespace of the calling thread, or
//! in one that is given.

pub mod announce;
mod backlog;
pub mod bridge;
pub mod hold;
pub mod interface;
pub mod link;
pub mod netlink;
pub mod nftables;
pub mod probe;
mod shape;
pub mod state;

pub use self::{
    announce::Announcer,
    bridge::{Bridge, BridgeConfig},
    hold::{Drained, Hold},
    interface::{Gate, Interface, InterfaceConfig},
    netlink::{Netlink, NetlinkError},
    probe::{Claim, find_claim},
};

/// Why something about a network could not be done.
#[derive(Debug, thiserror::Error)]
pub enum NetworkError {
    /// A netlink request failed.
    #[error(transparent)]
    Netlink(#[from] NetlinkError),
    /// A namespace, a TAP or a packet socket failed.
    #[error("cannot {what}")]
    System {
        /// What was to be done.
        what: &'static str,
        /// The kernel's answer.
        source: std::io::Error,
    },
    /// An interface of that name is there but is no bridge.
    #[error("the interface {name} is not a bridge")]
    NotABridge {
        /// The configured name.
        name: String,
    },
    /// The configured uplink is not there.
    #[error("the uplink {name} does not exist")]
    NoUplink {
        /// The configured name.
        name: String,
    },
    /// A link that something refers to is not there.
    #[error("the network link {name} does not exist")]
    NoLink {
        /// Its name.
        name: String,
    },
    /// A link of a program cannot be made.
    #[error("cannot make the network link {name}")]
    Link {
        /// Its name.
        name: String,
        /// The kernel's answer.
        source: std::io::Error,
    },
    /// A link was made, but has other settings than on the source.
    #[error("this kernel makes the network link {name} in another way")]
    ChangedLink {
        /// Its name.
        name: String,
    },
    /// A table of iptables, ip6tables or arptables cannot be made.
    #[error("cannot make the table {table}{missing}")]
    Table {
        /// Which one.
        table: String,
        /// What of it this kernel does not have.
        missing: String,
        /// The kernel's answer.
        source: std::io::Error,
    },
    /// A setting could not be made as it was.
    #[error("cannot set net/{path}")]
    Setting {
        /// Its path below `/proc/sys/net`.
        path: String,
        /// The kernel's answer.
        source: std::io::Error,
    },
}

impl NetworkError {
    /// True when something of the same name is still there.
    pub fn is_busy(&self) -> bool {
        matches!(self, Self::System { source, .. } if source.raw_os_error() == Some(libc::EBUSY))
    }
}

/// Turns an `io::Error` into a [`NetworkError`] that says what was to be done.
fn system(what: &'static str) -> impl FnOnce(std::io::Error) -> NetworkError {
    move |source| NetworkError::System { what, source }
}
