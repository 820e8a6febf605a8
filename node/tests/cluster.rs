//! Three real daemons on one machine: a cluster is made, joined, loses its leader to `kill -9`,
//! and goes on.
//!
//! Needs root. The daemons live in a network namespace of their own, on loopback addresses.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use ckpt_engine::sys::netns::Netns;
use node::api::{Client, ClusterRequest, Failure, MemberView, NodeRequest, NodeStatus, Request};
use node::cluster::{ClusterStatus, NodeState};
use node::network::Netlink;
use serde::de::DeserializeOwned;

const PATIENCE: Duration = Duration::from_secs(20);

/// The daemons of a test; they and their files end with it.
struct Bed {
    netns: Netns,
    directory: tempfile::TempDir,
    daemons: Vec<Option<Child>>,
}

impl Drop for Bed {
    fn drop(&mut self) {
        for mut daemon in self.daemons.drain(..).flatten() {
            // It may have ended by itself.
            let _ = daemon.kill();
            let _ = daemon.wait();
        }
    }
}

impl Bed {
    fn new() -> Self {
        let netns = Netns::create().expect("needs root");
        let mut netlink = Netlink::open_in(&netns).expect("netlink");
        let loopback = netlink.index("lo").expect("a loopback device");
        netlink.set_up(loopback).expect("loopback is up");
        let directory = tempfile::tempdir().expect("a directory");
        Self { netns, directory, daemons: Vec::new() }
    }

    /// Starts daemons until there are `count`.
    fn start(&mut self, count: usize) {
        while self.daemons.len() < count {
            self.daemons.push(None);
            self.start_one(self.daemons.len() - 1);
        }
    }

    fn socket(&self, index: usize) -> PathBuf {
        self.directory.path().join(format!("{index}/run/vzd.sock"))
    }

    fn start_one(&mut self, index: usize) {
        let base = self.directory.path().join(index.to_string());
        std::fs::create_dir_all(&base).expect("a directory");
        let config = base.join("vzd.toml");
        let text = format!(
            "state_dir = '{0}/state'\nrun_dir = '{0}/run'\n[network]\nbridge = 'vzbr{index}'\n",
            base.display()
        );
        std::fs::write(&config, text).expect("a configuration");
        let log = std::fs::File::options().create(true).append(true).open(base.join("log"));
        let spawn = || {
            Command::new(env!("CARGO_BIN_EXE_vzd"))
                .arg("--config")
                .arg(&config)
                .stdin(Stdio::null())
                .stdout(Stdio::null())
                .stderr(log.expect("a log"))
                .spawn()
        };
        let child = self.netns.run(spawn).expect("the namespace").expect("a daemon");
        self.daemons[index] = Some(child);
        let socket = self.socket(index);
        let answers = || {
            let asked = Client::connect(&socket)
                .and_then(|client| client.ask::<NodeStatus>(&Request::Node(NodeRequest::Status)));
            asked.is_ok()
        };
        if !within(PATIENCE, answers) {
            let log = std::fs::read_to_string(base.join("log")).unwrap_or_default();
            panic!("daemon {index} does not answer:\n{log}");
        }
    }

    fn kill(&mut self, index: usize) {
        let mut daemon = self.daemons[index].take().expect("it runs");
        daemon.kill().expect("killed");
        daemon.wait().expect("ended");
    }

    fn ask<T: DeserializeOwned>(
        &self,
        index: usize,
        request: ClusterRequest,
    ) -> Result<T, Failure> {
        Client::connect(&self.socket(index))?.ask(&Request::Cluster(request))
    }

    fn init(&self, index: usize) -> Result<MemberView, Failure> {
        let (name, address) = place(index);
        self.ask(index, ClusterRequest::Init { name, address })
    }

    fn token(&self, index: usize) -> Result<String, Failure> {
        self.ask(index, ClusterRequest::Token { lifetime_seconds: 60 })
    }

    fn join(&self, index: usize, token: &str) -> Result<MemberView, Failure> {
        let (name, address) = place(index);
        self.ask(index, ClusterRequest::Join { token: token.to_owned(), name, address })
    }

    fn status(&self, index: usize) -> ClusterStatus {
        self.ask(index, ClusterRequest::Status).expect("a status")
    }

    fn cluster_of(count: usize) -> Self {
        let mut bed = Self::new();
        bed.start(count);
        bed.init(0).expect("made");
        for index in 1..count {
            let token = bed.token(0).expect("a token");
            let member = bed.join(index, &token).expect("joined");
            assert!(member.reached, "node {index} is not reached");
        }
        bed
    }
}

fn place(index: usize) -> (Option<String>, Option<String>) {
    (Some(format!("node{}", index + 1)), Some(format!("127.0.0.{}", index + 1)))
}

