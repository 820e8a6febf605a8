//! One replica of the log, running.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use openraft::errors::{ClientWriteError, LinearizableReadError, RaftError};
use openraft::{ChangeMembers, Config, EmptyNode, ReadPolicy, SnapshotPolicy};
use tokio::sync::{oneshot, watch};
use transport::{Endpoint, NodeId, Service};

use super::disk::StoreError;
use super::log_store::LogStore;
use super::machine::Machine;
use super::network::{Peers, Server};
use super::types::Raft;
use crate::core::State;
use crate::core::{Answer, Request};
use crate::handle::Leadership;

/// Voters at most. More would only make each decision slower.
const VOTERS_MAX: usize = 7;
/// Entries after which the log is condensed.
const SNAPSHOT_EVERY: u64 = 1000;
/// A heartbeat four times a second, an election after one to two seconds without: a machine
/// with two busy cores must not lose its leader to a moment without CPU time.
const HEARTBEAT_MS: u64 = 250;
const ELECTION_MS: (u64, u64) = (1000, 2000);

/// How a replica is set up.
#[derive(Debug)]
pub(crate) struct NodeConfig {
    pub(crate) node: NodeId,
    pub(crate) path: PathBuf,
    pub(crate) peers: Peers,
    pub(crate) published: watch::Sender<Arc<State>>,
}

/// Why a replica cannot run.
#[derive(Debug, thiserror::Error)]
pub enum NodeError {
    /// The store of the log.
    #[error("cannot use the log")]
    Store(#[from] StoreError),
    /// The kept state.
    #[error("the kept state is damaged")]
    Snapshot(#[source] std::io::Error),
    /// openraft has stopped.
    #[error("the replica has stopped: {cause}")]
    Stopped {
        /// What it said.
        cause: String,
    },
}

fn stopped(cause: &dyn std::fmt::Display) -> NodeError {
    NodeError::Stopped { cause: cause.to_string() }
}

/// What became of a request handed to this replica.
#[derive(Debug)]
pub(crate) enum Written {
    /// It is in the log, and this is the answer.
    Answered(Answer),
    /// This is not the leader; nothing was done.
    NotLeader { leader: Option<NodeId> },
    /// It may or may not be carried out.
    InDoubt,
    /// The replica has stopped.
    Stopped { cause: String },
}

/// One replica of the log. Cheap to clone.
#[derive(Clone)]
pub(crate) struct Node {
    raft: Raft,
    peers: Peers,
    closed: Arc<Mutex<Option<oneshot::Receiver<()>>>>,
}

impl std::fmt::Debug for Node {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Node").finish_non_exhaustive()
    }
}

fn config() -> Config {
    Config {
        cluster_name: "ferry".to_owned(),
        heartbeat_interval: HEARTBEAT_MS,
        election_timeout_min: ELECTION_MS.0,
        election_timeout_max: ELECTION_MS.1,
        snapshot_policy: SnapshotPolicy::LogsSinceLast(SNAPSHOT_EVERY),
        max_in_snapshot_log_to_keep: SNAPSHOT_EVERY,
        // The library's queues are made for clusters that do nothing else.
        api_channel_size: Some(1024),
        api_batch_capacity: 256,
        notification_channel_size: Some(1024),
        state_machine_channel_size: Some(256),
        log_stage_capacity: Some(256),
        // A node that comes back must not unseat a leader whom a majority still hears.
        enable_pre_vote: Some(true),
        // A leader that comes back has its log, but only a hint of how much of it was decided: it
        // would answer readers with what was true at the time of the hint. It must be elected
        // anew, and decide an entry of its own first.
        enable_leader_restore: Some(false),
        ..Config::default()
    }
}

impl Node {
    /// Starts the replica from what the disk holds.
    pub(crate) async fn start(setup: NodeConfig) -> Result<Self, NodeError> {
        let opened = LogStore::open(&setup.path)?;
        let writer = opened.log.writer.clone();
        let machine =
            Machine::open(opened.snapshot, setup.published, writer).map_err(NodeError::Snapshot)?;
        let config = config().validate().map_err(|error| stopped(&error))?;
        let raft =
            Raft::new(setup.node.0, Arc::new(config), setup.peers.clone(), opened.log, machine)
                .await
                .map_err(|error| stopped(&error))?;
        let closed = Arc::new(Mutex::new(Some(opened.closed)));
        let node = Self { raft, peers: setup.peers, closed };
        if let Some(endpoint) = node.peers.endpoint() {
            node.serve(&endpoint);
        }
        Ok(node)
    }

    /// Takes messages of other replicas from now on.
    pub(crate) fn serve(&self, endpoint: &Endpoint) {
        endpoint.on_call(Service::Raft, Arc::new(Server(self.raft.clone())));
    }

    /// Makes this the only replica of a new log. Does nothing if there is a log already.
    pub(crate) async fn initialize(&self, node: NodeId) -> Result<(), NodeError> {
        if self.raft.is_initialized().await.map_err(|error| stopped(&error))? {
            return Ok(());
        }
        let members = BTreeMap::from([(node.0, EmptyNode {})]);
        self.raft.initialize(members).await.map_err(|error| stopped(&error))
    }

    /// Hands a request to the log, if this is the leader.
    pub(crate) async fn write(&self, request: Request) -> Written {
        let named = |leader: Option<u64>| leader.map(NodeId);
        match self.raft.client_write(request).await {
            Ok(written) => match written.data {
                Some(answer) => Written::Answered(answer),
                None => Written::InDoubt,
            },
            Err(RaftError::APIError(ClientWriteError::ForwardToLeader(to))) => {
                Written::NotLeader { leader: named(to.leader_id) }
            }
            Err(RaftError::APIError(ClientWriteError::LogEntryDiscarded(_))) => Written::InDoubt,
            Err(error) => Written::Stopped { cause: error.to_string() },
        }
    }

