//! The VEs of this node in the cluster's log: what the VE runtime tells it.
//!
//! Numbers, names and addresses are unique in the whole cluster; the refusals say who has what.

use std::error::Error;

use coordinator::{
    Clash, Command, Coordinator, Desired, Epoch, ProposeError, Refused, State, VeFacts, VeId,
    VeRecord,
};
use futures_util::FutureExt as _;
use futures_util::future::BoxFuture;

use super::service::Cluster;
use crate::ve::{self, Entry, Registry, RegistryError};

impl Registry for Cluster {
    fn register(&self, entry: Entry) -> BoxFuture<'_, Result<(), RegistryError>> {
        async move {
            let active = self.active();
            let (id, facts) = read(entry);
            let (ve, owner) = (VeId(id.number()), active.member.node);
            let register = Command::RegisterVe { ve, owner, facts: facts.clone() };
            match active.coordinator.propose(register).await {
                Ok(_) => Ok(()),
                Err(error) if is_left_over(&error, ve, owner) => {
                    // This node entered it and died before it had made anything of it.
                    self.change(id, |epoch| Command::UpdateVe { ve, epoch, facts: facts.clone() })
                        .await
                }
                Err(error) => Err(explain(id, error, &active.coordinator.state())),
            }
        }
        .boxed()
    }

    fn update(&self, entry: Entry) -> BoxFuture<'_, Result<(), RegistryError>> {
        async move {
            let (id, facts) = read(entry);
            let ve = VeId(id.number());
            self.change(id, |epoch| Command::UpdateVe { ve, epoch, facts: facts.clone() }).await
        }
        .boxed()
    }

    fn set_desired(&self, id: ve::VeId, running: bool) -> BoxFuture<'_, Result<(), RegistryError>> {
        let ve = VeId(id.number());
        let desired = if running { Desired::Running } else { Desired::Stopped };
        self.change(id, move |epoch| Command::SetDesired { ve, epoch, desired }).boxed()
    }

    fn unregister(&self, id: ve::VeId) -> BoxFuture<'_, Result<(), RegistryError>> {
        async move {
            let ve = VeId(id.number());
            if !self.coordinator().read().await.map_err(unavailable)?.ves.contains_key(&ve) {
                // Struck out before, by an attempt whose end nobody saw.
                return Ok(());
            }
            self.change(id, |epoch| Command::UnregisterVe { ve, epoch }).await
        }
        .boxed()
    }
}

impl Cluster {
    /// The VE as the log has it, if this node owns it, as far as this node knows.
    pub fn owned(&self, ve: VeId) -> Option<VeRecord> {
        let active = self.active();
        let state = active.coordinator.state();
        state.ves.get(&ve).filter(|record| record.owner == active.member.node).cloned()
    }

    /// Enters a VE that this node has and the log does not know: one from before a crash or an
    /// upgrade. One that belongs to another node is left to whoever clears up after migrations.
    pub async fn adopt(&self, entry: Entry, running: bool) -> Result<(), RegistryError> {
        let state = self.coordinator().read().await.map_err(unavailable)?;
        let id = entry.id;
        if state.ves.contains_key(&VeId(id.number())) {
            return Ok(());
        }
        self.register(entry).await?;
        self.set_desired(id, running).await
    }

    /// Proposes a change in the epoch this node knows, and once more in the newest if that was
    /// an old one.
    async fn change(
        &self,
        id: ve::VeId,
        command: impl Fn(Epoch) -> Command + Send,
    ) -> Result<(), RegistryError> {
        let coordinator = self.coordinator();
        if let Some(record) = self.owned(VeId(id.number())) {
            match coordinator.propose(command(record.epoch)).await {
                Ok(_) => return Ok(()),
                Err(ProposeError::Refused(Refused::StaleEpoch { .. })) => {}
                Err(error) => return Err(explain(id, error, &coordinator.state())),
            }
        }
        let epoch = self.newest_epoch(&coordinator, id).await?;
        match coordinator.propose(command(epoch)).await {
            Ok(_) => Ok(()),
            Err(error) => Err(explain(id, error, &coordinator.state())),
        }
    }

    async fn newest_epoch(
        &self,
        coordinator: &Coordinator,
        id: ve::VeId,
    ) -> Result<Epoch, RegistryError> {
        let state = coordinator.read().await.map_err(unavailable)?;
        let ve = VeId(id.number());
        let record = state.ves.get(&ve).ok_or_else(|| unavailable(Refused::NoVe { ve }))?;
        if record.owner != self.node() {
            let node = node_name(&state, record.owner);
            return Err(RegistryError::NotOwner { id, node });
        }
        Ok(record.epoch)
    }
}

fn read(entry: Entry) -> (ve::VeId, VeFacts) {
    let Entry { id, name, addresses, config } = entry;
    (id, VeFacts { name, addresses: addresses.into_iter().collect(), spec: config })
}

fn unavailable(error: impl Error + Send + Sync + 'static) -> RegistryError {
    RegistryError::Unavailable(Box::new(error))
}

fn node_name(state: &State, node: transport::NodeId) -> String {
    state.node_name(node).map_or_else(|| format!("node {node}"), str::to_owned)
}

/// Whether a VE is refused only because this node itself has entered it before.
fn is_left_over(error: &ProposeError, ve: VeId, node: transport::NodeId) -> bool {
    match error {
        ProposeError::Refused(Refused::VeTaken { clashes }) => {
            *clashes == [Clash::Number { ve, owner: node }]
        }
        _ => false,
    }
}

/// A refusal in the runtime's words; of several clashes the first.
fn explain(id: ve::VeId, error: ProposeError, state: &State) -> RegistryError {
    let ProposeError::Refused(refused) = &error else { return unavailable(error) };
    match refused {
        Refused::VeTaken { clashes } => match clashes.first() {
            Some(Clash::Number { owner, .. }) => {
                RegistryError::IdTaken { id, node: node_name(state, *owner) }
            }
            Some(Clash::Name { name, ve }) => {
                RegistryError::NameTaken { name: name.clone(), id: ve.0 }
            }
            Some(Clash::Address { address, ve }) => {
                RegistryError::AddressTaken { address: *address, id: ve.0 }
            }
            None => unavailable(error),
        },
        Refused::NotOwner { owner, .. } => {
            RegistryError::NotOwner { id, node: node_name(state, *owner) }
        }
        _ => unavailable(error),
    }
}
