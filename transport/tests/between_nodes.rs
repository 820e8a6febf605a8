//! Two or three endpoints on loopback: who may talk to whom, and what each refusal says.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::FutureExt as _;
use futures_util::future::BoxFuture;
use tokio::sync::oneshot;
use transport::{
    Authority, CallError, CallHandler, ConnectError, Endpoint, EndpointConfig, Gate, Identity,
    JoinError, JoinHandler, JoinToken, Link, LinkHandler, NodeId, PeerInfo, Refusal, Service,
    Timing, Versions, request_join,
};

const PATIENCE: Duration = Duration::from_secs(5);

struct Echo;

impl CallHandler for Echo {
    fn call(&self, peer: PeerInfo, request: Vec<u8>) -> BoxFuture<'static, Vec<u8>> {
        let text: String = ckpt_format::codec::decode(&request).expect("the test sends a string");
        async move { ckpt_format::codec::encode(&format!("{text} from {}", peer.node)) }.boxed()
    }
}

fn any() -> SocketAddr {
    "127.0.0.1:0".parse().expect("an address")
}

fn bind_at(listen: SocketAddr, authority: &Authority, node: u64, versions: Versions) -> Endpoint {
    let identity = Identity::issue(authority, NodeId(node)).expect("an identity");
    let name = format!("node{node}");
    let timing = Timing::default();
    Endpoint::bind(EndpointConfig { listen, identity, name, versions, timing }).expect("a socket")
}

fn bind(authority: &Authority, node: u64) -> Endpoint {
    bind_at(any(), authority, node, Versions::CURRENT)
}

fn authority() -> Authority {
    Authority::create("test").expect("an authority")
}

async fn ask(from: &Endpoint, to: &Endpoint) -> Result<String, CallError> {
    let peer = from.peer(to.node(), to.address().expect("an address"));
    peer.call(Service::Test, &"hello".to_owned(), PATIENCE).await
}

fn connect_error(result: Result<String, CallError>) -> ConnectError {
    match result {
        Err(CallError::Connect { source, .. }) => source,
        other => panic!("expected a refused connection, got {other:?}"),
    }
}

#[tokio::test]
async fn members_call_each_other_by_proven_name() {
    let authority = authority();
    let (one, two) = (bind(&authority, 1), bind(&authority, 2));
    two.on_call(Service::Test, Arc::new(Echo));
    assert_eq!(ask(&one, &two).await.expect("an answer"), "hello from 1");
    assert!(matches!(ask(&two, &one).await, Err(CallError::NoService { node: NodeId(1) })));
}

#[tokio::test]
async fn a_node_of_another_cluster_is_refused_on_both_sides() {
    let (one, other) = (bind(&authority(), 1), bind(&authority(), 2));
    other.on_call(Service::Test, Arc::new(Echo));
    let error = connect_error(ask(&one, &other).await);
    assert!(matches!(error, ConnectError::NotOfThisCluster { .. }), "{error}");
}

#[tokio::test]
async fn another_version_is_named_with_both_versions() {
    let authority = authority();
    let one = bind(&authority, 1);
    let newer = bind_at(any(), &authority, 2, Versions { oldest: 7, newest: 9 });
    let error = connect_error(ask(&one, &newer).await).to_string();
    let own = Versions::CURRENT;
    let told = format!("speaks protocol versions 7 to 9, this node {own}");
    assert!(error.ends_with(&told), "{error}");
    let error = connect_error(ask(&newer, &one).await).to_string();
    let told = format!("speaks protocol {own}, this node versions 7 to 9");
    assert!(error.ends_with(&told), "{error}");
}

#[tokio::test]
async fn the_wrong_node_at_an_address_is_noticed() {
    let authority = authority();
    let (one, two) = (bind(&authority, 1), bind(&authority, 2));
    let peer = one.peer(NodeId(3), two.address().expect("an address"));
    let error = peer.connect().await.expect_err("node 2 answers");
    assert!(
        matches!(error, ConnectError::WrongNode { expected: NodeId(3), found: NodeId(2), .. }),
        "{error}"
    );
}

#[tokio::test]
async fn nobody_there_is_unreachable_within_the_patience() {
    let one = bind(&authority(), 1);
    let silent = std::net::UdpSocket::bind(any()).expect("a socket nobody reads");
    let begun = Instant::now();
    let peer = one.peer(NodeId(2), silent.local_addr().expect("an address"));
    let error = peer.connect().await.expect_err("nobody answers");
    assert!(matches!(error, ConnectError::Unreachable { .. }), "{error}");
    assert!(begun.elapsed() < Duration::from_secs(4));
}

struct RemovedTwo;

impl Gate for RemovedTwo {
    fn is_removed(&self, node: NodeId) -> bool {
        node == NodeId(2)
    }
}

