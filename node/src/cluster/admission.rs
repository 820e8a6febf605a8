//! Letting nodes in: what a stranger asks, and what a member answers.

use std::net::SocketAddr;
use std::sync::Weak;
use std::time::Duration;

use coordinator::{Command, NodeFacts, ProposeError, Refused, RequestId, Response, VeBrought};
use futures_util::FutureExt as _;
use futures_util::future::BoxFuture;
use serde::{Deserialize, Serialize};
use transport::{Authority, JoinHandler, NodeId};

use super::files::Directory;
use super::service::Cluster;
use crate::api::chain;

/// How long the cluster may take to decide.
const PATIENCE: Duration = Duration::from_secs(10);

/// What a stranger asks.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct JoinRequest {
    /// Names the wish, so that asking again does not let two nodes in.
    pub(super) id: RequestId,
    /// The token's secret.
    pub(super) secret: [u8; 32],
    /// The public key to certify.
    pub(super) signing_request: Vec<u8>,
    pub(super) facts: NodeFacts,
    /// The VEs it brings along.
    pub(super) ves: Vec<VeBrought>,
}

/// What a member answers.
#[derive(Clone, Serialize, Deserialize)]
pub enum JoinAnswer {
    /// Come in.
    Welcome {
        /// The newcomer's number.
        node: NodeId,
        /// The cluster's id.
        cluster: String,
        /// The newcomer's certificate, in PEM.
        certificate: String,
        /// The authority's certificate, in PEM.
        authority: String,
        /// The authority's key, in PEM: a member may let others in.
        authority_key: String,
    },
    /// The log says no.
    Refused(Refused),
    /// There was no decision.
    Undecided {
        /// Why.
        cause: String,
    },
}

impl std::fmt::Debug for JoinAnswer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // Never the key.
        match self {
            Self::Welcome { node, cluster, .. } => {
                write!(f, "Welcome {{ node: {node}, cluster: {cluster} }}")
            }
            Self::Refused(refused) => write!(f, "Refused({refused:?})"),
            Self::Undecided { cause } => write!(f, "Undecided({cause})"),
        }
    }
}

/// Answers strangers.
pub(super) struct Doorkeeper(pub(super) Weak<Cluster>);

impl JoinHandler for Doorkeeper {
    fn join(&self, address: SocketAddr, request: Vec<u8>) -> BoxFuture<'static, Vec<u8>> {
        let cluster = self.0.upgrade();
        async move {
            let undecided = |cause: &str| JoinAnswer::Undecided { cause: cause.to_owned() };
            let answer = match (cluster, ckpt_format::codec::decode(&request)) {
                (Some(cluster), Ok(request)) => cluster.admit(request).await,
                (None, _) => undecided("the member is shutting down"),
                (_, Err(_)) => undecided("the request is unintelligible"),
            };
            tracing::info!(%address, ?answer, "a node asked to join");
            ckpt_format::codec::encode(&answer)
        }
        .boxed()
    }
}

impl Cluster {
    async fn admit(&self, request: JoinRequest) -> JoinAnswer {
        let active = self.active();
        let token = hex::encode(blake3::hash(&request.secret).as_bytes());
        let admit = Command::AdmitNode { token, facts: request.facts, ves: request.ves };
        let node = match active.coordinator.propose_as(request.id, admit, PATIENCE).await {
            Ok(Response::Admitted { node }) => node,
            Ok(_) => return JoinAnswer::Undecided { cause: "a foreign answer".to_owned() },
            Err(ProposeError::Refused(refused)) => return JoinAnswer::Refused(refused),
            Err(error) => return JoinAnswer::Undecided { cause: chain(&error) },
        };
        let directory = Directory::current(&self.state_directory);
        let certified = Authority::load(directory.path()).and_then(|authority| {
            let certificate = authority.sign(&request.signing_request, node)?;
            Ok((certificate, authority))
        });
        match certified {
            Ok((certificate, authority)) => JoinAnswer::Welcome {
                node,
                cluster: active.member.cluster,
                certificate,
                authority: authority.certificate_pem().to_owned(),
                authority_key: authority.key_pem().to_owned(),
            },
            Err(error) => JoinAnswer::Undecided { cause: chain(&error) },
        }
    }
}
