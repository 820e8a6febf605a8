//! Becoming a member of another cluster.
//!
//! The order makes every crash harmless: the new membership is complete on the disk before it is
//! swapped in, and the old log stays until then.

use std::sync::Arc;
use std::time::{Duration, Instant};

use coordinator::{RequestId, VeBrought};
use transport::{Authority, JoinToken, SigningRequest, Versions, request_join};

use super::admission::{JoinAnswer, JoinRequest};
use super::files::{Directory, Member};
use super::service::{
    Active, CLOSING, Cluster, ClusterError, JoinOptions, bind, choose_address, facts, open_log,
};

/// How long one member may take to answer.
const PATIENCE: Duration = Duration::from_secs(15);
/// How long the cluster may take to make this node a full member.
const SETTLING: Duration = Duration::from_secs(15);

/// What became of a request to join.
#[derive(Debug)]
pub(crate) struct Joined {
    pub(crate) member: Member,
    /// Whether the cluster's other nodes have reached this one.
    pub(crate) settled: bool,
}

impl Cluster {
    /// Takes this node, with its VEs, into the cluster that gave out the token.
    pub(crate) async fn join(
        self: &Arc<Self>,
        options: JoinOptions,
    ) -> Result<Joined, ClusterError> {
        let _one = self.changing.lock().await;
        let token: JoinToken = options.token.parse()?;
        let old = self.active();
        self.expect_alone(&old).await?;
        let mut member = old.member.clone();
        member.address = Some(choose_address(options.address.as_deref())?);
        member.name = options.name.unwrap_or(member.name);
        let signing = SigningRequest::create()?;
        let request = self.request(&token, &member, &signing);
        let answer = ask(&token, &member.name, &request).await?;
        let JoinAnswer::Welcome { node, cluster, certificate, authority, authority_key } = answer
        else {
            return Err(match answer {
                JoinAnswer::Refused(refused) => ClusterError::Refused(refused),
                JoinAnswer::Undecided { cause } => ClusterError::NotAdmitted { cause },
                JoinAnswer::Welcome { .. } => ClusterError::Unintelligible,
            });
        };
        member.node = node;
        member.cluster = cluster;
        let identity = signing.complete(node, &certificate, &authority)?;
        let prepared = Directory::prepare(&self.state_directory)?;
        Authority::from_pem(&authority, &authority_key)?.save(prepared.path())?;
        identity.save(prepared.path())?;
        prepared.set_member(&member)?;
        if let Some(endpoint) = &old.endpoint {
            // That of a cluster which has removed this node.
            endpoint.shut_down(CLOSING).await;
        }
        let endpoint = bind(&member, identity)?;
        old.coordinator.stop(CLOSING).await;
        let directory = prepared.install(&self.state_directory)?;
        let coordinator = open_log(&directory, &member).await?;
        self.set_active(Active { member: member.clone(), coordinator, endpoint: None });
        self.attach(endpoint);
        let settled = self.settle().await;
        tracing::info!(name = member.name, %node, settled, "joined a cluster");
        Ok(Joined { member, settled })
    }

    fn request(&self, token: &JoinToken, member: &Member, signing: &SigningRequest) -> JoinRequest {
        let state = self.coordinator().state();
        let ves = state.owned_by(self.node()).map(|(ve, record)| VeBrought {
            ve,
            facts: record.facts.clone(),
            desired: record.desired,
        });
        JoinRequest {
            id: RequestId(rand::random()),
            secret: token.secret,
            signing_request: signing.der.clone(),
            facts: facts(member),
            ves: ves.collect(),
        }
    }

    /// Waits until this node takes part in decisions, which shows that the others reach it.
    async fn settle(&self) -> bool {
        let coordinator = self.coordinator();
        let mut states = coordinator.watch();
        let begun = Instant::now();
        while begun.elapsed() < SETTLING {
            let leadership = coordinator.leadership();
            let known = states.borrow_and_update().nodes.contains_key(&self.node());
            if known && (leadership.voters.contains(&self.node()) || leadership.voters.len() > 2) {
                return true;
            }
            // A state that does not change says nothing; then look again.
            let _ = tokio::time::timeout(Duration::from_millis(100), states.changed()).await;
        }
        false
    }
}

async fn ask(
    token: &JoinToken,
    name: &str,
    request: &JoinRequest,
) -> Result<JoinAnswer, ClusterError> {
    let bytes = ckpt_format::codec::encode(request);
    let mut answer = request_join(token, name, bytes.clone(), Versions::CURRENT, PATIENCE).await;
    if let Err(transport::JoinError::InDoubt { .. }) = &answer {
        // The same wish under the same id: it lets one node in, not two.
        answer = request_join(token, name, bytes, Versions::CURRENT, PATIENCE).await;
    }
    ckpt_format::codec::decode(&answer?).map_err(|_| ClusterError::Unintelligible)
}
