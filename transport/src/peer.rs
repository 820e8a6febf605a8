//! The connecting half: calls and links to another node.

use std::net::SocketAddr;
use std::time::Duration;

use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::sync::{Mutex, watch};

use crate::accept::{Kind, Open, Opened};
use crate::endpoint::{Endpoint, Service};
use crate::error::{CallError, ConnectError, LinkError};
use crate::frame::{self, CONTROL_MAX, HELLO_MAX};
use crate::hello::{self, Hello, Purpose, Refusal, Versions, Welcome};
use crate::identity::{MEMBER, NodeId};
use crate::link::{BulkConnection, Link};
use crate::tls;

/// A member at the other end of a connection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PeerInfo {
    /// Its number, proved by its certificate.
    pub node: NodeId,
    /// What it calls itself.
    pub name: String,
    /// Where it is.
    pub address: SocketAddr,
    /// The protocol version agreed.
    pub version: u16,
}

/// The connection for services to one node, if it stands.
#[derive(Debug, Default)]
pub(crate) struct Slot(Mutex<Option<Standing>>);

#[derive(Debug, Clone)]
struct Standing {
    connection: quinn::Connection,
    peer: PeerInfo,
}

/// Another node. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Peer {
    endpoint: Endpoint,
    node: NodeId,
    address: SocketAddr,
    slot: std::sync::Arc<Slot>,
}

impl Peer {
    pub(crate) fn new(
        endpoint: Endpoint,
        node: NodeId,
        address: SocketAddr,
        slot: std::sync::Arc<Slot>,
    ) -> Self {
        Self { endpoint, node, address, slot }
    }

    /// The node.
    pub fn node(&self) -> NodeId {
        self.node
    }

    /// Makes sure that the node can be reached, and says what it says about itself.
    pub async fn connect(&self) -> Result<PeerInfo, ConnectError> {
        Ok(self.standing().await?.peer)
    }

    /// Asks the node one thing and waits for the answer.
    pub async fn call<Q, A>(
        &self,
        service: Service,
        request: &Q,
        patience: Duration,
    ) -> Result<A, CallError>
    where
        Q: Serialize,
        A: DeserializeOwned,
    {
        let request = ckpt_format::codec::encode(request);
        let answer = self.call_bytes(service, request, patience).await?;
        frame::decode(&answer).map_err(|source| CallError::InDoubt { node: self.node, source })
    }

    /// [`Peer::call`] with a request and an answer already encoded.
    pub async fn call_bytes(
        &self,
        service: Service,
        request: Vec<u8>,
        patience: Duration,
    ) -> Result<Vec<u8>, CallError> {
        let node = self.node;
        tokio::time::timeout(patience, self.ask(service, request))
            .await
            .unwrap_or(Err(CallError::TimedOut { node, waited: patience }))
    }

    async fn ask(&self, service: Service, request: Vec<u8>) -> Result<Vec<u8>, CallError> {
        let node = self.node;
        let standing =
            self.standing().await.map_err(|source| CallError::Connect { node, source })?;
        let exchange = async {
            let (mut send, mut recv) = standing
                .connection
                .open_bi()
                .await
                .map_err(|error| frame::connection_error(&error))?;
            frame::write_message(&mut send, &Open { service, kind: Kind::Call }, HELLO_MAX).await?;
            frame::write(&mut send, request.into(), CONTROL_MAX).await?;
            match frame::read_message(&mut recv, HELLO_MAX).await? {
                Opened::NoService => Ok(None),
                Opened::Ready => {
                    frame::read_data(&mut recv, CONTROL_MAX).await.map(|bytes| Some(bytes.to_vec()))
                }
            }
        };
        match exchange.await {
            Ok(Some(answer)) => Ok(answer),
            Ok(None) => Err(CallError::NoService { node }),
            Err(source) => Err(CallError::InDoubt { node, source }),
        }
    }

    /// Opens a link to a service of the node.
    pub async fn link(&self, service: Service) -> Result<Link, CallError> {
        match self.open_link(service).await {
            // The connection was that of a daemon which is no more: a restart is noticed only when
            // something is sent. Nothing was asked yet, so nothing can happen twice.
            Err(CallError::InDoubt { source: LinkError::Lost { .. }, .. }) => {
                self.open_link(service).await
            }
            opened => opened,
        }
    }

    async fn open_link(&self, service: Service) -> Result<Link, CallError> {
        let node = self.node;
        let refused = |source| CallError::Connect { node, source };
        let standing = self.standing().await.map_err(refused)?;
        let session: u128 = rand::random();
        let open = async {
            let (mut send, mut recv) = standing
                .connection
                .open_bi()
                .await
                .map_err(|error| frame::connection_error(&error))?;
            let open = Open { service, kind: Kind::Link { session } };
            frame::write_message(&mut send, &open, HELLO_MAX).await?;
            let opened: Opened = frame::read_message(&mut recv, HELLO_MAX).await?;
            Ok::<_, LinkError>((send, recv, opened))
        };
        let (send, recv, opened) =
            open.await.map_err(|source| CallError::InDoubt { node, source })?;
        if matches!(opened, Opened::NoService) {
            return Err(CallError::NoService { node });
        }
        let bulk = self.dial(Purpose::Bulk { session }).await.map_err(refused)?;
        let (_, receiver) = watch::channel(Some(bulk.connection));
        Ok(Link::quic(send, recv, BulkConnection::new(receiver), standing.peer.version))
    }

