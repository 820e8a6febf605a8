//! The coordinator as the rest of the daemon sees it.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use futures_util::FutureExt as _;
use futures_util::future::BoxFuture;
use serde::{Deserialize, Serialize};
use tokio::sync::watch;
use tokio::time::Instant;
use transport::{CallError, CallHandler, Endpoint, Gate, NodeId, PeerInfo, Service};

use crate::core::RequestId;
use crate::core::State;
use crate::core::{Answer, Command, Refused, Request, Response};
use crate::raft::{Node, NodeConfig, NodeError, Peers, Written};

/// How long a command is tried by default: long enough for an election and a second one.
const PATIENCE: Duration = Duration::from_secs(15);
/// How long one forwarded attempt may take before the leader is asked for anew.
const ATTEMPT: Duration = Duration::from_secs(3);
/// Between two attempts without any news.
const PAUSE: Duration = Duration::from_millis(100);
/// How often the leader looks after the replicas when nothing changes.
const TEND: Duration = Duration::from_secs(1);

/// How a coordinator is set up.
#[derive(Debug, Clone)]
pub struct CoordinatorConfig {
    /// Where the log is kept.
    pub path: PathBuf,
    /// Who we are.
    pub node: NodeId,
}

/// The coordinator cannot start.
#[derive(Debug, thiserror::Error)]
#[error("cannot start the coordinator")]
pub struct OpenError(#[from] NodeError);

/// Why a command has no answer.
#[derive(Debug, Clone, thiserror::Error)]
pub enum ProposeError {
    /// The log refused it; nothing has changed.
    #[error("refused")]
    Refused(#[from] Refused),
    /// It may have been carried out, or may still be. Send it again under the same id, or look.
    #[error("no answer from the cluster within {} ms; the command may have been carried out", waited.as_millis())]
    InDoubt {
        /// How long we tried.
        waited: Duration,
    },
    /// There was nobody to hand it to; nothing has changed.
    #[error("the cluster has no leader (waited {} ms)", waited.as_millis())]
    NoLeader {
        /// How long we tried.
        waited: Duration,
    },
    /// The local replica has stopped.
    #[error("the coordinator has stopped: {cause}")]
    Stopped {
        /// What it said.
        cause: String,
    },
}

/// The cluster's state could not be confirmed to be the newest.
#[derive(Debug, Clone, thiserror::Error)]
#[error("the cluster did not confirm its state within {} ms", waited.as_millis())]
pub struct ReadError {
    /// How long we tried.
    pub waited: Duration,
}

/// Who leads, as far as this node knows.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Leadership {
    /// The leader.
    pub leader: Option<NodeId>,
    /// Its term.
    pub term: u64,
    /// Who votes.
    pub voters: BTreeSet<NodeId>,
    /// Who only listens.
    pub learners: BTreeSet<NodeId>,
    /// How far this node's replica is.
    pub applied: Option<u64>,
}

/// The cluster's memory of who owns what. Cheap to clone; every clone is the same coordinator.
#[derive(Debug, Clone)]
pub struct Coordinator(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    node: NodeId,
    replica: Node,
    peers: Peers,
    stopping: watch::Sender<bool>,
}

/// What one node asks of another.
#[derive(Debug, Serialize, Deserialize)]
enum Question {
    Write(Request),
    ReadIndex,
}

/// What it hears.
#[derive(Debug, Serialize, Deserialize)]
enum Reply {
    Answered(Answer),
    ReadIndex(Option<u64>),
    NotLeader(Option<NodeId>),
    InDoubt,
}

fn now_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

impl Coordinator {
    /// Starts the replica of this node. Works alone until [`Coordinator::attach`].
    pub async fn open(config: CoordinatorConfig) -> Result<Self, OpenError> {
        let (published, states) = watch::channel(Arc::default());
        let peers = Peers { endpoint: Arc::new(RwLock::new(None)), states };
        let setup =
            NodeConfig { node: config.node, path: config.path, peers: peers.clone(), published };
        let replica = Node::start(setup).await?;
        let (stopping, _) = watch::channel(false);
        let coordinator = Self(Arc::new(Inner { node: config.node, replica, peers, stopping }));
        tokio::spawn(tend(Arc::downgrade(&coordinator.0), coordinator.0.stopping.subscribe()));
        Ok(coordinator)
    }

    /// Makes this node the first of a new log. Does nothing if there is a log already.
    pub async fn initialize(&self) -> Result<(), OpenError> {
        Ok(self.0.replica.initialize(self.0.node).await?)
    }

    /// Talks to the other nodes through `endpoint` from now on.
    pub fn attach(&self, endpoint: &Endpoint) {
        let mut slot = self.0.peers.endpoint.write().unwrap_or_else(PoisonError::into_inner);
        *slot = Some(endpoint.clone());
        drop(slot);
        self.0.replica.serve(endpoint);
        endpoint.on_call(Service::Coordinator, Arc::new(Desk(Arc::downgrade(&self.0))));
        endpoint.set_gate(Arc::new(Members(self.0.peers.states.clone())));
    }

    /// The node we are.
    pub fn node(&self) -> NodeId {
        self.0.node
    }

    /// The state as this node knows it: never wrong about the past, perhaps a moment old.
    pub fn state(&self) -> Arc<State> {
        self.0.peers.states.borrow().clone()
    }

    /// The state, and every later one.
    pub fn watch(&self) -> watch::Receiver<Arc<State>> {
        self.0.peers.states.clone()
    }

    /// Who leads, as far as this node knows.
    pub fn leadership(&self) -> Leadership {
        self.0.replica.leadership()
    }

    /// The way to another node, if this one listens and the state says where that one is.
    pub fn peer(&self, node: NodeId) -> Option<transport::Peer> {
        self.0.peers.peer(node).ok()
    }

    /// Has a command carried out, wherever the leader is.
    pub async fn propose(&self, command: Command) -> Result<Response, ProposeError> {
        self.propose_as(RequestId(rand::random()), command, PATIENCE).await
    }

    /// [`Coordinator::propose`] under an id of the caller's, which may have been used in an
    /// earlier attempt at the same command: it is carried out once at most.
    pub async fn propose_as(
        &self,
        id: RequestId,
        command: Command,
        patience: Duration,
    ) -> Result<Response, ProposeError> {
        let begun = Instant::now();
        let request = Request { id, at_ms: now_ms(), command };
        let mut in_doubt = false;
        while begun.elapsed() < patience {
            let left = patience.saturating_sub(begun.elapsed());
            // A leader that lost its majority keeps a command waiting for ever.
            let attempt = tokio::time::timeout(ATTEMPT.min(left), self.try_once(&request));
            match attempt.await.unwrap_or(Written::InDoubt) {
                Written::Answered(answer) => return Ok(answer?),
                Written::Stopped { cause } => return Err(ProposeError::Stopped { cause }),
                Written::InDoubt => in_doubt = true,
                Written::NotLeader { .. } => {}
            }
            let left = patience.saturating_sub(begun.elapsed());
            self.pause(left).await;
        }
        let waited = begun.elapsed();
        Err(if in_doubt {
            ProposeError::InDoubt { waited }
        } else {
            ProposeError::NoLeader { waited }
        })
    }

    /// Until there is news about the leader, but not long: the news may have been before.
    async fn pause(&self, left: Duration) {
        let changed = self.0.replica.leadership_changed();
        let _ = tokio::time::timeout(PAUSE.min(left), changed).await;
    }

    async fn try_once(&self, request: &Request) -> Written {
        let leader = match self.0.replica.leadership().leader {
            Some(leader) if leader != self.0.node => leader,
            Some(_) => match self.0.lead(request.clone()).await {
                // A leader that has just changed may be asked at once.
                Written::NotLeader { leader: Some(leader) } if leader != self.0.node => leader,
                written => return written,
            },
            None => return Written::NotLeader { leader: None },
        };
        self.forward(leader, request).await
    }

    async fn forward(&self, leader: NodeId, request: &Request) -> Written {
        let Ok(peer) = self.0.peers.peer(leader) else {
            return Written::NotLeader { leader: None };
        };
        let question = Question::Write(request.clone());
        let call = peer.call::<_, Reply>(Service::Coordinator, &question, ATTEMPT);
        let reply = tokio::select! {
            reply = call => reply,
            () = self.other_leader_than(leader) => return Written::InDoubt,
        };
        match reply {
            Ok(Reply::Answered(answer)) => Written::Answered(answer),
            Ok(Reply::NotLeader(leader)) => Written::NotLeader { leader },
            Ok(Reply::InDoubt | Reply::ReadIndex(_)) => Written::InDoubt,
            Err(CallError::Connect { .. } | CallError::NoService { .. }) => {
                Written::NotLeader { leader: None }
            }
            Err(_) => Written::InDoubt,
        }
    }

    /// Returns when another node than `leader` is known to lead.
    async fn other_leader_than(&self, leader: NodeId) {
        while self.0.replica.leadership().leader.is_none_or(|now| now == leader) {
            self.0.replica.leadership_changed().await;
        }
    }

    /// The state with everything in it that was decided before this call.
    pub async fn read(&self) -> Result<Arc<State>, ReadError> {
        let begun = Instant::now();
        while begun.elapsed() < PATIENCE {
            let left = PATIENCE.saturating_sub(begun.elapsed());
            let index = tokio::time::timeout(ATTEMPT.min(left), self.read_index()).await;
            if let Ok(Some(index)) = index
                && self.0.replica.applied(index, left).await
            {
                return Ok(self.state());
            }
            self.pause(left).await;
        }
        Err(ReadError { waited: begun.elapsed() })
    }

    async fn read_index(&self) -> Option<Option<u64>> {
        let leader = self.0.replica.leadership().leader?;
        if leader == self.0.node {
            return self.0.replica.read_index().await.ok();
        }
        let peer = self.0.peers.peer(leader).ok()?;
        match peer.call(Service::Coordinator, &Question::ReadIndex, ATTEMPT).await {
            Ok(Reply::ReadIndex(index)) => Some(index),
            _ => None,
        }
    }

    /// Stops the replica and closes its file.
    pub async fn stop(&self, patience: Duration) {
        self.0.stopping.send_replace(true);
        self.0.replica.stop(patience).await;
    }
}

impl Inner {
    /// Hands a request to the log, if this is the leader; its clock counts.
    async fn lead(&self, mut request: Request) -> Written {
        request.at_ms = now_ms();
        self.replica.write(request).await
    }
}

/// As long as this node leads, keeps the replicas in line with the members.
async fn tend(inner: std::sync::Weak<Inner>, mut stopping: watch::Receiver<bool>) {
    let Some(mut states) = inner.upgrade().map(|inner| inner.peers.states.clone()) else { return };
    loop {
        let Some(strong) = inner.upgrade() else { return };
        let state = states.borrow_and_update().clone();
        let more = match strong.replica.tend_members(&state).await {
            Ok(more) => more,
            Err(error) => {
                tracing::debug!(%error, "the replicas could not be changed; trying again");
                false
            }
        };
        drop(strong);
        let wait = if more { PAUSE } else { TEND };
        tokio::select! {
            changed = states.changed() => if changed.is_err() { return },
            stopped = stopping.wait_for(|stopping| *stopping) => {
                drop(stopped);
                return;
            }
            () = tokio::time::sleep(wait) => {}
        }
    }
}

/// Answers the other nodes.
struct Desk(std::sync::Weak<Inner>);

impl CallHandler for Desk {
    fn call(&self, _peer: PeerInfo, question: Vec<u8>) -> BoxFuture<'static, Vec<u8>> {
        let inner = self.0.upgrade();
        async move {
            let reply = match (inner, ckpt_format::codec::decode(&question)) {
                (Some(inner), Ok(Question::Write(request))) => match inner.lead(request).await {
                    Written::Answered(answer) => Reply::Answered(answer),
                    Written::NotLeader { leader } => Reply::NotLeader(leader),
                    Written::InDoubt => Reply::InDoubt,
                    Written::Stopped { .. } => Reply::NotLeader(None),
                },
                (Some(inner), Ok(Question::ReadIndex)) => match inner.replica.read_index().await {
                    Ok(index) => Reply::ReadIndex(index),
                    Err(leader) => Reply::NotLeader(leader),
                },
                (None, _) | (_, Err(_)) => Reply::NotLeader(None),
            };
            ckpt_format::codec::encode(&reply)
        }
        .boxed()
    }
}

/// Tells the transport who is a member no more.
struct Members(watch::Receiver<Arc<State>>);

impl Gate for Members {
    fn is_removed(&self, node: NodeId) -> bool {
        self.0.borrow().removed.contains_key(&node)
    }
}
