//! What went wrong in the cluster, in the words and codes of the vz programs.

use coordinator::{Clash, ProposeError, ReadError, Refused};
use transport::{ConnectError, JoinError};

use super::service::ClusterError;
use crate::api::{Failure, chain};

/// Exit statuses of `vzcluster`; the reference has the table.
pub(super) mod exit {
    pub(crate) const SYSTEM: i32 = 3;
    pub(crate) const UNREACHABLE: i32 = 4;
    pub(crate) const FOREIGN: i32 = 5;
    pub(crate) const TOKEN: i32 = 6;
    pub(crate) const TAKEN: i32 = 7;
    pub(crate) const STATE: i32 = 8;
    pub(crate) const BAD_VALUE: i32 = 21;
    /// As vzctl has them.
    pub(crate) const VE_EXISTS: i32 = 44;
    pub(crate) const LOCKED: i32 = 9;
    pub(crate) const NO_VE: i32 = 14;
    pub(crate) const ADDRESS_IN_USE: i32 = 78;
    pub(crate) const VE_NAME: i32 = 131;
}

impl From<ClusterError> for Failure {
    fn from(error: ClusterError) -> Self {
        let text = chain(&error);
        match error {
            ClusterError::Propose(error) => propose(&error),
            ClusterError::Read(error) => error.into(),
            ClusterError::Refused(refused) => refuse(&refused),
            ClusterError::Join(error) => join(&error),
            ClusterError::Token(_) => Self::new("token-damaged", exit::BAD_VALUE, text)
                .with_hint("copy the whole line that vzcluster token printed"),
            ClusterError::NotClustered => Self::new("not-clustered", exit::STATE, text)
                .with_hint("vzcluster init makes a cluster, vzcluster join enters one"),
            ClusterError::Clustered { .. } => Self::new("already-clustered", exit::STATE, text)
                .with_hint("remove it there first: vzcluster remove NODE on another node"),
            ClusterError::Removed => Self::new("removed", exit::STATE, text)
                .with_hint("it can join again with a new token"),
            ClusterError::NoAddress => Self::new("no-address", exit::BAD_VALUE, text)
                .with_hint("give --address IP of this host on the cluster's network"),
            ClusterError::NoNode { .. } => Self::new("no-such-node", exit::STATE, text)
                .with_hint("vzcluster status lists the nodes"),
            ClusterError::RemoveSelf => Self::new("remove-self", exit::STATE, text)
                .with_hint("run vzcluster remove on another node"),
            ClusterError::NotAdmitted { .. } => Self::new("no-decision", exit::UNREACHABLE, text)
                .with_hint("try again; if the token was used up, remove the node and make another"),
            ClusterError::Bind(_) => Self::new("cannot-listen", exit::SYSTEM, text)
                .with_hint("is the address one of this host's, and the port free?"),
            ClusterError::Files(_)
            | ClusterError::Identity(_)
            | ClusterError::Open(_)
            | ClusterError::Unintelligible => Self::new("cluster-system", exit::SYSTEM, text),
        }
    }
}

impl From<ReadError> for Failure {
    fn from(error: ReadError) -> Self {
        Self::new("no-majority", exit::UNREACHABLE, error.to_string())
            .with_hint("vzcluster status shows which nodes answer")
    }
}

/// A command that the log did not carry out.
pub(super) fn propose(error: &ProposeError) -> Failure {
    let text = chain(error);
    match error {
        ProposeError::Refused(refused) => refuse(refused),
        ProposeError::InDoubt { .. } => Failure::new("in-doubt", exit::UNREACHABLE, text)
            .with_hint("look at the state before trying again"),
        ProposeError::NoLeader { .. } => Failure::new("no-majority", exit::UNREACHABLE, text)
            .with_hint("vzcluster status shows which nodes answer"),
        ProposeError::Stopped { .. } => Failure::new("cluster-stopped", exit::SYSTEM, text)
            .with_hint("the daemon's log says why; restart vzd"),
    }
}

