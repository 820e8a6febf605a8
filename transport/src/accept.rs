//! The listening half: who comes in, what they want, and who serves it.

use std::collections::HashMap;
use std::sync::{Arc, PoisonError, RwLock, Weak};

use rustls::pki_types::CertificateDer;
use serde::{Deserialize, Serialize};
use tokio::sync::watch;

use crate::endpoint::{Inner, Service};
use crate::error::LinkError;
use crate::frame::{self, CONTROL_MAX, HELLO_MAX};
use crate::hello::{self, Hello, Purpose, Refusal, Welcome};
use crate::identity::NodeId;
use crate::link::{BulkConnection, Link};
use crate::peer::PeerInfo;
use crate::tls;

/// The largest answer to a request to join, and the largest request, in bytes.
pub(crate) const JOIN_MAX: usize = 64 << 10;

/// Why a standing connection is closed: the peer was removed from the cluster.
const REMOVED: u32 = 1;

/// The first frame of a stream on a connection for services.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub(crate) struct Open {
    pub(crate) service: Service,
    pub(crate) kind: Kind,
}

#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub(crate) enum Kind {
    /// The request follows as a frame, the answer comes back as one.
    Call,
    /// The stream is the control stream of a link.
    Link { session: u128 },
}

/// The first frame back.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub(crate) enum Opened {
    Ready,
    NoService,
}

/// Accepts connections until the endpoint closes.
pub(crate) async fn run(endpoint: Weak<Inner>, quic: quinn::Endpoint) {
    while let Some(incoming) = quic.accept().await {
        let Some(endpoint) = endpoint.upgrade() else { return };
        tokio::spawn(async move {
            let address = incoming.remote_address();
            let patience = endpoint.timing.connect;
            match tokio::time::timeout(patience, greet(&endpoint, incoming)).await {
                Ok(Ok(Some(guest))) => serve(endpoint, guest).await,
                Ok(Ok(None)) => {}
                Ok(Err(cause)) => tracing::warn!(%address, %cause, "connection refused"),
                Err(_) => tracing::warn!(%address, "connection refused: no hello in time"),
            }
        });
    }
}

/// A member that was let in.
struct Guest {
    connection: quinn::Connection,
    peer: PeerInfo,
}

/// Reads the hello and answers it. `None` if there is nothing more to do here.
async fn greet(
    endpoint: &Arc<Inner>,
    incoming: quinn::Incoming,
) -> Result<Option<Guest>, LinkError> {
    let connection = incoming.await.map_err(|error| frame::connection_error(&error))?;
    let (mut send, mut recv) =
        connection.accept_bi().await.map_err(|error| frame::connection_error(&error))?;
    let bytes = frame::read_data(&mut recv, HELLO_MAX).await?;
    let (theirs, body) = hello::unseal(&bytes)?;
    let verdict = match endpoint.versions.common(theirs) {
        None => Err(Refusal::Version),
        Some(version) => {
            let hello: Hello = frame::decode(body)?;
            check(endpoint, &connection, &hello).map(|()| (version, hello))
        }
    };
    let welcome = match &verdict {
        Ok((version, _)) => Welcome::Accepted {
            version: *version,
            node: endpoint.identity.node(),
            name: endpoint.name.clone(),
        },
        Err(refusal) => Welcome::Refused(refusal.clone()),
    };
    let sealed = hello::seal(endpoint.versions, &welcome);
    frame::write(&mut send, sealed.into(), HELLO_MAX).await?;
    let (version, hello) = match verdict {
        Ok(accepted) => accepted,
        Err(refusal) => {
            // The peer closes the connection once it has read why.
            let address = connection.remote_address();
            tracing::warn!(%address, %refusal, "connection refused");
            let _ = send.finish();
            connection.closed().await;
            return Ok(None);
        }
    };
    match (hello.purpose, hello.node) {
        (Purpose::Join, _) => answer_join(endpoint, &connection, send, recv).await.map(|()| None),
        (Purpose::Services, Some(node)) => {
            let address = connection.remote_address();
            let peer = PeerInfo { node, name: hello.name, address, version };
            Ok(Some(Guest { connection, peer }))
        }
        (Purpose::Bulk { session }, Some(node)) => {
            attach(endpoint, node, session, connection);
            Ok(None)
        }
        (_, None) => Err(LinkError::Unintelligible),
    }
}

