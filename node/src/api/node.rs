//! Requests about the daemon itself.

use serde::{Deserialize, Serialize};

use super::{Failure, server::to_value};
use crate::daemon::Daemon;

/// Requests about the daemon itself.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum NodeRequest {
    /// Is it there, and what is it? Answered by [`NodeStatus`].
    Status,
    /// All figures for a monitoring system, as text in the OpenMetrics format.
    Metrics,
}

/// What a daemon says about itself.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeStatus {
    /// The daemon's version.
    pub version: String,
    /// Its process number.
    pub pid: u32,
}

pub(super) fn handle(daemon: &Daemon, request: &NodeRequest) -> Result<serde_json::Value, Failure> {
    match request {
        NodeRequest::Status => to_value(NodeStatus {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            pid: std::process::id(),
        }),
        NodeRequest::Metrics => to_value(daemon.metrics()),
    }
}
