//! Three replicas in one process on loopback: leaders die, nodes are cut off, and the log goes on.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use coordinator::{
    Command, Coordinator, CoordinatorConfig, Desired, Epoch, MigrationId, NodeFacts, ProposeError,
    Refused, RequestId, Response, Stage, VeFacts, VeId,
};
use transport::{Authority, Endpoint, EndpointConfig, Identity, NodeId, Timing, Versions};

const PATIENCE: Duration = Duration::from_secs(20);

struct Node {
    coordinator: Coordinator,
    endpoint: Endpoint,
}

struct Cluster {
    directory: tempfile::TempDir,
    authority: Authority,
    nodes: Vec<Option<Node>>,
    addresses: Vec<SocketAddr>,
}

fn facts(index: usize, address: SocketAddr) -> NodeFacts {
    let name = format!("node{}", index + 1);
    NodeFacts { name, address: Some(address), versions: Versions::CURRENT }
}

fn ve_facts(name: &str, addresses: &[&str]) -> VeFacts {
    let addresses = addresses.iter().map(|text| text.parse().expect("an address")).collect();
    VeFacts { name: Some(name.into()), addresses, spec: "ONBOOT=\"no\"\n".into() }
}

impl Cluster {
    async fn start(size: usize) -> Self {
        let directory = tempfile::tempdir().expect("a directory");
        let authority = Authority::create("test").expect("an authority");
        let mut cluster = Self { directory, authority, nodes: Vec::new(), addresses: Vec::new() };
        for index in 0..size {
            let any = "127.0.0.1:0".parse().expect("an address");
            let node = cluster.open(index, any).await;
            let address = node.endpoint.address().expect("an address");
            cluster.addresses.push(address);
            cluster.nodes.push(Some(node));
        }
        let first = cluster.node(0);
        first.initialize().await.expect("initialized");
        let found = Command::Found {
            cluster: "test".into(),
            node: NodeId(1),
            facts: facts(0, cluster.addresses[0]),
        };
        first.propose(found).await.expect("founded");
        for index in 1..size {
            cluster.admit(index).await;
        }
        cluster
    }

    async fn open(&self, index: usize, listen: SocketAddr) -> Node {
        let node = NodeId(index as u64 + 1);
        let coordinator = open(&self.path(node), node).await;
        let identity = Identity::issue(&self.authority, node).expect("an identity");
        let endpoint = Endpoint::bind(EndpointConfig {
            listen,
            identity,
            name: format!("node{node}"),
            versions: Versions::CURRENT,
            timing: Timing::default(),
        })
        .expect("a socket");
        coordinator.attach(&endpoint);
        Node { coordinator, endpoint }
    }

    async fn admit(&self, index: usize) {
        let token = format!("token{index}");
        let first = self.node(0);
        let add = Command::AddToken { token: token.clone(), expires_ms: u64::MAX };
        first.propose(add).await.expect("a token");
        let facts = facts(index, self.addresses[index]);
        let admit = Command::AdmitNode { token, facts, ves: Vec::new() };
        let node = NodeId(index as u64 + 1);
        assert_eq!(first.propose(admit).await.expect("admitted"), Response::Admitted { node });
        eventually("it votes", || first.leadership().voters.contains(&node)).await;
    }

    fn node(&self, index: usize) -> Coordinator {
        self.nodes[index].as_ref().expect("the node runs").coordinator.clone()
    }

    async fn stop(&mut self, index: usize) {
        let node = self.nodes[index].take().expect("the node runs");
        node.coordinator.stop(PATIENCE).await;
        node.endpoint.shut_down(Duration::from_secs(1)).await;
    }

    /// Ends a node so that its disk is as if it had been killed just now.
    async fn crash(&mut self, index: usize) {
        let path = self.path(NodeId(index as u64 + 1));
        let killed = path.with_extension("killed");
        std::fs::copy(&path, &killed).expect("copied");
        self.stop(index).await;
        std::fs::rename(&killed, &path).expect("put back");
    }

    fn path(&self, node: NodeId) -> PathBuf {
        self.directory.path().join(format!("{node}.redb"))
    }

    async fn restart(&mut self, index: usize) {
        let address = self.addresses[index];
        let node = self.open(index, address).await;
        self.nodes[index] = Some(node);
    }

    fn leader(&self) -> Option<usize> {
        self.nodes.iter().flatten().find_map(|node| {
            let leader = node.coordinator.leadership().leader?;
            let index = usize::try_from(leader.0).expect("small") - 1;
            self.nodes[index].is_some().then_some(index)
        })
    }
}

