//! What goes over the API socket.

use serde::{Deserialize, Serialize};

use super::{ClusterRequest, NodeRequest, TemplateRequest, VeRequest};
use crate::migration::{CheckpointRequest, MigrateRequest};

/// The longest request line accepted, in bytes.
pub(super) const REQUEST_LIMIT: usize = 1 << 20;

/// The most descriptors that travel with one message.
pub(super) const DESCRIPTORS_MAX: usize = 8;

/// A request, by the part of the daemon that answers it.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[expect(clippy::large_enum_variant, reason = "there is one of it at a time")]
pub enum Request {
    /// About the daemon itself.
    Node(NodeRequest),
    /// About the cluster.
    Cluster(ClusterRequest),
    /// About VEs.
    Ve(VeRequest),
    /// To move a VE to another node.
    Migrate(MigrateRequest),
    /// To write a VE into a file, or bring it back from there.
    Checkpoint(CheckpointRequest),
    /// About OS templates.
    Template(TemplateRequest),
}

/// One line of an answer.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Event {
    /// How far the work is.
    Progress(Progress),
    /// A line for the user.
    Log(String),
    /// A descriptor comes with this line: the master of a terminal that the client serves.
    Terminal,
    /// The end: what was asked for.
    Result(serde_json::Value),
    /// The end: why not.
    Error(Failure),
}

/// How far a piece of work is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Progress {
    /// What is being done, e.g. `downloading packages`.
    pub step: String,
    /// How much of it is done.
    pub done: u64,
    /// How much there is, where that is known.
    pub total: Option<u64>,
    /// What the numbers count: `bytes`, `packages`, `pages`.
    pub unit: String,
}

/// A failure as the vz programs report it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{message}")]
pub struct Failure {
    /// A word that never changes between versions, for programs.
    pub code: String,
    /// The exit status of the vz program.
    pub exit: i32,
    /// For people.
    pub message: String,
    /// What the user can do about it.
    pub hint: Option<String>,
}

impl Failure {
    /// A failure without a hint.
    pub fn new(code: &str, exit: i32, message: impl Into<String>) -> Self {
        Self { code: code.to_owned(), exit, message: message.into(), hint: None }
    }

    /// The same failure with a hint.
    #[must_use]
    pub fn with_hint(self, hint: impl Into<String>) -> Self {
        Self { hint: Some(hint.into()), ..self }
    }
}

/// An error and its causes on one line, as people read them.
pub fn chain(problem: &dyn std::error::Error) -> String {
    let mut text = problem.to_string();
    let mut cause = problem.source();
    while let Some(source) = cause {
        text.push_str(": ");
        text.push_str(&source.to_string());
        cause = source.source();
    }
    text
}
