//! What a daemon must know of a checkpoint or a restore after it has died in the middle of it.
//!
//! One small file beside the VE, as that of a migration: it speaks of living processes. It is
//! replaced as a whole before the step that it announces.

use std::{
    io,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};

use crate::ve::{self, VeError};

/// How far a checkpoint or a restore is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Step {
    /// The VE is written into a file; it goes on if anything happens.
    Dumping,
    /// The file is complete, and the VE is to end.
    Stopping,
    /// The VE is built; nothing of it may live on.
    Restoring {
        /// What its files are.
        files: Files,
    },
    /// The VE was built, and runs.
    Released {
        /// What its files are.
        files: Files,
    },
}

/// What the files of a VE are that is restored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Files {
    /// Those that it had.
    Own,
    /// Those of the checkpoint; what it had is put aside.
    Replaced,
    /// Those of the checkpoint, with which the VE itself came.
    Arrived,
}

/// Where the journal of one VE is.
#[derive(Clone, Debug)]
pub(super) struct Journal(PathBuf);

impl Journal {
    /// In the VE's own directory.
    pub(super) fn new(directory: &Path) -> Self {
        Self(directory.join("checkpoint.json"))
    }

    /// Writes the next step down.
    pub(super) fn write(&self, step: Step) -> io::Result<()> {
        let entry = serde_json::to_vec(&step).map_err(io::Error::from)?;
        let draft = self.0.with_extension("new");
        std::fs::write(&draft, entry)?;
        std::fs::rename(&draft, &self.0)
    }

    /// What was written last, if anything is under way.
    pub(super) fn read(&self) -> Result<Option<Step>, VeError> {
        ve::read_durable(&self.0)
    }

    /// It has ended.
    pub(super) fn remove(&self) -> io::Result<()> {
        match std::fs::remove_file(&self.0) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }
}
