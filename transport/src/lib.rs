//! Messages and bulk data between the nodes of one cluster, over QUIC with mutual TLS 1.3.
//!
//! Promises:
//! - Both ends of every connection hold a certificate of the same cluster authority; a peer that
//!   does not is refused by name ([`ConnectError::NotOfThisCluster`]). The one exception is a
//!   node that joins: it has no certificate yet, checks the cluster by the fingerprint in its
//!   token, and may send exactly one request.
//! - Both ends speak a common protocol version, agreed before the first message.
//! - Memory is bounded on both ends by flow control, and control messages never wait behind
//!   bulk data: they travel on a connection of their own.
//! - A peer that died is noticed within [`Timing::idle`].
//!
//! The only crate that names quinn.
#![forbid(unsafe_code)]

mod accept;
pub mod bare;
mod endpoint;
mod error;
mod frame;
mod hello;
mod identity;
mod join;
pub mod link;
mod peer;
mod reset;
mod socket;
mod tls;
mod token;
mod tuning;

pub use endpoint::{
    CallHandler, Endpoint, EndpointConfig, Gate, JoinHandler, LinkHandler, Service,
};
pub use error::{BindError, CallError, ConnectError, LinkError};
pub use hello::{Refusal, Versions};
pub use identity::{Authority, Fingerprint, Identity, IdentityError, NodeId, SigningRequest};
pub use join::{JoinError, request_join};
pub use link::{Bulk, BulkReceiver, BulkSender, Control, ControlReceiver, ControlSender, Link};
pub use peer::{Peer, PeerInfo};
pub use token::{JoinToken, TokenError};
pub use tuning::Timing;
