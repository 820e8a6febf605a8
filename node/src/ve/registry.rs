//! What the runtime asks the cluster: whether a VE may be here under its number, name and
//! addresses, and who runs it.

use std::net::IpAddr;

use futures_util::future::BoxFuture;

use super::VeId;

/// What makes a VE unique in a cluster.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// The number.
    pub id: VeId,
    /// The name.
    pub name: Option<String>,
    /// The addresses.
    pub addresses: Vec<IpAddr>,
    /// The text of its configuration.
    pub config: String,
}

/// Why the cluster refuses.
#[derive(Debug, thiserror::Error)]
pub enum RegistryError {
    /// Another VE has the number.
    #[error("VE {id} exists on {node}")]
    IdTaken {
        /// The number.
        id: VeId,
        /// Where it is.
        node: String,
    },
    /// Another VE has the name.
    #[error("the name {name} belongs to VE {id}")]
    NameTaken {
        /// The name.
        name: String,
        /// The other VE.
        id: u32,
    },
    /// Another VE has the address.
    #[error("the address {address} is used by VE {id}")]
    AddressTaken {
        /// The address.
        address: IpAddr,
        /// The other VE.
        id: u32,
    },
    /// The VE belongs to another node now.
    #[error("VE {id} belongs to {node}")]
    NotOwner {
        /// The number.
        id: VeId,
        /// Whose it is.
        node: String,
    },
    /// The cluster cannot decide now.
    #[error("the cluster does not answer")]
    Unavailable(#[source] Box<dyn std::error::Error + Send + Sync>),
}

/// The cluster as the runtime sees it. Without one, the node decides alone.
pub trait Registry: std::fmt::Debug + Send + Sync {
    /// A VE is about to be created here.
    fn register(&self, entry: Entry) -> BoxFuture<'_, Result<(), RegistryError>>;
    /// A VE is about to get another name, other addresses or another configuration.
    fn update(&self, entry: Entry) -> BoxFuture<'_, Result<(), RegistryError>>;
    /// A VE is about to be started or has been stopped. Refused if it is not this node's.
    fn set_desired(&self, id: VeId, running: bool) -> BoxFuture<'_, Result<(), RegistryError>>;
    /// A VE is about to be destroyed.
    fn unregister(&self, id: VeId) -> BoxFuture<'_, Result<(), RegistryError>>;
}
