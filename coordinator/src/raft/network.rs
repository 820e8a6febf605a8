//! openraft's messages between nodes, over the transport.

use std::future::Future;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use futures_util::FutureExt as _;
use futures_util::future::BoxFuture;
use openraft::OptionalSend;
use openraft::errors::{NetworkError, RPCError, ReplicationClosed, StreamingError, Unreachable};
use openraft::network::{RPCOption, RaftNetworkFactory, RaftNetworkV2};
use openraft::raft::{
    AppendEntriesRequest, AppendEntriesResponse, SnapshotResponse, TransferLeaderRequest,
    TransferLeaderResponse, VoteRequest, VoteResponse,
};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use tokio::sync::watch;
use transport::{CallError, CallHandler, Endpoint, NodeId, Peer, PeerInfo, Service};

use super::types::{Raft, Snapshot, SnapshotMeta, TypeConfig, Vote, decode, encode};
use crate::core::State;

/// A snapshot is given this long, whatever a heartbeat may take.
const SNAPSHOT_PATIENCE: Duration = Duration::from_secs(30);

/// A message, as it goes over the wire.
#[derive(Serialize, Deserialize)]
enum Message {
    Append(AppendEntriesRequest<TypeConfig>),
    Vote(VoteRequest<TypeConfig>),
    PreVote(VoteRequest<TypeConfig>),
    Snapshot { vote: Vote, meta: SnapshotMeta, text: String },
    TransferLeader(TransferLeaderRequest<TypeConfig>),
}

/// The way to the other nodes: an endpoint, once there is one, and their addresses as the state
/// has them.
#[derive(Debug, Clone)]
pub(crate) struct Peers {
    pub(crate) endpoint: Arc<RwLock<Option<Endpoint>>>,
    pub(crate) states: watch::Receiver<Arc<State>>,
}

/// A node that cannot be called.
#[derive(Debug, thiserror::Error)]
pub(crate) enum NoPeer {
    /// This node has no endpoint: it is the only one.
    #[error("this node does not listen for others")]
    NotListening,
    /// The state does not say where the node is.
    #[error("the address of node {node} is not known")]
    NoAddress {
        /// Which.
        node: NodeId,
    },
}

impl Peers {
    /// The endpoint, once there is one.
    pub(crate) fn endpoint(&self) -> Option<Endpoint> {
        self.endpoint.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The way to one node.
    pub(crate) fn peer(&self, node: NodeId) -> Result<Peer, NoPeer> {
        let endpoint = self.endpoint().ok_or(NoPeer::NotListening)?;
        let address = self.states.borrow().nodes.get(&node).and_then(|facts| facts.address);
        Ok(endpoint.peer(node, address.ok_or(NoPeer::NoAddress { node })?))
    }
}

impl RaftNetworkFactory<TypeConfig> for Peers {
    type Network = Client;

    async fn new_client(&mut self, target: u64, _node: &openraft::EmptyNode) -> Client {
        Client { peers: self.clone(), target: NodeId(target) }
    }
}

/// Sends messages to one node.
#[derive(Debug)]
pub(crate) struct Client {
    peers: Peers,
    target: NodeId,
}

impl Client {
    async fn send<T: DeserializeOwned>(
        &self,
        message: &Message,
        patience: Duration,
    ) -> Result<T, RPCError<TypeConfig>> {
        let peer = self.peers.peer(self.target).map_err(|error| Unreachable::new(&error))?;
        match peer.call_bytes(Service::Raft, encode(message), patience).await {
            Ok(bytes) => {
                let answer: Result<T, String> =
                    decode(&bytes).map_err(|error| NetworkError::new(&error))?;
                answer.map_err(|cause| NetworkError::from_string(cause).into())
            }
            // Backs off: there is nobody.
            Err(error @ (CallError::Connect { .. } | CallError::NoService { .. })) => {
                Err(Unreachable::new(&error).into())
            }
            Err(error) => Err(NetworkError::new(&error).into()),
        }
    }
}

impl RaftNetworkV2<TypeConfig> for Client {
    type SnapshotData = String;

    async fn append_entries(
        &mut self,
        rpc: AppendEntriesRequest<TypeConfig>,
        option: RPCOption,
    ) -> Result<AppendEntriesResponse<TypeConfig>, RPCError<TypeConfig>> {
        self.send(&Message::Append(rpc), option.hard_ttl()).await
    }

    async fn vote(
        &mut self,
        rpc: VoteRequest<TypeConfig>,
        option: RPCOption,
    ) -> Result<VoteResponse<TypeConfig>, RPCError<TypeConfig>> {
        self.send(&Message::Vote(rpc), option.hard_ttl()).await
    }

    async fn pre_vote(
        &mut self,
        rpc: VoteRequest<TypeConfig>,
        option: RPCOption,
    ) -> Result<VoteResponse<TypeConfig>, RPCError<TypeConfig>> {
        self.send(&Message::PreVote(rpc), option.hard_ttl()).await
    }

    async fn full_snapshot(
        &mut self,
        vote: Vote,
        snapshot: Snapshot,
        cancel: impl Future<Output = ReplicationClosed> + OptionalSend + 'static,
        _option: RPCOption,
    ) -> Result<SnapshotResponse<TypeConfig>, StreamingError<TypeConfig>> {
        let message = Message::Snapshot { vote, meta: snapshot.meta, text: snapshot.snapshot };
        tokio::select! {
            answer = self.send(&message, SNAPSHOT_PATIENCE) => Ok(answer?),
            closed = cancel => Err(closed.into()),
        }
    }

    async fn transfer_leader(
        &mut self,
        request: TransferLeaderRequest<TypeConfig>,
        option: RPCOption,
    ) -> Result<TransferLeaderResponse<TypeConfig>, RPCError<TypeConfig>> {
        self.send(&Message::TransferLeader(request), option.hard_ttl()).await
    }
}

/// Hands messages from other nodes to openraft.
pub(crate) struct Server(pub(crate) Raft);

impl CallHandler for Server {
    fn call(&self, _peer: PeerInfo, request: Vec<u8>) -> BoxFuture<'static, Vec<u8>> {
        let raft = self.0.clone();
        async move {
            match decode(&request) {
                Ok(message) => answer(&raft, message).await,
                Err(error) => refusal(&error),
            }
        }
        .boxed()
    }
}

async fn answer(raft: &Raft, message: Message) -> Vec<u8> {
    match message {
        Message::Append(rpc) => reply(raft.append_entries(rpc).await),
        Message::Vote(rpc) => reply(raft.vote(rpc).await),
        Message::PreVote(rpc) => reply(raft.pre_vote(rpc).await),
        Message::Snapshot { vote, meta, text } => {
            reply(raft.install_full_snapshot(vote, Snapshot { meta, snapshot: text }).await)
        }
        Message::TransferLeader(request) => reply(raft.handle_transfer_leader(request).await),
    }
}

fn reply<T: Serialize, E: std::fmt::Display>(result: Result<T, E>) -> Vec<u8> {
    encode(&result.map_err(|error| error.to_string()))
}

fn refusal(error: &dyn std::fmt::Display) -> Vec<u8> {
    encode(&Err::<(), String>(error.to_string()))
}