    /// As the leader, the index up to which a reader must have applied the log to see everything
    /// that was decided before now. `Err` names the leader, if known.
    pub(crate) async fn read_index(&self) -> Result<Option<u64>, Option<NodeId>> {
        match self.raft.get_read_log_id(ReadPolicy::ReadIndex).await {
            Ok((read, _)) => Ok(Some(read.log_id().index)),
            Err(RaftError::APIError(LinearizableReadError::ForwardToLeader(to))) => {
                Err(to.leader_id.map(NodeId))
            }
            Err(_) => Err(None),
        }
    }

    /// Waits until this replica has applied the log up to `index`.
    pub(crate) async fn applied(&self, index: Option<u64>, patience: Duration) -> bool {
        let wait = self.raft.wait(Some(patience));
        wait.applied_index_at_least(index, "a reader waits").await.is_ok()
    }

    /// Who leads, as far as this replica knows.
    pub(crate) fn leadership(&self) -> Leadership {
        use openraft::async_runtime::watch::WatchReceiver as _;
        let metrics = self.raft.metrics();
        let metrics = metrics.borrow_watched();
        let membership = metrics.membership_config.membership();
        Leadership {
            leader: metrics.current_leader.map(NodeId),
            term: metrics.current_term,
            voters: membership.voter_ids().map(NodeId).collect(),
            learners: membership.learner_ids().map(NodeId).collect(),
            applied: metrics.last_applied.map(|log_id| log_id.index),
        }
    }

    /// Returns when another leader or term is known than at the time of the call.
    pub(crate) async fn leadership_changed(&self) {
        use openraft::async_runtime::watch::WatchReceiver as _;
        let mut metrics = self.raft.server_metrics();
        let known = {
            let metrics = metrics.borrow_watched();
            (metrics.current_leader, metrics.vote)
        };
        // A new receiver may take the value it begins with for a change.
        while metrics.changed().await.is_ok() {
            let metrics = metrics.borrow_watched();
            if (metrics.current_leader, metrics.vote) != known {
                return;
            }
        }
    }

    /// As the leader, brings the replicas in line with the members the state names: one step at
    /// a time, nobody becomes a voter who cannot be reached and has not caught up. Says whether
    /// there is more to do.
    pub(crate) async fn tend_members(&self, state: &State) -> Result<bool, NodeError> {
        let leadership = self.leadership();
        if leadership.leader != Some(NodeId(*self.raft.node_id())) || state.nodes.is_empty() {
            return Ok(false);
        }
        let known: BTreeSet<NodeId> =
            leadership.voters.union(&leadership.learners).copied().collect();
        let gone: BTreeSet<u64> =
            known.iter().filter(|node| !state.nodes.contains_key(node)).map(|n| n.0).collect();
        let voters_gone: BTreeSet<u64> =
            gone.iter().copied().filter(|n| leadership.voters.contains(&NodeId(*n))).collect();
        if !voters_gone.is_empty() {
            return self.change(ChangeMembers::RemoveVoters(voters_gone)).await;
        }
        if !gone.is_empty() {
            return self.change(ChangeMembers::RemoveNodes(gone)).await;
        }
        for node in state.nodes.keys().filter(|node| !known.contains(node)) {
            if self.answers(*node).await {
                self.raft
                    .add_learner(node.0, EmptyNode {}, false)
                    .await
                    .map_err(|error| stopped(&error))?;
                return Ok(true);
            }
        }
        if leadership.voters.len() < VOTERS_MAX {
            for node in &leadership.learners {
                if self.answers(*node).await && self.caught_up(*node) {
                    let voters = BTreeSet::from([node.0]);
                    return self.change(ChangeMembers::AddVoterIds(voters)).await;
                }
            }
        }
        Ok(!leadership.learners.is_empty() && leadership.voters.len() < VOTERS_MAX)
    }

    async fn change(&self, members: ChangeMembers<u64, EmptyNode>) -> Result<bool, NodeError> {
        self.raft.change_membership(members, false).await.map_err(|error| stopped(&error))?;
        Ok(true)
    }

    async fn answers(&self, node: NodeId) -> bool {
        match self.peers.peer(node) {
            Ok(peer) => peer.connect().await.is_ok(),
            Err(_) => false,
        }
    }

    /// Whether the replica on `node` has all but the last few entries.
    fn caught_up(&self, node: NodeId) -> bool {
        const FEW: u64 = 10;
        use openraft::async_runtime::watch::WatchReceiver as _;
        let metrics = self.raft.metrics();
        let metrics = metrics.borrow_watched();
        let has = metrics
            .replication
            .as_ref()
            .and_then(|replication| replication.get(&node.0))
            .and_then(|matched| matched.as_ref().map(|log_id| log_id.index));
        has.is_some_and(|has| has + FEW >= metrics.last_log_index.unwrap_or(0))
    }

    /// Stops the replica and waits until its file is closed.
    pub(crate) async fn stop(&self, patience: Duration) {
        if let Err(error) = self.raft.shutdown().await {
            tracing::warn!(%error, "the replica did not stop cleanly");
        }
        let closed = self.closed.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(closed) = closed {
            let _ = tokio::time::timeout(patience, closed).await;
        }
    }
}
