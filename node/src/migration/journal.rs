//! What a daemon must know of a migration after it has died in the middle of it.
//!
//! One small file beside the VE, written before the step that it announces, and synced. On the
//! source: *copying* (the VE may be let go on at any time) and *sealed* (only the log says).
//! On the target: *building* (nothing of it may live on) and *released* (it runs here).

use std::{
    io,
    path::{Path, PathBuf},
};

use coordinator::MigrationId;
use serde::{Deserialize, Serialize};

use crate::ve::{self, VeError};

/// How far this node's part of a migration is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Step {
    /// Source: the VE is ours.
    Copying,
    /// Source: the log knows whose the VE is.
    Sealed,
    /// Target: the VE is not whole yet.
    Building,
    /// Target: the VE is ours and may run.
    Released,
}

/// The journal of one migration on one node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Entry {
    /// Which migration.
    pub(super) migration: MigrationId,
    /// How far.
    pub(super) step: Step,
}

/// Where the journal of one VE is.
#[derive(Clone, Debug)]
pub(super) struct Journal(PathBuf);

impl Journal {
    /// In the VE's own directory.
    pub(super) fn new(directory: &Path) -> Self {
        Self(directory.join("migration.json"))
    }

    /// Writes the next step down.
    pub(super) fn write(&self, migration: MigrationId, step: Step) -> Result<(), VeError> {
        ve::write_durably(&self.0, &Entry { migration, step })
    }

    /// What was written last, if a migration is under way.
    pub(super) fn read(&self) -> Result<Option<Entry>, VeError> {
        ve::read_durable(&self.0)
    }

    /// The migration has ended on this node.
    pub(super) fn remove(&self) -> io::Result<()> {
        match std::fs::remove_file(&self.0) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }
}
