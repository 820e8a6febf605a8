//! Requests about the cluster.

use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::{Failure, server::to_value};
use crate::cluster::{InitOptions, JoinOptions};
use crate::daemon::Daemon;

/// Requests about the cluster.
#[derive(Clone, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ClusterRequest {
    /// Make this node the first of a cluster. Answered by [`MemberView`].
    Init {
        /// What it is called.
        name: Option<String>,
        /// Where it listens.
        address: Option<String>,
    },
    /// Make a token. Answered by the token, a string.
    Token {
        /// How long it is good for.
        lifetime_seconds: u64,
    },
    /// Enter a cluster. Answered by [`MemberView`].
    Join {
        /// The token.
        token: String,
        /// What this node is called.
        name: Option<String>,
        /// Where it listens.
        address: Option<String>,
    },
    /// The cluster at a glance. Answered by [`ClusterStatus`](crate::cluster::ClusterStatus).
    Status,
    /// The same with what each host offers.
    Check,
    /// Limit what the moves from each node may send together.
    Bandwidth {
        /// In bytes per second; `None` for no limit.
        limit: Option<u64>,
    },
    /// Remove a node.
    Remove {
        /// Its name or number.
        node: String,
    },
}

impl std::fmt::Debug for ClusterRequest {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // Requests are logged; a token is a secret while it is not used.
        f.write_str(match self {
            Self::Init { .. } => "Init",
            Self::Token { .. } => "Token",
            Self::Join { .. } => "Join",
            Self::Status => "Status",
            Self::Check => "Check",
            Self::Bandwidth { .. } => "Bandwidth",
            Self::Remove { .. } => "Remove",
        })
    }
}

/// This node as a member.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemberView {
    /// Its number.
    pub node: u64,
    /// Its name.
    pub name: String,
    /// Where it listens.
    pub address: String,
    /// Whether the others have reached it there.
    pub reached: bool,
}

pub(super) async fn handle(
    daemon: &Arc<Daemon>,
    request: ClusterRequest,
) -> Result<serde_json::Value, Failure> {
    let cluster = &daemon.cluster;
    let view = |member: crate::cluster::Member, reached| {
        let address = member.address.map(|address| address.to_string()).unwrap_or_default();
        to_value(MemberView { node: member.node.0, name: member.name, address, reached })
    };
    match request {
        ClusterRequest::Init { name, address } => {
            view(cluster.init(InitOptions { name, address }).await?, true)
        }
        ClusterRequest::Token { lifetime_seconds } => {
            let token = cluster.token(Duration::from_secs(lifetime_seconds)).await?;
            to_value(token.to_string())
        }
        ClusterRequest::Join { token, name, address } => {
            let joined = cluster.join(JoinOptions { token, name, address }).await?;
            view(joined.member, joined.settled)
        }
        ClusterRequest::Status => to_value(cluster.status(false).await),
        ClusterRequest::Check => to_value(cluster.status(true).await),
        ClusterRequest::Bandwidth { limit } => to_value(cluster.limit_bandwidth(limit).await?),
        ClusterRequest::Remove { node } => to_value(cluster.remove(&node).await?.0),
    }
}
