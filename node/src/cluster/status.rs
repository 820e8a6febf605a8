//! The cluster at a glance: every node is asked, at the same time.

use std::net::SocketAddr;
use std::sync::Weak;
use std::time::{Duration, Instant};

use coordinator::{Desired, State};
use futures_util::FutureExt as _;
use futures_util::future::{BoxFuture, join_all};
use serde::{Deserialize, Serialize};
use transport::{CallError, CallHandler, ConnectError, NodeId, PeerInfo, Refusal, Service};

use super::doctor::HostReport;
use super::service::{Active, Cluster};
use crate::api::chain;

/// How long a node may take to answer.
const PATIENCE: Duration = Duration::from_secs(3);

/// What a node says about itself.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct About {
    version: String,
    applied: Option<u64>,
    host: Option<HostReport>,
}

/// What a node is asked.
#[derive(Debug, Clone, Copy, Default, Serialize, Deserialize)]
struct Question {
    /// Also what its host offers, which takes it some milliseconds.
    host: bool,
}

/// Whether a node answers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum NodeState {
    /// It is the one that was asked.
    Here,
    /// It answers.
    Reachable,
    /// It does not.
    Unreachable,
    /// It answers, but not as a node that can be worked with.
    Incompatible,
}

/// One node.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct NodeView {
    /// Its number.
    pub id: u64,
    /// Its name.
    pub name: String,
    /// Where it listens.
    pub address: Option<SocketAddr>,
    /// Whether it answers.
    pub state: NodeState,
    /// Why not.
    pub problem: Option<String>,
    /// Whether it leads.
    pub leader: bool,
    /// Whether it votes.
    pub voter: bool,
    /// The newest protocol version it speaks.
    pub protocol: u16,
    /// The version of its daemon, if it answers.
    pub version: Option<String>,
    /// How long its answer took, in milliseconds.
    pub answer_ms: Option<f64>,
    /// How many VEs it owns.
    pub ves: usize,
    /// What its host offers, where that was asked for.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub host: Option<HostReport>,
}

/// One VE.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VeView {
    /// Its number.
    pub ctid: u32,
    /// Its name.
    pub name: Option<String>,
    /// The name of the node that owns it.
    pub owner: String,
    /// How often that changed.
    pub epoch: u64,
    /// Whether it should run.
    pub desired: Desired,
    /// The name of the node it is moving to.
    pub moving_to: Option<String>,
}

/// The cluster at a glance.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ClusterStatus {
    /// The cluster's id.
    pub cluster: String,
    /// The name of the node that was asked.
    pub node: String,
    /// The name of the leader, if there is one.
    pub leader: Option<String>,
    /// Whether this node listens for others.
    pub clustered: bool,
    /// Whether the cluster has removed this node.
    pub removed: bool,
    /// Whether the state was confirmed by a majority just now.
    pub confirmed: bool,
    /// What the moves from each node may send together, in bytes per second.
    #[serde(default)]
    pub bandwidth: Option<u64>,
    /// The nodes.
    pub nodes: Vec<NodeView>,
    /// The VEs.
    pub ves: Vec<VeView>,
}

/// Answers other nodes' questions about this one.
pub(super) struct Informant(pub(super) Weak<Cluster>);

impl CallHandler for Informant {
    fn call(&self, _peer: PeerInfo, request: Vec<u8>) -> BoxFuture<'static, Vec<u8>> {
        // An empty request only asks whether somebody is there.
        let question: Question = ckpt_format::codec::decode(&request).unwrap_or_default();
        let applied =
            self.0.upgrade().and_then(|cluster| cluster.coordinator().leadership().applied);
        async move { ckpt_format::codec::encode(&about(applied, question).await) }.boxed()
    }
}

async fn about(applied: Option<u64>, question: Question) -> About {
    let host = match question.host {
        true => tokio::task::spawn_blocking(HostReport::examine).await.ok(),
        false => None,
    };
    About { version: env!("CARGO_PKG_VERSION").to_owned(), applied, host }
}

