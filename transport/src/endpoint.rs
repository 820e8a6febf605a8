//! A node's door to the others: one UDP socket, the services behind it, the peers known.

use std::collections::HashMap;
use std::fmt;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::Duration;

use futures_util::future::BoxFuture;
use serde::{Deserialize, Serialize};
use tokio::sync::watch;

use crate::error::BindError;
use crate::hello::Versions;
use crate::identity::{Identity, NodeId};
use crate::link::Link;
use crate::peer::{Peer, PeerInfo, Slot};
use crate::tuning::Timing;
use crate::{accept, reset, socket, tls, tuning};

/// What a stream is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[non_exhaustive]
pub enum Service {
    /// Messages of the ownership log.
    Raft,
    /// Commands on their way to the leader of the log.
    Coordinator,
    /// Questions about a node: is it there, what does it run.
    Status,
    /// Virtual Environments on the move.
    Migration,
    /// For tests of the transport itself.
    Test,
    /// Pages of Virtual Environments that run elsewhere already.
    Pages,
}

/// Answers calls: one request, one answer.
pub trait CallHandler: Send + Sync + 'static {
    /// Answers one call. Dropped when the caller goes away.
    fn call(&self, peer: PeerInfo, request: Vec<u8>) -> BoxFuture<'static, Vec<u8>>;
}

/// Serves links.
pub trait LinkHandler: Send + Sync + 'static {
    /// Serves one link to its end, in a task of its own.
    fn serve(&self, peer: PeerInfo, link: Link) -> BoxFuture<'static, ()>;
}

/// Answers requests to join, the only thing a stranger may ask.
pub trait JoinHandler: Send + Sync + 'static {
    /// Answers one request.
    fn join(&self, address: SocketAddr, request: Vec<u8>) -> BoxFuture<'static, Vec<u8>>;
}

/// Knows which certified nodes are members no more.
pub trait Gate: Send + Sync + 'static {
    /// Whether `node` was removed from the cluster.
    fn is_removed(&self, node: NodeId) -> bool;
}

/// How an endpoint is set up.
#[derive(Debug)]
pub struct EndpointConfig {
    /// Where to listen. Port 0 takes any.
    pub listen: SocketAddr,
    /// Who we are.
    pub identity: Identity,
    /// What people call us.
    pub name: String,
    /// The protocol versions we speak.
    pub versions: Versions,
    /// How quickly a dead peer is noticed.
    pub timing: Timing,
}

/// Where a link waits for the connection of its bulk streams.
pub(crate) type BulkSlot = watch::Sender<Option<quinn::Connection>>;

/// A node's door to the others. Cheap to clone.
#[derive(Clone)]
pub struct Endpoint(pub(crate) Arc<Inner>);

pub(crate) struct Inner {
    pub(crate) quic: quinn::Endpoint,
    pub(crate) client: quinn::ClientConfig,
    pub(crate) identity: Identity,
    pub(crate) name: String,
    pub(crate) versions: Versions,
    pub(crate) timing: Timing,
    pub(crate) calls: RwLock<HashMap<Service, Arc<dyn CallHandler>>>,
    pub(crate) links: RwLock<HashMap<Service, Arc<dyn LinkHandler>>>,
    pub(crate) join: RwLock<Option<Arc<dyn JoinHandler>>>,
    pub(crate) gate: RwLock<Option<Arc<dyn Gate>>>,
    pub(crate) slots: Mutex<HashMap<NodeId, Arc<Slot>>>,
    pub(crate) sessions: Mutex<HashMap<(NodeId, u128), BulkSlot>>,
}

impl fmt::Debug for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Endpoint")
            .field("node", &self.0.identity.node())
            .field("name", &self.0.name)
            .finish_non_exhaustive()
    }
}

impl Endpoint {
    /// Opens the socket and begins to accept connections. Must be called inside a runtime.
    pub fn bind(config: EndpointConfig) -> Result<Self, BindError> {
        let mut server = quinn::ServerConfig::with_crypto(Arc::new(tls::server(&config.identity)?));
        server.transport_config(tuning::services(config.timing)).migration(false);
        let mut client = quinn::ClientConfig::new(Arc::new(tls::client(&config.identity)?));
        client.transport_config(tuning::services(config.timing));
        let failed = |source| BindError::Socket { address: config.listen, source };
        let quic = quinn::Endpoint::new(
            reset::endpoint_config(&config.identity),
            Some(server),
            socket::open(config.listen).map_err(failed)?,
            Arc::new(quinn::TokioRuntime),
        )
        .map_err(failed)?;
        let endpoint = Self(Arc::new(Inner {
            quic,
            client,
            identity: config.identity,
            name: config.name,
            versions: config.versions,
            timing: config.timing,
            calls: RwLock::default(),
            links: RwLock::default(),
            join: RwLock::default(),
            gate: RwLock::default(),
            slots: Mutex::default(),
            sessions: Mutex::default(),
        }));
        tokio::spawn(accept::run(Arc::downgrade(&endpoint.0), endpoint.0.quic.clone()));
        Ok(endpoint)
    }

    /// The node we are.
    pub fn node(&self) -> NodeId {
        self.0.identity.node()
    }

    /// Who we can prove to be.
    pub fn identity(&self) -> &Identity {
        &self.0.identity
    }

    /// Where we listen.
    pub fn address(&self) -> std::io::Result<SocketAddr> {
        self.0.quic.local_addr()
    }

    /// Answers calls of `service` with `handler` from now on.
    pub fn on_call(&self, service: Service, handler: Arc<dyn CallHandler>) {
        self.0.calls.write().unwrap_or_else(PoisonError::into_inner).insert(service, handler);
    }

    /// Serves links of `service` with `handler` from now on.
    pub fn on_link(&self, service: Service, handler: Arc<dyn LinkHandler>) {
        self.0.links.write().unwrap_or_else(PoisonError::into_inner).insert(service, handler);
    }

    /// Answers requests to join with `handler` from now on.
    pub fn on_join(&self, handler: Arc<dyn JoinHandler>) {
        *self.0.join.write().unwrap_or_else(PoisonError::into_inner) = Some(handler);
    }

    /// Asks `gate` about nodes that connect from now on.
    pub fn set_gate(&self, gate: Arc<dyn Gate>) {
        *self.0.gate.write().unwrap_or_else(PoisonError::into_inner) = Some(gate);
    }

    /// The peer `node` at `address`. Connects when something is sent, and again when needed.
    pub fn peer(&self, node: NodeId, address: SocketAddr) -> Peer {
        let mut slots = self.0.slots.lock().unwrap_or_else(PoisonError::into_inner);
        Peer::new(self.clone(), node, address, slots.entry(node).or_default().clone())
    }

    /// Closes every connection, tells the peers, and frees the socket. Gives up waiting for
    /// peers that do not answer after `patience`.
    pub async fn shut_down(&self, patience: Duration) {
        self.0.quic.close(0u32.into(), b"shutting down");
        let _ = tokio::time::timeout(patience, self.0.quic.wait_idle()).await;
        // Clones of this endpoint may live on in tasks that have not noticed yet. The library
        // keeps the socket before the current one, so it takes two new ones to free ours.
        for _ in 0..2 {
            let replaced = std::net::UdpSocket::bind((std::net::Ipv4Addr::LOCALHOST, 0))
                .and_then(|socket| self.0.quic.rebind(socket));
            if let Err(error) = replaced {
                tracing::warn!(%error, "the port stays taken until the last stream has ended");
            }
        }
    }
}