    /// The connection for services, made if there is none.
    async fn standing(&self) -> Result<Standing, ConnectError> {
        let mut slot = self.slot.0.lock().await;
        if let Some(standing) = slot.as_ref() {
            let moved = standing.connection.remote_address() != self.address;
            if standing.connection.close_reason().is_none() && !moved {
                return Ok(standing.clone());
            }
        }
        *slot = None;
        let standing = self.dial(Purpose::Services).await?;
        Ok(slot.insert(standing).clone())
    }

    async fn dial(&self, purpose: Purpose) -> Result<Standing, ConnectError> {
        let inner = &self.endpoint.0;
        let address = self.address;
        let patience = inner.timing.connect;
        let hello = Hello { purpose, node: Some(inner.identity.node()), name: inner.name.clone() };
        let dialed =
            dial(&inner.quic, inner.client.clone(), address, inner.versions, &hello, patience);
        let dialed = dialed.await?;
        let found = dialed.node;
        if found != self.node || !dialed.proves(found) {
            return Err(ConnectError::WrongNode { address, expected: self.node, found });
        }
        let peer = PeerInfo { node: found, name: dialed.name, address, version: dialed.version };
        Ok(Standing { connection: dialed.connection, peer })
    }
}

/// A connection on which the hello was answered well.
pub(crate) struct Dialed {
    pub(crate) connection: quinn::Connection,
    pub(crate) send: quinn::SendStream,
    pub(crate) recv: quinn::RecvStream,
    node: NodeId,
    name: String,
    version: u16,
}

impl Dialed {
    fn proves(&self, node: NodeId) -> bool {
        use rustls::pki_types::CertificateDer;
        self.connection
            .peer_identity()
            .and_then(|identity| identity.downcast::<Vec<CertificateDer<'static>>>().ok())
            .and_then(|certificates| certificates.first().cloned())
            .is_some_and(|certificate| tls::names_node(&certificate, node))
    }
}

/// Connects and says hello.
pub(crate) async fn dial(
    quic: &quinn::Endpoint,
    config: quinn::ClientConfig,
    address: SocketAddr,
    versions: Versions,
    hello: &Hello,
    patience: Duration,
) -> Result<Dialed, ConnectError> {
    let attempt = async {
        let connecting = quic
            .connect_with(config, address, MEMBER)
            .map_err(|error| ConnectError::Broken { address, cause: error.to_string() })?;
        let connection = connecting.await.map_err(|error| explain(address, patience, &error))?;
        greet(connection, address, versions, hello, patience).await
    };
    tokio::time::timeout(patience, attempt)
        .await
        .unwrap_or(Err(ConnectError::Unreachable { address, waited: patience }))
}

async fn greet(
    connection: quinn::Connection,
    address: SocketAddr,
    versions: Versions,
    hello: &Hello,
    patience: Duration,
) -> Result<Dialed, ConnectError> {
    let exchange = async {
        let (mut send, mut recv) =
            connection.open_bi().await.map_err(|error| frame::connection_error(&error))?;
        frame::write(&mut send, hello::seal(versions, hello).into(), HELLO_MAX).await?;
        let bytes = frame::read_data(&mut recv, HELLO_MAX).await?;
        Ok::<_, LinkError>((send, recv, bytes))
    };
    let (send, recv, bytes) = match exchange.await {
        Ok(parts) => parts,
        // With TLS 1.3 the peer judges our certificate after our side of the handshake is done.
        Err(cause) => {
            return Err(match connection.close_reason() {
                Some(reason) => explain(address, patience, &reason),
                None => ConnectError::Broken { address, cause: cause.to_string() },
            });
        }
    };
    let foreign = |_| ConnectError::Foreign { address };
    let (theirs, body) = hello::unseal(&bytes).map_err(foreign)?;
    if versions.common(theirs).is_none() {
        return Err(ConnectError::Version { address, ours: versions, theirs });
    }
    match frame::decode::<Welcome>(body).map_err(foreign)? {
        Welcome::Accepted { version, node, name } => {
            Ok(Dialed { connection, send, recv, node, name, version })
        }
        Welcome::Refused(Refusal::Version) => {
            Err(ConnectError::Version { address, ours: versions, theirs })
        }
        Welcome::Refused(refusal) => Err(ConnectError::Refused { address, refusal }),
    }
}

/// What the end of a connection under construction means.
fn explain(address: SocketAddr, waited: Duration, error: &quinn::ConnectionError) -> ConnectError {
    /// TLS alerts by number: a certificate that is bad, unknown, of an unknown authority, or
    /// whose signature does not hold.
    const CERTIFICATE: [u8; 4] = [42, 46, 48, 51];
    /// TLS alert: no application protocol in common.
    const PROTOCOL: u8 = 120;
    let code = match error {
        quinn::ConnectionError::TransportError(error) => error.code,
        quinn::ConnectionError::ConnectionClosed(close) => close.error_code,
        quinn::ConnectionError::TimedOut => {
            return ConnectError::Unreachable { address, waited };
        }
        quinn::ConnectionError::VersionMismatch => return ConnectError::Foreign { address },
        other => return ConnectError::Broken { address, cause: other.to_string() },
    };
    let is = |alert: &u8| code == quinn::TransportErrorCode::crypto(*alert);
    if CERTIFICATE.iter().any(is) {
        ConnectError::NotOfThisCluster { address }
    } else if is(&PROTOCOL) {
        ConnectError::Foreign { address }
    } else {
        ConnectError::Broken { address, cause: error.to_string() }
    }
}