#[tokio::test]
async fn a_removed_node_is_told_so() {
    let authority = authority();
    let (one, two) = (bind(&authority, 1), bind(&authority, 2));
    one.on_call(Service::Test, Arc::new(Echo));
    one.set_gate(Arc::new(RemovedTwo));
    let error = connect_error(ask(&two, &one).await);
    assert!(matches!(error, ConnectError::Refused { refusal: Refusal::Removed, .. }), "{error}");
}

/// Node 2, which can be started more than once.
struct Two {
    authority: Authority,
    directory: tempfile::TempDir,
}

impl Two {
    fn new() -> Self {
        let authority = authority();
        let directory = tempfile::tempdir().expect("a directory");
        let identity = Identity::issue(&authority, NodeId(2)).expect("an identity");
        identity.save(directory.path()).expect("saved");
        Self { authority, directory }
    }

    fn start(&self, listen: SocketAddr) -> Endpoint {
        let two = Endpoint::bind(EndpointConfig {
            listen,
            identity: Identity::load(self.directory.path(), NodeId(2)).expect("loaded"),
            name: "node2".into(),
            versions: Versions::CURRENT,
            timing: Timing::default(),
        })
        .expect("a socket");
        two.on_call(Service::Test, Arc::new(Echo));
        two.on_link(Service::Test, Arc::new(EchoOnce));
        two
    }
}

/// Sends the first message of a link back.
struct EchoOnce;

impl LinkHandler for EchoOnce {
    fn serve(&self, _peer: PeerInfo, link: Link) -> BoxFuture<'static, ()> {
        async move {
            let Link { mut control, bulk: _bulk, .. } = link;
            let text: String = control.recv().await.expect("a message");
            control.send(&text).await.expect("sent");
            let _ = control.recv::<String>().await;
        }
        .boxed()
    }
}

#[tokio::test]
async fn a_restarted_peer_is_reached_again_at_once() {
    let node = Two::new();
    let one = bind(&node.authority, 1);
    let two = node.start(any());
    let address = two.address().expect("an address");
    ask(&one, &two).await.expect("an answer");
    two.shut_down(PATIENCE).await;
    // The port is free although this clone lives.
    let two = {
        let again = node.start(address);
        drop(two);
        again
    };
    assert_eq!(ask(&one, &two).await.expect("an answer"), "hello from 1");
}

#[tokio::test]
async fn a_link_to_a_peer_that_was_killed_and_started_again_opens() {
    let node = Arc::new(Two::new());
    let one = bind(&node.authority, 1);
    let (started, address) = oneshot::channel();
    let (kill, killed) = oneshot::channel();
    let first = node.clone();
    // Nothing of a runtime goes on when its only thread ends: no connection says a word.
    let life = std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        runtime.expect("a runtime").block_on(async {
            let two = first.start(any());
            started.send(two.address().expect("an address")).expect("a listener");
            let _ = killed.await;
        });
    });
    let address = address.await.expect("a start");
    let peer = one.peer(NodeId(2), address);
    let answer: String =
        peer.call(Service::Test, &"hello".to_owned(), PATIENCE).await.expect("an answer");
    assert_eq!(answer, "hello from 1");
    kill.send(()).expect("a listener");
    life.join().expect("no panic");
    let _two = node.start(address);
    let mut link = peer.link(Service::Test).await.expect("a link");
    link.control.send(&"hello".to_owned()).await.expect("sent");
    assert_eq!(link.control.recv::<String>().await.expect("an answer"), "hello");
}

struct Admit;

impl JoinHandler for Admit {
    fn join(&self, _address: SocketAddr, request: Vec<u8>) -> BoxFuture<'static, Vec<u8>> {
        async move { request.iter().rev().copied().collect() }.boxed()
    }
}

async fn join(token: &JoinToken) -> Result<Vec<u8>, JoinError> {
    request_join(token, "new", vec![1, 2, 3], Versions::CURRENT, PATIENCE).await
}

#[tokio::test]
async fn a_stranger_may_ask_to_join_and_nothing_else() {
    let authority = authority();
    let one = bind(&authority, 1);
    let address = one.address().expect("an address");
    let token = JoinToken::create(address, one.identity().authority_fingerprint());
    let refused = join(&token).await.expect_err("nobody admits yet");
    assert!(
        matches!(
            refused,
            JoinError::Connect(ConnectError::Refused { refusal: Refusal::NoJoin, .. })
        ),
        "{refused:?}"
    );
    one.on_join(Arc::new(Admit));
    assert_eq!(join(&token).await.expect("an answer"), vec![3, 2, 1]);
    // A token for another cluster that names this address.
    let foreign = Identity::issue(&self::authority(), NodeId(1)).expect("an identity");
    let token = JoinToken::create(address, foreign.authority_fingerprint());
    let refused = join(&token).await.expect_err("another authority");
    assert!(
        matches!(refused, JoinError::Connect(ConnectError::NotOfThisCluster { .. })),
        "{refused:?}"
    );
}
