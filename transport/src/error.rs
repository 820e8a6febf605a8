//! What can go wrong between nodes.

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use crate::hello::{Refusal, Versions};
use crate::identity::NodeId;

/// Why an endpoint could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum BindError {
    /// The socket could not be opened or set up.
    #[error("cannot listen on {address}")]
    Socket {
        /// The address wanted.
        address: SocketAddr,
        /// What the system said.
        source: io::Error,
    },
    /// The node's certificate and key do not fit together.
    #[error("the node's certificate cannot be used")]
    Tls(#[from] rustls::Error),
    /// The authority's certificate cannot be used to check others.
    #[error("the authority's certificate cannot be used")]
    Verifier(#[from] rustls::server::VerifierBuilderError),
}

/// Why a node could not be reached.
#[derive(Debug, Clone, thiserror::Error)]
pub enum ConnectError {
    /// Nobody answered in time.
    #[error("{address} does not answer (waited {} ms)", waited.as_millis())]
    Unreachable {
        /// Whom we tried.
        address: SocketAddr,
        /// How long.
        waited: Duration,
    },
    /// The peer's certificate, or ours to it, is of another cluster.
    #[error("{address} is not of this cluster")]
    NotOfThisCluster {
        /// Whom we tried.
        address: SocketAddr,
    },
    /// No common protocol version.
    #[error("{address} speaks protocol {theirs}, this node {ours}")]
    Version {
        /// Whom we tried.
        address: SocketAddr,
        /// What we speak.
        ours: Versions,
        /// What it speaks.
        theirs: Versions,
    },
    /// Something that speaks QUIC but is no node.
    #[error("{address} is not a node, or one of an unknown generation")]
    Foreign {
        /// Whom we tried.
        address: SocketAddr,
    },
    /// Another node answers at this address.
    #[error("{address} is node {found}, not node {expected}")]
    WrongNode {
        /// Whom we tried.
        address: SocketAddr,
        /// Whom we wanted.
        expected: NodeId,
        /// Who answered.
        found: NodeId,
    },
    /// The peer refuses us.
    #[error("{address} refuses the connection: {refusal}")]
    Refused {
        /// Whom we tried.
        address: SocketAddr,
        /// Why.
        refusal: Refusal,
    },
    /// The connection broke while it was made.
    #[error("the connection to {address} broke: {cause}")]
    Broken {
        /// Whom we tried.
        address: SocketAddr,
        /// What the connection said.
        cause: String,
    },
}

/// Why a stream between two nodes ended.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LinkError {
    /// The peer ended the stream, or dropped it half way.
    #[error("the peer closed the stream")]
    Closed,
    /// The peer is gone: no sign of life, or its connection was closed.
    #[error("the connection is lost: {cause}")]
    Lost {
        /// What the connection said.
        cause: String,
    },
    /// A frame is larger than a frame may be.
    #[error("a frame of {bytes} bytes is over the limit of {limit}")]
    TooLarge {
        /// The size claimed.
        bytes: u64,
        /// The most accepted.
        limit: u64,
    },
    /// A frame does not hold the message expected here.
    #[error("a frame does not hold the message expected here")]
    Unintelligible,
}

/// Why a call to another node has no answer.
#[derive(Debug, Clone, thiserror::Error)]
pub enum CallError {
    /// The request never left.
    #[error("cannot reach node {node}")]
    Connect {
        /// Whom we called.
        node: NodeId,
        /// Why.
        source: ConnectError,
    },
    /// The request may or may not have been handled.
    #[error("the answer of node {node} is lost")]
    InDoubt {
        /// Whom we called.
        node: NodeId,
        /// Why.
        source: LinkError,
    },
    /// The request may or may not have been handled.
    #[error("node {node} did not answer within {} ms", waited.as_millis())]
    TimedOut {
        /// Whom we called.
        node: NodeId,
        /// How long.
        waited: Duration,
    },
    /// The peer does not offer this service (yet).
    #[error("node {node} does not offer this service")]
    NoService {
        /// Whom we called.
        node: NodeId,
    },
}
