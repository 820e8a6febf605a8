//! The VEs of this node in the cluster's log: what the VE runtime tells it.
//!
//! Numbers, names and addresses are unique in the whole cluster; the refusals say who has what.

use coordinator::{
    Command, Coordinator, Desired, Epoch, ProposeError, Refused, Response, VeFacts, VeId, VeRecord,
};

use super::failure::{propose, refuse};
use super::service::Cluster;
use crate::api::Failure;

impl Cluster {
    /// Enters a new VE, owned by this node. Done before anything of it is made.
    pub async fn register(&self, ve: VeId, facts: VeFacts) -> Result<Epoch, Failure> {
        let active = self.active();
        let register = Command::RegisterVe { ve, owner: active.member.node, facts };
        match active.coordinator.propose(register).await {
            Ok(Response::Epoch { epoch }) => Ok(epoch),
            Ok(_) => Err(Failure::new("internal", 3, "the log gave a foreign answer")),
            Err(error) => Err(propose(&error)),
        }
    }

    /// Changes what a VE of this node is.
    pub async fn update(&self, ve: VeId, facts: VeFacts) -> Result<(), Failure> {
        self.change(ve, |epoch| Command::UpdateVe { ve, epoch, facts: facts.clone() }).await
    }

    /// Says whether a VE of this node should run.
    pub async fn set_desired(&self, ve: VeId, desired: Desired) -> Result<(), Failure> {
        self.change(ve, |epoch| Command::SetDesired { ve, epoch, desired }).await
    }

    /// Strikes a VE of this node out. Done after everything of it is gone.
    pub async fn unregister(&self, ve: VeId) -> Result<(), Failure> {
        self.change(ve, |epoch| Command::UnregisterVe { ve, epoch }).await
    }

    /// The VE as the log has it, if this node owns it, as far as this node knows.
    pub fn owned(&self, ve: VeId) -> Option<VeRecord> {
        let active = self.active();
        let state = active.coordinator.state();
        state.ves.get(&ve).filter(|record| record.owner == active.member.node).cloned()
    }

    /// Whether this node may run the VE: asked of the whole cluster, so that a node which was
    /// away does not believe its old memory.
    pub async fn may_run(&self, ve: VeId) -> Result<bool, Failure> {
        let active = self.active();
        let state = active.coordinator.read().await?;
        Ok(state.ves.get(&ve).is_some_and(|record| record.owner == active.member.node))
    }

    /// Proposes a change in the epoch this node knows, and once more in the newest if that was
    /// an old one.
    async fn change(&self, ve: VeId, command: impl Fn(Epoch) -> Command) -> Result<(), Failure> {
        let coordinator = self.coordinator();
        let known = self.owned(ve).map(|record| record.epoch);
        if let Some(epoch) = known {
            match coordinator.propose(command(epoch)).await {
                Ok(_) => return Ok(()),
                Err(ProposeError::Refused(Refused::StaleEpoch { .. })) => {}
                Err(error) => return Err(propose(&error)),
            }
        }
        let epoch = self.newest_epoch(&coordinator, ve).await?;
        match coordinator.propose(command(epoch)).await {
            Ok(_) => Ok(()),
            Err(error) => Err(propose(&error)),
        }
    }

    async fn newest_epoch(&self, coordinator: &Coordinator, ve: VeId) -> Result<Epoch, Failure> {
        let state = coordinator.read().await?;
        let record = state.ves.get(&ve).ok_or_else(|| refuse(&Refused::NoVe { ve }))?;
        let believed = self.node();
        if record.owner != believed {
            return Err(refuse(&Refused::NotOwner { ve, believed, owner: record.owner }));
        }
        Ok(record.epoch)
    }
}
