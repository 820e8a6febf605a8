//! What can be asked of the log, and what it answers.
//!
//! A command says what its sender believes (the epoch); a stale belief is refused. Times are
//! stamped by the leader and travel inside the request, so that every replica decides alike.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};

use serde::{Deserialize, Serialize};
use transport::{NodeId, Versions};

use super::ids::{Epoch, MigrationId, RequestId, VeId};
use super::state::{Desired, MigrationRecord, Stage};

/// What is known of a VE besides who owns it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VeFacts {
    /// Its name, unique in the cluster.
    pub name: Option<String>,
    /// Its addresses, unique in the cluster.
    pub addresses: BTreeSet<IpAddr>,
    /// The text of its configuration.
    pub spec: String,
}

/// A VE that a node brings along when it joins.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VeBrought {
    /// Its number.
    pub ve: VeId,
    /// What it is.
    pub facts: VeFacts,
    /// Whether it should run.
    pub desired: Desired,
}

/// What is known of a node besides its number.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeFacts {
    /// What people call it, unique in the cluster.
    pub name: String,
    /// Where its peers reach it; nowhere while it is the only one.
    pub address: Option<SocketAddr>,
    /// What it speaks.
    pub versions: Versions,
}

/// A change of the cluster's state.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Command {
    /// Gives the cluster its id and its first node. The very first command.
    Found {
        /// The cluster's id.
        cluster: String,
        /// Its first node.
        node: NodeId,
        /// What is known of it.
        facts: NodeFacts,
    },
    /// Changes what is known of a node.
    UpdateNode {
        /// Which.
        node: NodeId,
        /// What is true now.
        facts: NodeFacts,
    },
    /// Lets a new node in, for a token, with the VEs it brings.
    AdmitNode {
        /// The hash of the token's secret, in hex.
        token: String,
        /// What is known of the node.
        facts: NodeFacts,
        /// What it brings.
        ves: Vec<VeBrought>,
    },
    /// Removes a node that owns nothing.
    RemoveNode {
        /// Which.
        node: NodeId,
    },
    /// Makes a token good for one join.
    AddToken {
        /// The hash of its secret, in hex.
        token: String,
        /// When it expires, in milliseconds since 1970.
        expires_ms: u64,
    },
    /// Limits what the moves from each node may send together.
    SetBandwidth {
        /// In bytes per second; `None` for no limit.
        limit: Option<u64>,
    },
    /// Enters a VE, owned by `owner`.
    RegisterVe {
        /// Its number.
        ve: VeId,
        /// Who runs it.
        owner: NodeId,
        /// What it is.
        facts: VeFacts,
    },
    /// Changes what a VE is.
    UpdateVe {
        /// Which.
        ve: VeId,
        /// The epoch believed in.
        epoch: Epoch,
        /// What is true now.
        facts: VeFacts,
    },
    /// Strikes a VE out.
    UnregisterVe {
        /// Which.
        ve: VeId,
        /// The epoch believed in.
        epoch: Epoch,
    },
    /// Says whether a VE should run.
    SetDesired {
        /// Which.
        ve: VeId,
        /// The epoch believed in.
        epoch: Epoch,
        /// Whether it should.
        desired: Desired,
    },
    /// Reserves a VE for one migration.
    BeginMigration {
        /// The migration, chosen at random by the source.
        migration: MigrationId,
        /// The VE.
        ve: VeId,
        /// The epoch believed in.
        epoch: Epoch,
        /// Who owns it.
        source: NodeId,
        /// Who shall.
        target: NodeId,
    },
    /// Makes the target the owner. From here on only the target may run the VE.
    Switch {
        /// Which migration.
        migration: MigrationId,
        /// The epoch it began in.
        epoch: Epoch,
    },
    /// Gives a migration up before its switch. Of `Switch` and `AbortMigration` the first wins.
    AbortMigration {
        /// Which migration.
        migration: MigrationId,
    },
    /// The target runs the VE: the source may remove its copy.
    ReportRunning {
        /// Which migration.
        migration: MigrationId,
    },
    /// The target cannot run the VE and has not let it run for a moment: the source owns it again.
    ReturnVe {
        /// Which migration.
        migration: MigrationId,
        /// The epoch the switch made.
        epoch: Epoch,
    },
    /// Nothing of the migration is left anywhere.
    FinishMigration {
        /// Which migration.
        migration: MigrationId,
    },
}

/// A command on its way into the log.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Request {
    /// Names the wish: a second request with this id gets the answer of the first.
    pub id: RequestId,
    /// When the leader took it, in milliseconds since 1970.
    pub at_ms: u64,
    /// What is wished.
    pub command: Command,
}

impl std::fmt::Display for Request {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} {:?}", self.id, self.command)
    }
}

/// What a command that was carried out answers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Response {
    /// It is so.
    Done,
    /// The node was let in under this number.
    Admitted {
        /// Its number.
        node: NodeId,
    },
    /// The VE is in this epoch (now).
    Epoch {
        /// Its epoch.
        epoch: Epoch,
    },
    /// The migration stands like this.
    Migration {
        /// The whole record.
        record: MigrationRecord,
    },
}