/// Waits for a condition; the short pause only keeps the wait from burning the CPU.
fn within(patience: Duration, mut condition: impl FnMut() -> bool) -> bool {
    let begun = Instant::now();
    while !condition() {
        if begun.elapsed() > patience {
            return false;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    true
}

fn code<T: std::fmt::Debug>(result: Result<T, Failure>) -> (String, i32) {
    let failure = result.expect_err("it must be refused");
    (failure.code, failure.exit)
}

#[test]
fn a_daemon_alone_works_without_any_setup_and_listens_nowhere() {
    let mut bed = Bed::new();
    bed.start(1);
    let status = bed.status(0);
    assert!(status.confirmed && !status.clustered);
    assert_eq!(status.nodes.len(), 1);
    assert_eq!(code(bed.token(0)), ("not-clustered".to_owned(), 8));
    let pid = bed.daemons[0].as_ref().expect("it runs").id();
    // The namespace holds nothing but this daemon.
    for table in ["udp", "udp6"] {
        let sockets = std::fs::read_to_string(format!("/proc/{pid}/net/{table}")).expect("a table");
        assert_eq!(sockets.lines().count(), 1, "{sockets}");
    }
}

#[test]
fn every_bad_token_has_its_own_words() {
    let mut bed = Bed::cluster_of(2);
    bed.start(3);
    let token = bed.token(1).expect("any member makes tokens");
    let other = {
        let (mut name, _) = place(1);
        let taken = ClusterRequest::Join {
            token: token.clone(),
            name: name.take(),
            address: Some("127.0.0.3".into()),
        };
        bed.ask::<MemberView>(2, taken)
    };
    assert_eq!(code(other), ("name-taken".to_owned(), 7));
    assert_eq!(code(bed.join(2, &token[..60])), ("token-damaged".to_owned(), 21));
    bed.join(2, &token).expect("a refusal did not use the token up");
    bed.start(4);
    let used = bed.join(3, &token).expect_err("used");
    assert_eq!((used.code.as_str(), used.exit), ("token-used", 6));
    assert!(used.message.contains("by node 3"), "{}", used.message);
    let late: String = bed.ask(0, ClusterRequest::Token { lifetime_seconds: 0 }).expect("a token");
    assert_eq!(code(bed.join(3, &late)), ("token-expired".to_owned(), 6));
    // Another cluster at the address that the token names: the daemon there is a stranger.
    let good = bed.token(0).expect("a token");
    assert_eq!(code(bed.join(0, &good)), ("already-clustered".to_owned(), 8));
    bed.kill(0);
    assert_eq!(code(bed.join(3, &good)), ("unreachable".to_owned(), 4));
    let state = bed.directory.path().join("0/state");
    std::fs::rename(&state, state.with_extension("away")).expect("moved away");
    bed.start_one(0);
    bed.init(0).expect("another cluster");
    assert_eq!(code(bed.join(3, &good)), ("not-of-this-cluster".to_owned(), 5));
}

#[test]
fn the_cluster_survives_its_leader_and_takes_it_back() {
    let mut bed = Bed::cluster_of(3);
    let leader = |bed: &Bed, index: usize| {
        let status = bed.status(index);
        status.nodes.iter().position(|node| node.leader).filter(|_| status.confirmed)
    };
    let first = leader(&bed, 0).expect("a leader");
    bed.kill(first);
    let other = (first + 1) % 3;
    let begun = Instant::now();
    bed.token(other).expect("a decision without the old leader");
    assert!(begun.elapsed() < Duration::from_secs(8), "took {:?}", begun.elapsed());
    let status = bed.status(other);
    assert!(status.confirmed);
    assert_eq!(status.nodes[first].state, NodeState::Unreachable);
    bed.start_one(first);
    let all_answer = || {
        bed.status(first).nodes.iter().all(|node| node.problem.is_none())
            && bed.status(other).nodes.iter().all(|node| node.problem.is_none())
    };
    assert!(within(PATIENCE, all_answer), "{:?}", bed.status(other));
    bed.token(first).expect("it takes part again");
}

#[test]
fn a_removed_node_is_told_so_and_may_join_again() {
    let bed = Bed::cluster_of(3);
    let remove = |node: &str| ClusterRequest::Remove { node: node.to_owned() };
    assert_eq!(code(bed.ask::<u64>(0, remove("nobody"))), ("no-such-node".to_owned(), 8));
    assert_eq!(code(bed.ask::<u64>(2, remove("node3"))), ("remove-self".to_owned(), 8));
    assert_eq!(bed.ask::<u64>(0, remove("node3")).expect("removed"), 3);
    assert!(within(PATIENCE, || bed.status(2).removed), "{:?}", bed.status(2));
    assert_eq!(code(bed.token(2)), ("removed".to_owned(), 8));
    let token = bed.token(0).expect("a token");
    let member = bed.join(2, &token).expect("joined again");
    assert_eq!(member.node, 4, "a number is never given out twice");
    let status = bed.status(2);
    assert!(status.confirmed && !status.removed, "{status:?}");
}

#[test]
fn the_files_of_a_member_are_for_root_alone() {
    use std::os::unix::fs::MetadataExt as _;
    let bed = Bed::cluster_of(2);
    for index in 0..2 {
        let path = bed.directory.path().join(format!("{index}/state/cluster"));
        let mode = |path: &Path| std::fs::metadata(path).expect("metadata").mode() & 0o777;
        assert_eq!(mode(&path), 0o700);
        for name in ["ca.key", "node.key", "member.json"] {
            assert_eq!(mode(&path.join(name)), 0o600, "{name}");
        }
    }
}
