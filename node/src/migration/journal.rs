//! What a daemon must know of a migration after it has died in the middle of it.
//!
//! One small file beside the VE, replaced as a whole before the step that it announces. It speaks
//! of living processes, which a power cut ends as well, so it outlives a killed daemon but need
//! not be on the disk: nothing waits for the disk in the blackout. On the
//! source: *copying* (the VE may be let go on at any time) and *sealed* (only the log says).
//! On the target: *building* (nothing of it may live on) and *released* (it runs here).

use std::{
    io,
    path::{Path, PathBuf},
};

use coordinator::MigrationId;
use serde::{Deserialize, Serialize};
use transport::NodeId;

use crate::ve::{self, MOVE_JOURNAL, VeError};

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
    /// The node at the other end, if pages of the VE go there, or come from there, when it runs on
    /// the target already.
    #[serde(default)]
    pub(super) postcopy: Option<NodeId>,
}

/// Where the journal of one VE is.
#[derive(Clone, Debug)]
pub(super) struct Journal(PathBuf);

impl Journal {
    /// In the VE's own directory.
    pub(super) fn new(directory: &Path) -> Self {
        Self(directory.join(MOVE_JOURNAL))
    }

    /// Writes the next step down.
    pub(super) fn write(&self, migration: MigrationId, step: Step) -> io::Result<()> {
        self.write_entry(Entry { migration, step, postcopy: None })
    }

    /// The same for a move that ends in post-copy with that node.
    pub(super) fn write_postcopy(
        &self,
        migration: MigrationId,
        step: Step,
        other: NodeId,
    ) -> io::Result<()> {
        self.write_entry(Entry { migration, step, postcopy: Some(other) })
    }

    fn write_entry(&self, entry: Entry) -> io::Result<()> {
        let entry = serde_json::to_vec(&entry).map_err(io::Error::from)?;
        let draft = self.0.with_extension("new");
        std::fs::write(&draft, entry)?;
        std::fs::rename(&draft, &self.0)
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