impl Cluster {
    /// The cluster at a glance, as this node sees it. Works without a majority too.
    /// With `hosts` each node also says what its host offers.
    pub async fn status(&self, hosts: bool) -> ClusterStatus {
        let question = Question { host: hosts };
        let active = self.active();
        let confirmed = tokio::time::timeout(PATIENCE, active.coordinator.read());
        let confirmed = matches!(confirmed.await, Ok(Ok(_)));
        let state = active.coordinator.state();
        let leader = active.coordinator.leadership().leader.filter(|_| confirmed);
        let nodes = state.nodes.keys().map(|node| view_node(&active, &state, *node, question));
        let nodes = join_all(nodes).await;
        let named = |node: NodeId| state.node_name(node).unwrap_or("?").to_owned();
        let ves = state.ves.iter().map(|(ve, record)| VeView {
            ctid: ve.0,
            name: record.facts.name.clone(),
            owner: named(record.owner),
            epoch: record.epoch.0,
            desired: record.desired,
            moving_to: record
                .migration
                .and_then(|id| state.migrations.get(&id))
                .map(|migration| named(migration.target)),
        });
        ClusterStatus {
            cluster: active.member.cluster.clone(),
            node: active.member.name.clone(),
            leader: leader.map(named),
            clustered: active.member.address.is_some(),
            removed: state.removed.contains_key(&active.member.node)
                || nodes.iter().any(|(_, removed)| *removed),
            confirmed,
            bandwidth: state.bandwidth,
            ves: ves.collect(),
            nodes: nodes.into_iter().map(|(node, _)| node).collect(),
        }
    }
}

/// A node as it is seen, and whether it says that this one was removed.
async fn view_node(
    active: &Active,
    state: &State,
    node: NodeId,
    question: Question,
) -> (NodeView, bool) {
    let facts = &state.nodes[&node];
    let leadership = active.coordinator.leadership();
    let begun = Instant::now();
    let (mut problem, mut removed) = (None, false);
    let (node_state, about) = if node == active.member.node {
        (NodeState::Here, Some(about(leadership.applied, question).await))
    } else {
        match ask(active, node, question).await {
            Ok(about) => (NodeState::Reachable, Some(about)),
            Err(silence) => {
                problem = Some(silence.problem);
                removed = silence.removed;
                (silence.state, None)
            }
        }
    };
    let reachable = node_state == NodeState::Reachable;
    let view = NodeView {
        id: node.0,
        name: facts.name.clone(),
        address: facts.address,
        answer_ms: reachable.then(|| begun.elapsed().as_secs_f64() * 1e3),
        state: node_state,
        problem,
        leader: leadership.leader == Some(node),
        voter: leadership.voters.contains(&node),
        protocol: facts.versions.newest,
        ves: state.owned_by(node).count(),
        version: about.as_ref().map(|about| about.version.clone()),
        host: about.and_then(|about| about.host),
    };
    (view, removed)
}

/// Why a node said nothing.
struct Silence {
    state: NodeState,
    problem: String,
    removed: bool,
}

async fn ask(active: &Active, node: NodeId, question: Question) -> Result<About, Silence> {
    let Some(peer) = active.coordinator.peer(node) else {
        let problem = "its address is not known".to_owned();
        return Err(Silence { state: NodeState::Unreachable, problem, removed: false });
    };
    peer.call::<_, About>(Service::Status, &question, PATIENCE).await.map_err(|error| {
        let state = match &error {
            CallError::Connect {
                source:
                    ConnectError::Version { .. }
                    | ConnectError::NotOfThisCluster { .. }
                    | ConnectError::WrongNode { .. }
                    | ConnectError::Foreign { .. }
                    | ConnectError::Refused { .. },
                ..
            } => NodeState::Incompatible,
            _ => NodeState::Unreachable,
        };
        let refusal = Refusal::Removed;
        let removed = matches!(
            &error,
            CallError::Connect { source: ConnectError::Refused { refusal: why, .. }, .. }
                if *why == refusal
        );
        Silence { state, problem: chain(&error), removed }
    })
}