/// Whether the peer may do what it came for.
fn check(endpoint: &Inner, connection: &quinn::Connection, hello: &Hello) -> Result<(), Refusal> {
    if hello.purpose == Purpose::Join {
        let join = endpoint.join.read().unwrap_or_else(PoisonError::into_inner);
        return if join.is_some() { Ok(()) } else { Err(Refusal::NoJoin) };
    }
    let node = hello.node.ok_or(Refusal::Identity)?;
    // The handshake has proved that the certificates, if any, are of this cluster.
    let certificates = connection
        .peer_identity()
        .and_then(|identity| identity.downcast::<Vec<CertificateDer<'static>>>().ok())
        .ok_or(Refusal::Identity)?;
    if !certificates.first().is_some_and(|certificate| tls::names_node(certificate, node)) {
        return Err(Refusal::Identity);
    }
    if is_removed(endpoint, node) {
        return Err(Refusal::Removed);
    }
    match hello.purpose {
        Purpose::Bulk { session } if !knows_session(endpoint, node, session) => {
            Err(Refusal::Session)
        }
        _ => Ok(()),
    }
}

fn is_removed(endpoint: &Inner, node: NodeId) -> bool {
    let gate = endpoint.gate.read().unwrap_or_else(PoisonError::into_inner).clone();
    gate.is_some_and(|gate| gate.is_removed(node))
}

fn knows_session(endpoint: &Inner, node: NodeId, session: u128) -> bool {
    let sessions = endpoint.sessions.lock().unwrap_or_else(PoisonError::into_inner);
    sessions.contains_key(&(node, session))
}

/// Gives a link the connection for its bulk streams.
fn attach(endpoint: &Inner, node: NodeId, session: u128, connection: quinn::Connection) {
    let mut sessions = endpoint.sessions.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(waiting) = sessions.remove(&(node, session)) {
        waiting.send_replace(Some(connection));
    }
}

async fn answer_join(
    endpoint: &Inner,
    connection: &quinn::Connection,
    mut send: quinn::SendStream,
    mut recv: quinn::RecvStream,
) -> Result<(), LinkError> {
    let request = frame::read_data(&mut recv, JOIN_MAX).await?;
    let handler = endpoint.join.read().unwrap_or_else(PoisonError::into_inner).clone();
    let Some(handler) = handler else { return Ok(()) };
    let address = connection.remote_address();
    // The answer takes a decision of the cluster; it may outlast the patience for a hello.
    let connection = connection.clone();
    tokio::spawn(async move {
        let answer = handler.join(address, request.to_vec()).await;
        let sent = frame::write(&mut send, answer.into(), JOIN_MAX).await;
        let _ = send.finish();
        if let Err(cause) = sent {
            tracing::warn!(%address, %cause, "the answer to a request to join is lost");
        }
        connection.closed().await;
    });
    Ok(())
}

/// Serves the streams of one member until its connection ends.
async fn serve(endpoint: Arc<Inner>, guest: Guest) {
    let endpoint = Arc::downgrade(&endpoint);
    while let Ok((send, recv)) = guest.connection.accept_bi().await {
        let Some(endpoint) = endpoint.upgrade() else { return };
        if is_removed(&endpoint, guest.peer.node) {
            // It was a member when it connected.
            guest.connection.close(REMOVED.into(), Refusal::Removed.to_string().as_bytes());
            return;
        }
        let peer = guest.peer.clone();
        tokio::spawn(async move {
            let node = peer.node;
            if let Err(cause) = serve_stream(endpoint, peer, send, recv).await {
                tracing::debug!(%node, %cause, "a stream ended early");
            }
        });
    }
}

async fn serve_stream(
    endpoint: Arc<Inner>,
    peer: PeerInfo,
    mut send: quinn::SendStream,
    mut recv: quinn::RecvStream,
) -> Result<(), LinkError> {
    let open: Open = frame::read_message(&mut recv, HELLO_MAX).await?;
    match open.kind {
        Kind::Call => {
            let Some(handler) = find(&endpoint.calls, open.service) else {
                return refuse(&mut send).await;
            };
            drop(endpoint);
            let request = frame::read_data(&mut recv, CONTROL_MAX).await?;
            let answer = tokio::select! {
                answer = handler.call(peer, request.to_vec()) => answer,
                _ = send.stopped() => return Err(LinkError::Closed),
            };
            frame::write_message(&mut send, &Opened::Ready, HELLO_MAX).await?;
            frame::write(&mut send, answer.into(), CONTROL_MAX).await?;
            let _ = send.finish();
            Ok(())
        }
        Kind::Link { session } => {
            let Some(handler) = find(&endpoint.links, open.service) else {
                return refuse(&mut send).await;
            };
            serve_link(endpoint, peer, session, handler, send, recv).await
        }
    }
}

/// A lock is never held across a wait: the handler is taken out of the table.
fn find<H: ?Sized>(table: &RwLock<HashMap<Service, Arc<H>>>, service: Service) -> Option<Arc<H>> {
    table.read().unwrap_or_else(PoisonError::into_inner).get(&service).cloned()
}

async fn refuse(send: &mut quinn::SendStream) -> Result<(), LinkError> {
    frame::write_message(send, &Opened::NoService, HELLO_MAX).await?;
    let _ = send.finish();
    Ok(())
}

async fn serve_link(
    endpoint: Arc<Inner>,
    peer: PeerInfo,
    session: u128,
    handler: Arc<dyn crate::LinkHandler>,
    mut send: quinn::SendStream,
    recv: quinn::RecvStream,
) -> Result<(), LinkError> {
    let (sender, receiver) = watch::channel(None);
    let key = (peer.node, session);
    {
        let mut sessions = endpoint.sessions.lock().unwrap_or_else(PoisonError::into_inner);
        // Links that ended before their bulk connection came.
        sessions.retain(|_, waiting| !waiting.is_closed());
        sessions.insert(key, sender);
    }
    drop(endpoint);
    frame::write_message(&mut send, &Opened::Ready, HELLO_MAX).await?;
    let link = Link::quic(send, recv, BulkConnection::new(receiver), peer.version);
    handler.serve(peer, link).await;
    Ok(())
}