async fn open(path: &Path, node: NodeId) -> Coordinator {
    let config = CoordinatorConfig { path: path.into(), node };
    Coordinator::open(config).await.expect("the coordinator opens")
}

/// Waits for a condition; the short pause only keeps the wait from burning the CPU.
async fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !condition() {
        assert!(begun.elapsed() < PATIENCE, "not in time: {what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

fn register(ve: u32, owner: u64) -> Command {
    let facts = ve_facts(&format!("ve{ve}"), &[&format!("10.77.1.{ve}")]);
    Command::RegisterVe { ve: VeId(ve), owner: NodeId(owner), facts }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_proposal_from_any_node_is_seen_by_all() {
    let cluster = Cluster::start(3).await;
    for index in 0..3 {
        let ve = 101 + index as u32;
        let response = cluster.node(index).propose(register(ve, 1)).await.expect("registered");
        assert_eq!(response, Response::Epoch { epoch: Epoch(1) });
    }
    for index in 0..3 {
        let state = cluster.node(index).read().await.expect("confirmed");
        let ves: Vec<u32> = state.ves.keys().map(|ve| ve.0).collect();
        assert_eq!(ves, [101, 102, 103], "node {}", index + 1);
    }
    let refused = cluster.node(2).propose(register(101, 2)).await.expect_err("taken");
    let ProposeError::Refused(refused) = refused else { panic!("{refused}") };
    assert_eq!(refused.to_string(), "VE 101 exists already, on node 1");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_log_goes_on_without_its_leader_and_takes_it_back() {
    let mut cluster = Cluster::start(3).await;
    cluster.node(0).propose(register(101, 1)).await.expect("registered");
    let leader = cluster.leader().expect("a leader");
    cluster.stop(leader).await;
    let other = (leader + 1) % 3;
    let begun = Instant::now();
    cluster.node(other).propose(register(102, 2)).await.expect("registered without the leader");
    assert!(begun.elapsed() < Duration::from_secs(8), "took {:?}", begun.elapsed());
    cluster.restart(leader).await;
    let state = cluster.node(leader).read().await.expect("confirmed");
    assert_eq!(state.ves.len(), 2);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_cut_off_from_the_majority_decides_nothing() {
    let mut cluster = Cluster::start(3).await;
    eventually("all vote", || {
        (0..3).all(|index| cluster.node(index).leadership().voters.len() == 3)
    })
    .await;
    cluster.stop(1).await;
    cluster.stop(2).await;
    let lonely = cluster.node(0);
    let patience = Duration::from_secs(4);
    let result = lonely.propose_as(RequestId(7), register(101, 1), patience).await;
    assert!(
        matches!(result, Err(ProposeError::InDoubt { .. } | ProposeError::NoLeader { .. })),
        "{result:?}"
    );
    assert!(lonely.state().ves.is_empty());
    cluster.restart(1).await;
    // The same wish again: it has one effect, whichever attempt made it.
    let again = lonely.propose_as(RequestId(7), register(101, 1), PATIENCE).await;
    assert_eq!(again.expect("registered"), Response::Epoch { epoch: Epoch(1) });
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_restart_of_all_forgets_nothing() {
    let mut cluster = Cluster::start(3).await;
    for ve in 0..30 {
        cluster.node(0).propose(register(101 + ve, 1)).await.expect("registered");
    }
    let before = cluster.node(0).read().await.expect("confirmed");
    for index in 0..3 {
        cluster.stop(index).await;
    }
    for index in 0..3 {
        cluster.restart(index).await;
    }
    let after = cluster.node(1).read().await.expect("confirmed");
    assert_eq!(after.ves, before.ves);
    assert_eq!(after.nodes, before.nodes);
}

/// A leader that is started again at once knows its log, but not how much of it was decided.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_leader_that_comes_back_reads_nothing_old() {
    let mut cluster = Cluster::start(3).await;
    for ve in 101..104 {
        let leader = cluster.leader().expect("a leader");
        cluster.node(leader).propose(register(ve, 1)).await.expect("registered");
        cluster.crash(leader).await;
        cluster.restart(leader).await;
        let state = cluster.node(leader).read().await.expect("confirmed");
        assert!(state.ves.contains_key(&VeId(ve)), "VE {ve} is not known any more");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_removed_node_votes_no_more_and_is_turned_away() {
    let cluster = Cluster::start(3).await;
    let remove = Command::RemoveNode { node: NodeId(3) };
    cluster.node(0).propose(remove).await.expect("removed");
    let first = cluster.node(0);
    let expected = BTreeSet::from([NodeId(1), NodeId(2)]);
    eventually("two vote", || first.leadership().voters == expected).await;
    let patience = Duration::from_secs(2);
    let result = cluster.node(2).propose_as(RequestId(1), register(101, 1), patience).await;
    assert!(matches!(result, Err(ProposeError::NoLeader { .. } | ProposeError::InDoubt { .. })));
    cluster.node(1).propose(register(102, 1)).await.expect("the others go on");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_node_alone_decides_and_remembers() {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("log.redb");
    let alone = open(&path, NodeId(1)).await;
    alone.initialize().await.expect("initialized");
    let facts = NodeFacts { name: "node1".into(), address: None, versions: Versions::CURRENT };
    let found = Command::Found { cluster: "test".into(), node: NodeId(1), facts };
    alone.propose(found).await.expect("founded");
    alone.propose(register(101, 1)).await.expect("registered");
    let desired = Desired::Running;
    let run = Command::SetDesired { ve: VeId(101), epoch: Epoch(1), desired };
    alone.propose(run).await.expect("set");
    alone.stop(PATIENCE).await;
    drop(alone);
    let again = open(&path, NodeId(1)).await;
    again.initialize().await.expect("nothing to do");
    let state = again.read().await.expect("confirmed");
    assert_eq!(state.ves[&VeId(101)].desired, Desired::Running);
}

/// Condensing the log and giving a newcomer the condensed form both happen here.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_newcomer_gets_a_long_history_as_a_snapshot() {
    let cluster = Cluster::start(2).await;
    let first = cluster.node(0);
    first.propose(register(101, 1)).await.expect("registered");
    let tasks: Vec<_> = (0..40)
        .map(|_| {
            let first = first.clone();
            tokio::spawn(async move {
                for _ in 0..60 {
                    let desired = Desired::Running;
                    let set = Command::SetDesired { ve: VeId(101), epoch: Epoch(1), desired };
                    first.propose(set).await.expect("set");
                }
            })
        })
        .collect();
    for task in tasks {
        task.await.expect("done");
    }
    let mut cluster = cluster;
    let any = "127.0.0.1:0".parse().expect("an address");
    let node = cluster.open(2, any).await;
    cluster.addresses.push(node.endpoint.address().expect("an address"));
    cluster.nodes.push(Some(node));
    cluster.admit(2).await;
    let state = cluster.node(2).read().await.expect("confirmed");
    assert_eq!(state.ves[&VeId(101)].desired, Desired::Running);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_migration_goes_through_the_log_quickly() {
    let cluster = Cluster::start(3).await;
    cluster.node(0).propose(register(101, 1)).await.expect("registered");
    let leader = cluster.leader().expect("a leader");
    let mut epoch = Epoch(1);
    let mut owner = 1;
    let (mut on_leader, mut elsewhere) = (Vec::new(), Vec::new());
    for round in 0..60u128 {
        let (migration, ve) = (MigrationId(round), VeId(101));
        let target = owner % 3 + 1;
        let (source_node, target_node) = (NodeId(owner), NodeId(target));
        let (source, target) =
            (cluster.node(owner as usize - 1), cluster.node(target as usize - 1));
        let begin = Command::BeginMigration {
            migration,
            ve,
            epoch,
            source: source_node,
            target: target_node,
        };
        source.propose(begin).await.expect("begun");
        let begun = Instant::now();
        let switched = target.propose(Command::Switch { migration, epoch }).await;
        let taken = begun.elapsed();
        if target_node.0 as usize == leader + 1 { &mut on_leader } else { &mut elsewhere }
            .push(taken);
        epoch = epoch.next();
        assert_eq!(switched.expect("switched"), Response::Epoch { epoch });
        let refused = source.propose(Command::AbortMigration { migration }).await;
        let stage = Stage::Switched;
        assert!(
            matches!(
                refused,
                Err(ProposeError::Refused(Refused::WrongStage { stage: found, .. })) if found == stage
            ),
            "{refused:?}"
        );
        target.propose(Command::ReportRunning { migration }).await.expect("running");
        source.propose(Command::FinishMigration { migration }).await.expect("finished");
        owner = target_node.0;
    }
    for (place, mut times) in [("leader", on_leader), ("elsewhere", elsewhere)] {
        times.sort();
        let median = times[times.len() / 2];
        println!("switch proposed on the {place}: median {median:?}, worst {:?}", times.last());
        assert!(median < Duration::from_millis(100), "a switch takes {median:?}");
    }
}
