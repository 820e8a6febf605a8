//! The cluster as the rest of the daemon holds it, across a change of membership.

use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use coordinator::{
    Command, Coordinator, CoordinatorConfig, NodeFacts, OpenError, ProposeError, ReadError, Refused,
};
use futures_util::future::join_all;
use transport::{
    Authority, BindError, ConnectError, Endpoint, EndpointConfig, Identity, IdentityError,
    JoinError, JoinToken, LinkHandler, NodeId, Peer, Refusal, Service, Timing, TokenError,
    Versions,
};

use super::admission::Doorkeeper;
use super::files::{Directory, FilesError, Member};
use super::status::Informant;

/// The UDP port of a node when none is named.
const PORT: u16 = 7420;
/// How long another node may take to say whether it speaks to this one.
const ASKING: Duration = Duration::from_secs(1);
/// How long closing waits for peers and files.
pub(super) const CLOSING: Duration = Duration::from_secs(5);

/// Why something about the cluster did not work.
#[derive(Debug, thiserror::Error)]
pub enum ClusterError {
    /// The files of the membership.
    #[error("cannot use the files of the membership")]
    Files(#[from] FilesError),
    /// Certificates and keys.
    #[error("cannot use the identity of the node")]
    Identity(#[from] IdentityError),
    /// The log.
    #[error("cannot open the cluster's log")]
    Open(#[from] OpenError),
    /// The port.
    #[error("cannot open the node's port")]
    Bind(#[from] BindError),
    /// The log did not carry out a command.
    #[error("the cluster did not carry it out")]
    Propose(#[from] ProposeError),
    /// The log could not be read.
    #[error("the cluster did not answer")]
    Read(#[from] ReadError),
    /// The cluster refused to let this node in.
    #[error("the cluster refused")]
    Refused(#[source] Refused),
    /// The cluster could not be asked.
    #[error("cannot join")]
    Join(#[from] JoinError),
    /// The token is none.
    #[error("bad token")]
    Token(#[from] TokenError),
    /// The member asked could not get a decision of its cluster.
    #[error("the cluster could not decide: {cause}")]
    NotAdmitted {
        /// What the member said.
        cause: String,
    },
    /// The member's answer makes no sense.
    #[error("the cluster's answer is unintelligible")]
    Unintelligible,
    /// This node listens nowhere.
    #[error("this node is in no cluster")]
    NotClustered,
    /// This node is in a cluster already.
    #[error("this node is in a cluster already, as {name}")]
    Clustered {
        /// Its name there.
        name: String,
    },
    /// The cluster has removed this node.
    #[error("this node was removed from the cluster")]
    Removed,
    /// No address was given and none can be guessed.
    #[error("this host has no address towards other networks")]
    NoAddress,
    /// No node is called that.
    #[error("there is no node {name}")]
    NoNode {
        /// What was asked for.
        name: String,
    },
    /// A node cannot remove itself.
    #[error("a node cannot remove itself")]
    RemoveSelf,
}

/// How a cluster is made.
#[derive(Debug, Clone, Default)]
pub struct InitOptions {
    /// What this node is called; its host name if not given.
    pub name: Option<String>,
    /// Where it listens; guessed if not given, with the usual port if that is missing.
    pub address: Option<String>,
}

/// How a cluster is joined.
#[derive(Debug, Clone, Default)]
pub struct JoinOptions {
    /// The ticket.
    pub token: String,
    /// As for [`InitOptions`].
    pub name: Option<String>,
    /// As for [`InitOptions`].
    pub address: Option<String>,
}

/// What stands while the membership does not change.
#[derive(Debug, Clone)]
pub(super) struct Active {
    pub(super) member: Member,
    pub(super) coordinator: Coordinator,
    pub(super) endpoint: Option<Endpoint>,
}

/// This node's part in the cluster.
#[derive(Debug)]
pub struct Cluster {
    pub(super) state_directory: PathBuf,
    active: RwLock<Active>,
    migrations: RwLock<Option<Migrations>>,
    /// One change of membership at a time.
    pub(super) changing: tokio::sync::Mutex<()>,
}

/// Who serves links about VEs on the move, and about their pages.
struct Migrations {
    moves: Arc<dyn LinkHandler>,
    pages: Arc<dyn LinkHandler>,
}

impl Migrations {
    fn attach(&self, endpoint: &Endpoint) {
        endpoint.on_link(Service::Migration, self.moves.clone());
        endpoint.on_link(Service::Pages, self.pages.clone());
    }
}

impl std::fmt::Debug for Migrations {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Migrations")
    }
}

impl Cluster {
    /// Takes up the membership kept below `state_directory`, or makes a cluster of one.
    pub async fn open(state_directory: &Path) -> Result<Arc<Self>, ClusterError> {
        let directory = Directory::current(state_directory);
        let member = match directory.member()? {
            Some(member) => member,
            None => {
                let cluster = format!("{:016x}", rand::random::<u64>());
                let node = NodeId(1);
                let member = Member { cluster, node, name: host_name(), address: None };
                directory.set_member(&member)?;
                member
            }
        };
        let coordinator = open_log(&directory, &member).await?;
        if member.address.is_none() {
            found(&coordinator, &member).await?;
        }
        let cluster = Arc::new(Self {
            state_directory: state_directory.into(),
            active: RwLock::new(Active { member: member.clone(), coordinator, endpoint: None }),
            migrations: RwLock::default(),
            changing: tokio::sync::Mutex::default(),
        });
        if member.address.is_some() {
            let identity = Identity::load(directory.path(), member.node)?;
            let endpoint = bind(&member, identity)?;
            cluster.attach(endpoint);
        }
        Ok(cluster)
    }

    pub(super) fn active(&self) -> Active {
        self.active.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(super) fn set_active(&self, active: Active) {
        *self.active.write().unwrap_or_else(PoisonError::into_inner) = active;
    }

    /// The cluster's log. A clone taken before this node joins another cluster is dead after.
    pub fn coordinator(&self) -> Coordinator {
        self.active().coordinator
    }

    /// The node we are.
    pub fn node(&self) -> NodeId {
        self.active().member.node
    }

    /// The node that leads the log, as far as this one knows.
    pub fn leader(&self) -> Option<NodeId> {
        self.coordinator().leadership().leader
    }

    /// What we are called.
    pub fn name(&self) -> String {
        self.active().member.name
    }

    /// The way to another node; `None` while this one is alone or that one has no address.
    pub fn peer(&self, node: NodeId) -> Option<Peer> {
        self.coordinator().peer(node)
    }

    /// Hands links of incoming migrations to `moves`, and those for pages that are to come to
    /// `pages`, now and after any change of membership.
    pub fn serve_migrations(&self, moves: Arc<dyn LinkHandler>, pages: Arc<dyn LinkHandler>) {
        let migrations = Migrations { moves, pages };
        if let Some(endpoint) = self.active().endpoint {
            migrations.attach(&endpoint);
        }
        *self.migrations.write().unwrap_or_else(PoisonError::into_inner) = Some(migrations);
    }

    /// Opens the door: everything that other nodes may ask of this one.
    pub(super) fn attach(self: &Arc<Self>, endpoint: Endpoint) {
        let mut active = self.active();
        active.coordinator.attach(&endpoint);
        endpoint.on_join(Arc::new(Doorkeeper(Arc::downgrade(self))));
        endpoint.on_call(Service::Status, Arc::new(Informant(Arc::downgrade(self))));
        let migrations = self.migrations.read().unwrap_or_else(PoisonError::into_inner);
        if let Some(migrations) = migrations.as_ref() {
            migrations.attach(&endpoint);
        }
        drop(migrations);
        active.endpoint = Some(endpoint);
        self.set_active(active);
    }

    /// Makes this node the first of a cluster that others can join.
    pub async fn init(self: &Arc<Self>, options: InitOptions) -> Result<Member, ClusterError> {
        let _one = self.changing.lock().await;
        let active = self.active();
        self.expect_alone(&active).await?;
        let mut member = active.member.clone();
        member.address = Some(choose_address(options.address.as_deref())?);
        member.name = options.name.unwrap_or(member.name);
        let directory = Directory::current(&self.state_directory);
        let authority = Authority::create(&member.cluster)?;
        authority.save(directory.path())?;
        let identity = Identity::issue(&authority, member.node)?;
        identity.save(directory.path())?;
        let endpoint = bind(&member, identity)?;
        let facts = facts(&member);
        active.coordinator.propose(Command::UpdateNode { node: member.node, facts }).await?;
        directory.set_member(&member)?;
        self.set_active(Active { member: member.clone(), ..active });
        self.attach(endpoint);
        tracing::info!(name = member.name, address = ?member.address, "cluster made");
        Ok(member)
    }

    /// Only a node that nobody else relies on may become a member of something new.
    pub(super) async fn expect_alone(&self, active: &Active) -> Result<(), ClusterError> {
        if active.member.address.is_none() || is_removed(active).await {
            Ok(())
        } else {
            Err(ClusterError::Clustered { name: active.member.name.clone() })
        }
    }

    /// A ticket for one node, good for `lifetime`.
    pub async fn token(&self, lifetime: Duration) -> Result<JoinToken, ClusterError> {
        let active = self.active();
        let (Some(endpoint), Some(address)) = (&active.endpoint, active.member.address) else {
            return Err(ClusterError::NotClustered);
        };
        expect_member(&active).await?;
        let token = JoinToken::create(address, endpoint.identity().authority_fingerprint());
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let expires = (now + lifetime).as_millis();
        let add = Command::AddToken {
            token: hex::encode(token.secret_hash()),
            expires_ms: u64::try_from(expires).unwrap_or(u64::MAX),
        };
        active.coordinator.propose(add).await?;
        Ok(token)
    }

    /// Limits what the moves from each node may send together, in bytes per second.
    pub async fn limit_bandwidth(&self, limit: Option<u64>) -> Result<(), ClusterError> {
        self.active().coordinator.propose(Command::SetBandwidth { limit }).await?;
        Ok(())
    }

    /// Removes another node, by name or number.
    pub async fn remove(&self, name: &str) -> Result<NodeId, ClusterError> {
        let active = self.active();
        expect_member(&active).await?;
        let state = active.coordinator.read().await?;
        let node =
            state.node_named(name).ok_or_else(|| ClusterError::NoNode { name: name.to_owned() })?;
        if node == active.member.node {
            return Err(ClusterError::RemoveSelf);
        }
        active.coordinator.propose(Command::RemoveNode { node }).await?;
        Ok(node)
    }

    /// Ends this node's part; others go on.
    pub async fn close(&self) {
        let active = self.active();
        active.coordinator.stop(CLOSING).await;
        if let Some(endpoint) = active.endpoint {
            endpoint.shut_down(Duration::from_millis(500)).await;
        }
    }
}

/// Some things only a member may do, and this node may be none any more.
async fn expect_member(active: &Active) -> Result<(), ClusterError> {
    let leader = active.coordinator.leadership().leader;
    let removed = match leader.filter(|leader| *leader != active.member.node) {
        // Whoever leads decides, so it is enough to ask there.
        Some(leader) => was_removed(active) || refuses(active, leader).await,
        None => is_removed(active).await,
    };
    if removed { Err(ClusterError::Removed) } else { Ok(()) }
}

fn was_removed(active: &Active) -> bool {
    active.coordinator.state().removed.contains_key(&active.member.node)
}

/// Whether the cluster has removed this node: from its own log, or, where it was away when that
/// happened, from the mouth of another member.
async fn is_removed(active: &Active) -> bool {
    let state = active.coordinator.state();
    let others = state.nodes.keys().filter(|node| **node != active.member.node);
    let answers = join_all(others.map(|node| refuses(active, *node)));
    was_removed(active) || answers.await.contains(&true)
}

/// Whether a node turns this one away as one that was removed.
async fn refuses(active: &Active, node: NodeId) -> bool {
    let Some(peer) = active.coordinator.peer(node) else { return false };
    // A connection from before the removal is closed by the first thing asked on it.
    let _ = peer.call_bytes(Service::Status, Vec::new(), ASKING).await;
    let refusal = Refusal::Removed;
    matches!(peer.connect().await, Err(ConnectError::Refused { refusal: why, .. }) if why == refusal)
}

pub(super) async fn open_log(
    directory: &Directory,
    member: &Member,
) -> Result<Coordinator, ClusterError> {
    let config = CoordinatorConfig { path: directory.log(), node: member.node };
    Ok(Coordinator::open(config).await?)
}

/// Makes sure that the log of a node alone exists and is read.
async fn found(coordinator: &Coordinator, member: &Member) -> Result<(), ClusterError> {
    coordinator.initialize().await?;
    let state = coordinator.read().await?;
    if state.cluster.is_none() {
        let cluster = member.cluster.clone();
        let found = Command::Found { cluster, node: member.node, facts: facts(member) };
        coordinator.propose(found).await?;
    }
    Ok(())
}

pub(super) fn facts(member: &Member) -> NodeFacts {
    let (name, address) = (member.name.clone(), member.address);
    NodeFacts { name, address, versions: Versions::CURRENT }
}

pub(super) fn bind(member: &Member, identity: Identity) -> Result<Endpoint, ClusterError> {
    let listen = member.address.ok_or(ClusterError::NotClustered)?;
    Ok(Endpoint::bind(EndpointConfig {
        listen,
        identity,
        name: member.name.clone(),
        versions: Versions::CURRENT,
        timing: Timing::default(),
    })?)
}

/// The name of this host, up to its first dot.
pub(super) fn host_name() -> String {
    let name = nix::unistd::gethostname().unwrap_or_default();
    let name = name.to_string_lossy();
    match name.split('.').next() {
        Some(short) if !short.is_empty() => short.to_owned(),
        _ => "node".to_owned(),
    }
}

/// The address given, completed; or the one this host uses towards other networks.
pub(super) fn choose_address(given: Option<&str>) -> Result<SocketAddr, ClusterError> {
    if let Some(text) = given {
        let address = text.parse::<SocketAddr>();
        return address
            .or_else(|_| text.parse::<IpAddr>().map(|ip| (ip, PORT).into()))
            .map_err(|_| ClusterError::NoAddress);
    }
    // Connecting a UDP socket sends nothing; it only makes the kernel choose a route. The
    // address is one kept for documentation, so it can be nobody's.
    let guess = || {
        let socket = UdpSocket::bind("0.0.0.0:0")?;
        socket.connect("192.0.2.1:9")?;
        socket.local_addr()
    };
    match guess() {
        Ok(address) if !address.ip().is_unspecified() => Ok((address.ip(), PORT).into()),
        _ => Err(ClusterError::NoAddress),
    }
}