/// A refusal of the log.
pub(super) fn refuse(refused: &Refused) -> Failure {
    let text = refused.to_string();
    match refused {
        Refused::TokenUnknown => Failure::new("token-unknown", exit::TOKEN, text)
            .with_hint("make one with vzcluster token on a member"),
        Refused::TokenUsed { .. } => Failure::new("token-used", exit::TOKEN, text)
            .with_hint("a token is good for one node; make another with vzcluster token"),
        Refused::TokenExpired => Failure::new("token-expired", exit::TOKEN, text)
            .with_hint("make another with vzcluster token, perhaps with a longer --ttl"),
        Refused::NodeNameTaken { .. } => {
            Failure::new("name-taken", exit::TAKEN, text).with_hint("choose another with --name")
        }
        Refused::NodeAddressTaken { .. } => Failure::new("address-taken", exit::TAKEN, text),
        Refused::Clashes { .. } => Failure::new("ve-clash", exit::TAKEN, text)
            .with_hint("rename, renumber or remove these VEs before joining"),
        Refused::VeTaken { clashes } => ve_taken(clashes, text),
        Refused::NoVe { .. } => Failure::new("no-such-ve", exit::NO_VE, text),
        Refused::Migrating { .. } => Failure::new("ve-migrating", exit::LOCKED, text)
            .with_hint("wait for the migration to end"),
        Refused::NodeOwnsVes { .. } => Failure::new("node-owns-ves", exit::STATE, text)
            .with_hint("move them away with vzmigrate, or destroy them"),
        Refused::NodeMigrates { .. } => Failure::new("node-migrates", exit::STATE, text),
        Refused::NoNode { .. } | Refused::NodeRemoved { .. } => {
            Failure::new("no-such-node", exit::STATE, text)
        }
        Refused::LastNode => Failure::new("last-node", exit::STATE, text),
        Refused::StaleEpoch { .. }
        | Refused::NotOwner { .. }
        | Refused::SameNode { .. }
        | Refused::CopyLeft { .. }
        | Refused::MigrationTaken { .. }
        | Refused::NoMigration { .. }
        | Refused::WrongStage { .. }
        | Refused::Founded => Failure::new("stale", exit::STATE, text),
    }
}

fn ve_taken(clashes: &[Clash], text: String) -> Failure {
    // The one that the user meant is named first by its code.
    let has = |wanted: fn(&Clash) -> bool| clashes.iter().any(wanted);
    if has(|clash| matches!(clash, Clash::Number { .. })) {
        Failure::new("ve-exists", exit::VE_EXISTS, text)
    } else if has(|clash| matches!(clash, Clash::Address { .. })) {
        Failure::new("address-in-use", exit::ADDRESS_IN_USE, text)
    } else {
        Failure::new("name-in-use", exit::VE_NAME, text)
    }
}

fn join(error: &JoinError) -> Failure {
    let text = chain(error);
    match error {
        JoinError::Connect(ConnectError::NotOfThisCluster { .. }) => {
            Failure::new("not-of-this-cluster", exit::FOREIGN, text)
                .with_hint("the token is of another cluster than the node at its address")
        }
        JoinError::Connect(ConnectError::Version { .. }) => {
            Failure::new("other-version", exit::FOREIGN, text)
                .with_hint("install the same version on both nodes")
        }
        JoinError::Connect(ConnectError::Foreign { .. }) => {
            Failure::new("not-a-node", exit::FOREIGN, text)
        }
        JoinError::Connect(_) => Failure::new("unreachable", exit::UNREACHABLE, text)
            .with_hint("is vzd running there, and does a firewall drop UDP to its port?"),
        JoinError::InDoubt { .. } | JoinError::TimedOut { .. } => {
            Failure::new("in-doubt", exit::UNREACHABLE, text)
                .with_hint("look at vzcluster status there before trying again")
        }
        JoinError::Socket(_) | JoinError::Tls(_) => {
            Failure::new("cluster-system", exit::SYSTEM, text)
        }
    }
}
