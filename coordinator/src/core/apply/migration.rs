//! A migration's way through the log.
//!
//! ```text
//! Begun ──▶ Switched ──▶ Running ───┐
//!   │           └──────▶ Returned ──┼──▶ Finished
//!   └─────▶ Aborted ────────────────┘
//! ```
//! A VE is reserved from `Begun` until its fate is known (`Running`, `Returned` or `Aborted`);
//! what is left then is clearing away, which must not keep the VE from moving on.

use transport::NodeId;

use super::super::command::{Answer, Refused, Response};
use super::super::ids::{Epoch, MigrationId, VeId};
use super::super::state::{ENDED_MAX, MigrationRecord, Stage, State};

impl State {
    pub(super) fn begin_migration(
        &mut self,
        id: MigrationId,
        ve: VeId,
        epoch: Epoch,
        source: NodeId,
        target: NodeId,
    ) -> Answer {
        let begun_ms = self.now_ms;
        let record =
            MigrationRecord { id, ve, epoch, source, target, stage: Stage::Begun, begun_ms };
        if let Some(known) = self.migrations.get(&id) {
            let same = MigrationRecord { begun_ms: known.begun_ms, ..record };
            return if *known == same {
                Ok(Response::Migration { record: same })
            } else {
                Err(Refused::MigrationTaken { migration: id })
            };
        }
        let free = self.expect_free(ve, epoch)?;
        if free.owner != source {
            return Err(Refused::NotOwner { ve, believed: source, owner: free.owner });
        }
        self.expect_node(target)?;
        if source == target {
            return Err(Refused::SameNode { ve, node: target });
        }
        if self.unfinished_on(target).any(|other| other.ve == ve) {
            return Err(Refused::CopyLeft { ve, node: target });
        }
        self.migrations.insert(id, record.clone());
        if let Some(ve) = self.ves.get_mut(&ve) {
            ve.migration = Some(id);
        }
        Ok(Response::Migration { record })
    }

    pub(super) fn switch(&mut self, id: MigrationId, epoch: Epoch) -> Answer {
        let record = self.expect_migration(id)?;
        if record.epoch != epoch {
            let (ve, current) = (record.ve, record.epoch);
            return Err(Refused::StaleEpoch { ve, believed: epoch, current });
        }
        let next = epoch.next();
        match record.stage {
            Stage::Begun => {
                let (ve, target) = (record.ve, record.target);
                self.set_stage(id, Stage::Switched);
                self.set_owner(ve, target, next);
                Ok(Response::Epoch { epoch: next })
            }
            Stage::Switched | Stage::Running => Ok(Response::Epoch { epoch: next }),
            stage => Err(Refused::WrongStage { migration: id, stage }),
        }
    }

    pub(super) fn abort_migration(&mut self, id: MigrationId) -> Answer {
        let record = self.expect_migration(id)?;
        match record.stage {
            Stage::Begun => {
                let ve = record.ve;
                self.set_stage(id, Stage::Aborted);
                self.release(ve, id);
                Ok(Response::Done)
            }
            Stage::Aborted => Ok(Response::Done),
            stage => Err(Refused::WrongStage { migration: id, stage }),
        }
    }

    pub(super) fn report_running(&mut self, id: MigrationId) -> Answer {
        let record = self.expect_migration(id)?;
        match record.stage {
            Stage::Switched => {
                let ve = record.ve;
                self.set_stage(id, Stage::Running);
                self.release(ve, id);
                Ok(Response::Done)
            }
            Stage::Running => Ok(Response::Done),
            stage => Err(Refused::WrongStage { migration: id, stage }),
        }
    }

    pub(super) fn return_ve(&mut self, id: MigrationId, epoch: Epoch) -> Answer {
        let record = self.expect_migration(id)?;
        let current = record.epoch.next();
        if current != epoch {
            return Err(Refused::StaleEpoch { ve: record.ve, believed: epoch, current });
        }
        let next = epoch.next();
        match record.stage {
            Stage::Switched => {
                let (ve, source) = (record.ve, record.source);
                self.set_stage(id, Stage::Returned);
                self.set_owner(ve, source, next);
                self.release(ve, id);
                Ok(Response::Epoch { epoch: next })
            }
            Stage::Returned => Ok(Response::Epoch { epoch: next }),
            stage => Err(Refused::WrongStage { migration: id, stage }),
        }
    }

    pub(super) fn finish_migration(&mut self, id: MigrationId) -> Answer {
        let record = self.expect_migration(id)?;
        match record.stage {
            Stage::Running | Stage::Returned | Stage::Aborted => {
                self.set_stage(id, Stage::Finished);
                self.ended.push_back(id);
                while self.ended.len() > ENDED_MAX {
                    if let Some(oldest) = self.ended.pop_front() {
                        self.migrations.remove(&oldest);
                    }
                }
                Ok(Response::Done)
            }
            Stage::Finished => Ok(Response::Done),
            stage => Err(Refused::WrongStage { migration: id, stage }),
        }
    }

    fn expect_migration(&self, id: MigrationId) -> Result<&MigrationRecord, Refused> {
        self.migrations.get(&id).ok_or(Refused::NoMigration { migration: id })
    }

    fn set_stage(&mut self, id: MigrationId, stage: Stage) {
        if let Some(record) = self.migrations.get_mut(&id) {
            assert!(record.stage.may_become(stage), "{id} from {} to {stage}", record.stage);
            record.stage = stage;
        }
    }

    fn set_owner(&mut self, ve: VeId, owner: NodeId, epoch: Epoch) {
        if let Some(record) = self.ves.get_mut(&ve) {
            assert!(record.epoch < epoch, "VE {ve} from epoch {} to {epoch}", record.epoch);
            record.owner = owner;
            record.epoch = epoch;
        }
    }

    fn release(&mut self, ve: VeId, id: MigrationId) {
        if let Some(record) = self.ves.get_mut(&ve)
            && record.migration == Some(id)
        {
            record.migration = None;
        }
    }
}