/// Why a command was not carried out. Nothing has changed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
pub enum Refused {
    /// The cluster was founded already.
    #[error("the cluster was founded already")]
    Founded,
    /// No such node.
    #[error("there is no node {node}")]
    NoNode {
        /// Which.
        node: NodeId,
    },
    /// The node was removed.
    #[error("node {node} was removed from the cluster")]
    NodeRemoved {
        /// Which.
        node: NodeId,
    },
    /// The name of a node is taken.
    #[error("the name {name} is taken by node {node}")]
    NodeNameTaken {
        /// Which name.
        name: String,
        /// By whom.
        node: NodeId,
    },
    /// The address of a node is taken.
    #[error("the address {address} is taken by node {node}")]
    NodeAddressTaken {
        /// Which address.
        address: SocketAddr,
        /// By whom.
        node: NodeId,
    },
    /// The node owns VEs.
    #[error("node {node} owns {} (the first: {first})", count_ves(*count))]
    NodeOwnsVes {
        /// Which.
        node: NodeId,
        /// How many.
        count: u64,
        /// One of them.
        first: VeId,
    },
    /// The node takes part in a migration.
    #[error("node {node} takes part in a migration of {ve}")]
    NodeMigrates {
        /// Which.
        node: NodeId,
        /// Of which VE.
        ve: VeId,
    },
    /// The last node cannot be removed.
    #[error("the last node cannot be removed")]
    LastNode,
    /// The token was never given out by this cluster.
    #[error("the token is not known to this cluster")]
    TokenUnknown,
    /// The token let a node in already.
    #[error("the token was used already, by node {by}")]
    TokenUsed {
        /// By whom.
        by: NodeId,
    },
    /// The token's time is over.
    #[error("the token has expired")]
    TokenExpired,
    /// VEs that a node brings clash with others. All of them.
    #[error("{}", list_clashes(clashes))]
    Clashes {
        /// Every clash.
        clashes: Vec<Clash>,
    },
    /// No such VE.
    #[error("there is no VE {ve}")]
    NoVe {
        /// Which.
        ve: VeId,
    },
    /// The number, name or an address of the VE is taken. All that is.
    #[error("{}", list_clashes(clashes))]
    VeTaken {
        /// Every clash.
        clashes: Vec<Clash>,
    },
    /// The sender believes in an epoch that is over, or never was.
    #[error("VE {ve} is in epoch {current}, not {believed}")]
    StaleEpoch {
        /// Which VE.
        ve: VeId,
        /// What the sender believed.
        believed: Epoch,
        /// What is true.
        current: Epoch,
    },
    /// The node does not own the VE.
    #[error("VE {ve} is owned by node {owner}, not node {believed}")]
    NotOwner {
        /// Which VE.
        ve: VeId,
        /// What the sender believed.
        believed: NodeId,
        /// What is true.
        owner: NodeId,
    },
    /// The VE is on the move.
    #[error("VE {ve} is being migrated from node {source_node} to node {target}")]
    Migrating {
        /// Which VE.
        ve: VeId,
        /// From where.
        source_node: NodeId,
        /// Where to.
        target: NodeId,
    },
    /// Source and target are one node.
    #[error("VE {ve} is on node {node} already")]
    SameNode {
        /// Which VE.
        ve: VeId,
        /// Where.
        node: NodeId,
    },
    /// The target has not yet removed what an earlier migration left there.
    #[error("node {node} still has the copy of VE {ve} that it sent away before")]
    CopyLeft {
        /// Which VE.
        ve: VeId,
        /// Where.
        node: NodeId,
    },
    /// The id names another migration.
    #[error("migration {migration} is another one")]
    MigrationTaken {
        /// Which.
        migration: MigrationId,
    },
    /// No such migration.
    #[error("there is no migration {migration}")]
    NoMigration {
        /// Which.
        migration: MigrationId,
    },
    /// The migration is past the point where this can be done.
    #[error("migration {migration} is {stage}")]
    WrongStage {
        /// Which.
        migration: MigrationId,
        /// Where it is.
        stage: Stage,
    },
}

/// Something two VEs cannot both have.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
pub enum Clash {
    /// A number.
    #[error("VE {ve} exists already, on node {owner}")]
    Number {
        /// Which.
        ve: VeId,
        /// Who owns the other.
        owner: NodeId,
    },
    /// A name.
    #[error("the name {name} is taken by VE {ve}")]
    Name {
        /// Which.
        name: String,
        /// By whom.
        ve: VeId,
    },
    /// An address.
    #[error("the address {address} is in use by VE {ve}")]
    Address {
        /// Which.
        address: IpAddr,
        /// By whom.
        ve: VeId,
    },
}

fn count_ves(count: u64) -> String {
    if count == 1 { "1 VE".to_owned() } else { format!("{count} VEs") }
}

fn list_clashes(clashes: &[Clash]) -> String {
    clashes.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
}

/// The answer of the log to one request.
pub type Answer = Result<Response, Refused>;
