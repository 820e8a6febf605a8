//! The cluster as the VE runtime asks it.

use coordinator::{Clash, Desired, ProposeError, Refused, VeFacts, VeId as LogId};
use futures_util::future::BoxFuture;

use super::service::Cluster;
use crate::{
    api::Failure,
    ve::{Entry, Registry, RegistryError, VeId},
};

fn log_id(id: VeId) -> LogId {
    LogId(id.number())
}

fn facts(entry: &Entry) -> VeFacts {
    VeFacts {
        name: entry.name.clone(),
        addresses: entry.addresses.iter().copied().collect(),
        spec: entry.config.clone(),
    }
}

impl Cluster {
    /// A refusal of the log in the runtime's words.
    fn refusal(&self, id: VeId, error: ProposeError) -> RegistryError {
        let node = |node| {
            let state = self.coordinator().state();
            state.node_name(node).map_or_else(|| format!("node {node}"), str::to_owned)
        };
        match error {
            ProposeError::Refused(Refused::NotOwner { owner, .. }) => {
                RegistryError::NotOwner { id, node: node(owner) }
            }
            ProposeError::Refused(Refused::VeTaken { clashes }) => {
                match clashes.into_iter().next() {
                    Some(Clash::Number { owner, .. }) => {
                        RegistryError::IdTaken { id, node: node(owner) }
                    }
                    Some(Clash::Name { name, ve }) => RegistryError::NameTaken { name, id: ve.0 },
                    Some(Clash::Address { address, ve }) => {
                        RegistryError::AddressTaken { address, id: ve.0 }
                    }
                    None => RegistryError::Unavailable("the log gave no reason".into()),
                }
            }
            other => RegistryError::Unavailable(Box::new(other)),
        }
    }
}

fn refused(failure: Failure) -> RegistryError {
    RegistryError::Refused(failure)
}

impl Registry for Cluster {
    fn register(&self, entry: Entry) -> BoxFuture<'_, Result<(), RegistryError>> {
        Box::pin(async move {
            let register = coordinator::Command::RegisterVe {
                ve: log_id(entry.id),
                owner: self.node(),
                facts: facts(&entry),
            };
            let proposed = self.coordinator().propose(register).await;
            proposed.map(drop).map_err(|error| self.refusal(entry.id, error))
        })
    }

    fn update(&self, entry: Entry) -> BoxFuture<'_, Result<(), RegistryError>> {
        Box::pin(async move {
            let (ve, facts) = (log_id(entry.id), facts(&entry));
            Self::update(self, ve, facts).await.map_err(refused)
        })
    }

    fn set_desired(&self, id: VeId, running: bool) -> BoxFuture<'_, Result<(), RegistryError>> {
        let desired = if running { Desired::Running } else { Desired::Stopped };
        Box::pin(async move { Self::set_desired(self, log_id(id), desired).await.map_err(refused) })
    }

    fn unregister(&self, id: VeId) -> BoxFuture<'_, Result<(), RegistryError>> {
        Box::pin(async move { Self::unregister(self, log_id(id)).await.map_err(refused) })
    }
}
