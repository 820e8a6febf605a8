//! The replicated log: openraft over the transport, on a crash-safe store. The only module that
//! names openraft or redb.

mod disk;
mod log_store;
mod machine;
mod network;
mod node;
mod types;

pub(crate) use network::Peers;
pub(crate) use node::{Node, NodeConfig, NodeError, Written};
