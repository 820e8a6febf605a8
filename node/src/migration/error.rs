//! Why a migration did not happen, as the user reads it.

use std::time::Duration;

use ckpt_engine::{container::ContainerError, track::TrackError};
use ckpt_format::blocker::{self, Blocker};
use coordinator::{ProposeError, ReadError};
use transport::{CallError, LinkError};

use super::blackout::CopyError;
use crate::{
    api::{Failure, chain},
    network::NetworkError,
    storage::TreeError,
    template::TemplateError,
    ve::VeError,
};

/// Why a VE was not moved. It runs on where it was, unless the error says otherwise.
#[derive(Debug, thiserror::Error)]
pub(super) enum MigrateError {
    /// It does not run.
    #[error("VE {ve} is not running")]
    NotRunning {
        /// The VE.
        ve: u32,
    },
    /// The log does not know it.
    #[error("VE {ve} is not registered in the cluster")]
    Unregistered {
        /// The VE.
        ve: u32,
    },
    /// No node has that name.
    #[error("there is no node {name} in the cluster")]
    UnknownNode {
        /// The name.
        name: String,
    },
    /// It is there already.
    #[error("the VE is on {name} already")]
    SameNode {
        /// The name.
        name: String,
    },
    /// The node has no address.
    #[error("{name} has no address in the cluster")]
    NoAddress {
        /// The name.
        name: String,
    },
    /// The node does not answer.
    #[error("cannot reach {name}")]
    Unreachable {
        /// The name.
        name: String,
        /// Why.
        source: CallError,
    },
    /// Something in the VE cannot be moved.
    #[error("{} in the VE cannot be moved: {}", objects(.0), list(.0))]
    Blocked(Vec<Blocker>),
    /// The target could not run a VE before all its memory is there.
    #[error("{name} cannot take in a VE by post-copy: {cause}")]
    NoPostcopy {
        /// The name.
        name: String,
        /// Why not.
        cause: String,
    },
    /// The target said no.
    #[error("the target refused: {0}")]
    Refused(Failure),
    /// The target gave up half way.
    #[error("the target gave up: {0}")]
    TargetFailed(Failure),
    /// The user changed their mind.
    #[error("aborted; the VE runs on here")]
    Cancelled,
    /// The VE could not be copied.
    #[error(transparent)]
    Copy(#[from] CopyError),
    /// It would stand still for longer than the user accepts.
    #[error(
        "the VE was not moved and runs on: it would stand still for about {} ms, and {} ms are \
         accepted",
        expected.as_millis(), budget.as_millis()
    )]
    OverBudget {
        /// What the user accepts.
        budget: Duration,
        /// What it would be.
        expected: Duration,
    },
    /// The link broke.
    #[error("lost the link to the target")]
    Link(#[from] LinkError),
    /// The stream broke.
    #[error("the target takes no more data")]
    Broken,
    /// The target says nothing.
    #[error("the target did not answer within {} s", waited.as_secs())]
    Silent {
        /// How long we waited.
        waited: Duration,
    },
    /// The target says something else than it should.
    #[error("the target does not follow the protocol")]
    Protocol,
    /// The move failed after the seal, and the log gave the VE back.
    #[error("the move failed and the VE runs on here: {cause}")]
    Stayed {
        /// What had happened.
        cause: String,
    },
    /// The log refused or did not answer.
    #[error(transparent)]
    Log(#[from] ProposeError),
    /// The log could not be read.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// The runtime refused.
    #[error(transparent)]
    Ve(#[from] VeError),
    /// The network of the VE.
    #[error(transparent)]
    Network(#[from] NetworkError),
    /// The template's archive.
    #[error(transparent)]
    Template(#[from] TemplateError),
    /// The template's archive cannot be read.
    #[error("cannot read the archive of the template")]
    Archive(#[source] std::io::Error),
    /// The container of the VE.
    #[error(transparent)]
    Container(#[from] ContainerError),
    /// The journal.
    #[error("cannot write the journal of the migration")]
    Journal(#[source] std::io::Error),
    /// The VE cannot be looked into.
    #[error("cannot look into the VE")]
    Inside(#[source] std::io::Error),
    /// A part of the daemon panicked.
    #[error("a part of the daemon failed")]
    Daemon(#[from] tokio::task::JoinError),
}

fn objects(blockers: &[Blocker]) -> String {
    match blockers.len() {
        1 => "an object".to_owned(),
        many => format!("{many} objects"),
    }
}

fn list(blockers: &[Blocker]) -> String {
    let lines = blocker::lines(blockers);
    match lines.len() {
        1 => lines.concat(),
        _ => lines.iter().map(|line| format!("\n  {line}")).collect(),
    }
}

impl MigrateError {
    /// True if the VE was not any more what the target had been told to make: a service has
    /// started or ended that has mounts or namespaces of its own. Begun again it may well move.
    pub(super) fn is_about_arrangement(&self) -> bool {
        matches!(
            self,
            Self::Copy(
                CopyError::Rearranged
                    | CopyError::Memory(TrackError::Unshared { .. })
                    | CopyError::Files(TreeError::Hidden { .. })
            )
        )
    }
}

impl From<MigrateError> for Failure {
    /// The exit codes are those that vzmigrate always had, see docs/reference/exit-codes.md.
    fn from(error: MigrateError) -> Self {
        let (code, exit) = match &error {
            MigrateError::NotRunning { .. } => ("ve-not-running", 2),
            MigrateError::Unregistered { .. } => ("ve-unknown", 10),
            MigrateError::UnknownNode { .. } => ("node-unknown", 4),
            MigrateError::NoAddress { .. } | MigrateError::Unreachable { .. } => {
                ("node-unreachable", 4)
            }
            MigrateError::SameNode { .. } => ("same-node", 34),
            MigrateError::Blocked(_) => ("blocked", 8),
            MigrateError::Copy(CopyError::Capture(
                ckpt_engine::capture::CaptureError::Blocked(_),
            )) => ("blocked", 8),
            MigrateError::Refused(failure) | MigrateError::TargetFailed(failure) => {
                (failure.code.as_str(), failure.exit)
            }
            MigrateError::NoPostcopy { .. } => ("no-postcopy", 56),
            MigrateError::OverBudget { .. } => ("over-budget", 27),
            MigrateError::Cancelled => ("cancelled", 25),
            MigrateError::Copy(_) => ("copy", 6),
            MigrateError::Link(_) | MigrateError::Broken => ("link-lost", 21),
            MigrateError::Silent { .. } => ("timeout", 22),
            MigrateError::Protocol => ("protocol", 26),
            MigrateError::Stayed { .. } => ("stayed", 7),
            MigrateError::Log(ProposeError::Refused(_)) => ("log-refused", 20),
            MigrateError::Log(_) | MigrateError::Read(_) => ("no-quorum", 4),
            MigrateError::Ve(_)
            | MigrateError::Network(_)
            | MigrateError::Template(_)
            | MigrateError::Archive(_)
            | MigrateError::Journal(_)
            | MigrateError::Container(_)
            | MigrateError::Inside(_)
            | MigrateError::Daemon(_) => ("system", 2),
        };
        let (code, hint) = (code.to_owned(), hint(&error));
        let failure = Self::new(&code, exit, chain(&error));
        match hint {
            Some(hint) => failure.with_hint(hint),
            None => failure,
        }
    }
}

fn hint(error: &MigrateError) -> Option<&'static str> {
    match error {
        MigrateError::OverBudget { .. } => {
            Some("give a larger --max-downtime or --postcopy, or try when the VE writes less")
        }
        MigrateError::NoPostcopy { .. } => Some("without --postcopy it can"),
        MigrateError::UnknownNode { .. } => Some("vzcluster status lists the nodes"),
        MigrateError::Unreachable { .. } | MigrateError::NoAddress { .. } => {
            Some("vzcluster status tells which nodes answer")
        }
        MigrateError::NotRunning { .. } => Some("start it first: vzctl start"),
        MigrateError::Blocked(_) => Some("vzctl check looks again"),
        _ => None,
    }
}
