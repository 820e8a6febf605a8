//! Which VEs there are.

use transport::NodeId;

use super::super::command::{Answer, Clash, Refused, Response, VeFacts};
use super::super::ids::{Epoch, VeId};
use super::super::state::{Desired, State, VeRecord};

impl State {
    pub(super) fn register_ve(&mut self, ve: VeId, owner: NodeId, facts: VeFacts) -> Answer {
        self.expect_node(owner)?;
        let clashes = self.clashes(ve, &facts, true);
        if !clashes.is_empty() {
            return Err(Refused::VeTaken { clashes });
        }
        let epoch = self.first_epoch();
        let desired = Desired::Stopped;
        self.ves.insert(ve, VeRecord { facts, owner, epoch, desired, migration: None });
        Ok(Response::Epoch { epoch })
    }

    pub(super) fn update_ve(&mut self, ve: VeId, epoch: Epoch, facts: VeFacts) -> Answer {
        self.expect_free(ve, epoch)?;
        let clashes = self.clashes(ve, &facts, false);
        if !clashes.is_empty() {
            return Err(Refused::VeTaken { clashes });
        }
        if let Some(record) = self.ves.get_mut(&ve) {
            record.facts = facts;
        }
        Ok(Response::Epoch { epoch })
    }

    pub(super) fn unregister_ve(&mut self, ve: VeId, epoch: Epoch) -> Answer {
        self.expect_free(ve, epoch)?;
        self.ves.remove(&ve);
        self.epochs_retired = self.epochs_retired.max(epoch);
        Ok(Response::Done)
    }

    pub(super) fn set_desired(&mut self, ve: VeId, epoch: Epoch, desired: Desired) -> Answer {
        self.expect_free(ve, epoch)?;
        if let Some(record) = self.ves.get_mut(&ve) {
            record.desired = desired;
        }
        Ok(Response::Epoch { epoch })
    }

    /// Above every epoch of a VE that was struck out, so that a late command meant for an earlier
    /// VE of the same number never hits a later one.
    pub(super) fn first_epoch(&self) -> Epoch {
        self.epochs_retired.next()
    }

    /// The VE, in the epoch believed in.
    pub(super) fn expect_ve(&self, ve: VeId, believed: Epoch) -> Result<&VeRecord, Refused> {
        let record = self.ves.get(&ve).ok_or(Refused::NoVe { ve })?;
        if record.epoch != believed {
            return Err(Refused::StaleEpoch { ve, believed, current: record.epoch });
        }
        Ok(record)
    }

    /// The VE, in the epoch believed in and not on the move.
    pub(super) fn expect_free(&self, ve: VeId, believed: Epoch) -> Result<&VeRecord, Refused> {
        let record = self.expect_ve(ve, believed)?;
        match record.migration.and_then(|id| self.migrations.get(&id)) {
            Some(migration) => Err(Refused::Migrating {
                ve,
                source_node: migration.source,
                target: migration.target,
            }),
            None => Ok(record),
        }
    }

    /// What the VE cannot have because another has it.
    pub(super) fn clashes(&self, ve: VeId, facts: &VeFacts, new: bool) -> Vec<Clash> {
        let mut clashes = Vec::new();
        for (&other, record) in &self.ves {
            if other == ve {
                if new {
                    clashes.push(Clash::Number { ve, owner: record.owner });
                }
                continue;
            }
            if let (Some(name), Some(taken)) = (&facts.name, &record.facts.name)
                && name == taken
            {
                clashes.push(Clash::Name { name: name.clone(), ve: other });
            }
            let shared = facts.addresses.intersection(&record.facts.addresses);
            clashes.extend(shared.map(|&address| Clash::Address { address, ve: other }));
        }
        clashes
    }
}
