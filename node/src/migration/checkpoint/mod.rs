//! Checkpoints a VE into a file, and restores it from there.
//!
//! The same capture and the same rebuild as in a migration, with a file between them in place of
//! a link: [`dump`] is the source's half, [`restore`] the target's. What differs is who owns the VE
//! meanwhile: always this node, so that the log is asked for nothing but whether the VE is to run.
//! [`journal`] and [`recover`] put right what a dead daemon has left half done.
//!
//! The VE's own files stay with it when it ends with its checkpoint, and the checkpoint lists what
//! they are: a restore onto other files is refused. A VE that goes on changes its files at once, so
//! then the checkpoint has all of them.

mod dump;
mod error;
mod fit;
mod journal;
mod outlet;
mod recover;
mod restore;

use std::{path::PathBuf, sync::Arc};

use ckpt_engine::sys::heap;
use serde::{Deserialize, Serialize};
use tokio::task::spawn_blocking;

use self::error::CheckpointError;
pub(super) use self::{outlet::Outlet, recover::recover};
use super::Migrations;
use crate::{
    api::{Failure, Sink, chain},
    ve::Ve,
};

/// Requests about checkpoints.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum CheckpointRequest {
    /// Write a VE into a file: [`CheckpointReport`].
    Dump(DumpRequest),
    /// Bring a VE back from a file: [`RestoreReport`].
    Restore {
        /// The VE, by number or name.
        ve: String,
        /// The file, by its whole path. None for the one that suspend has made.
        file: Option<PathBuf>,
    },
}

/// What chkpnt and suspend ask for.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct DumpRequest {
    /// The VE, by number or name.
    pub ve: String,
    /// The file, by its whole path. None to suspend: the daemon keeps it with the VE.
    pub file: Option<PathBuf>,
    /// Let the VE go on afterwards.
    pub leave_running: bool,
    /// Put all of the VE's own files into the checkpoint.
    pub with_files: bool,
    /// How hard to compress, 0 to 19.
    pub compress: u8,
}

/// What a finished checkpoint tells its user.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct CheckpointReport {
    /// The number of the VE.
    pub ve: u32,
    /// The file.
    pub file: PathBuf,
    /// How long it is, in bytes.
    pub bytes: u64,
    /// How much memory is in it, in bytes.
    pub memory_bytes: u64,
    /// How many processes.
    pub processes: u64,
    /// Whether all of the VE's own files are in it.
    pub with_files: bool,
    /// Whether the VE goes on.
    pub left_running: bool,
    /// How long the VE stood still until it went on, or was complete in the file, in milliseconds.
    pub standstill_ms: f64,
    /// All of it, in milliseconds.
    pub total_ms: f64,
}

/// What a finished restore tells its user.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RestoreReport {
    /// The number of the VE.
    pub ve: u32,
    /// How many processes it has.
    pub processes: u64,
    /// How long the file took to be verified, in milliseconds.
    pub verify_ms: f64,
    /// How long the VE took to be built, in milliseconds.
    pub rebuild_ms: f64,
    /// All of it, in milliseconds.
    pub total_ms: f64,
}

impl Migrations {
    /// Writes a VE into a file.
    pub async fn checkpoint(
        &self,
        request: &DumpRequest,
        sink: &Sink,
    ) -> Result<CheckpointReport, Failure> {
        let ve = self.context.runtime.find(&request.ve)?;
        let suspends = request.file.is_none();
        let operation = ve.operate_for_user(if suspends { "suspend" } else { "chkpnt" }).await?;
        ve.must_be_whole()?;
        let wish = dump::Wish {
            path: request.file.clone().unwrap_or_else(|| ve.suspended_file()),
            leave_running: request.leave_running && !suspends,
            with_files: request.with_files && !suspends,
            level: request.compress,
        };
        let (context, sink) = (self.context.clone(), sink.clone());
        // In a task of its own: a client that goes away cancels by `sink.closed()`.
        let work =
            tokio::spawn(async move { dump::dump(&context, &operation, &wish, &sink).await });
        let done = work.await.map_err(CheckpointError::Daemon).and_then(|done| done);
        spawn_blocking(heap::give_back);
        done.map_err(|error| error.failure(16))
    }

    /// Brings a VE back from a file.
    pub async fn restore(
        &self,
        ve: &str,
        file: Option<PathBuf>,
        sink: &Sink,
    ) -> Result<RestoreReport, Failure> {
        let (context, ve, sink) = (self.context.clone(), ve.to_owned(), sink.clone());
        let work = tokio::spawn(async move { restore::restore(&context, &ve, file, &sink).await });
        let done = work.await.map_err(CheckpointError::Daemon).and_then(|done| done);
        spawn_blocking(heap::give_back);
        done.map_err(|error| error.failure(17))
    }

    /// Resumes the suspended VEs that start with the node.
    pub async fn resume_on_boot(&self) {
        for ve in self.context.runtime.all() {
            let settings = ve.settings();
            if !ve.is_suspended() || !settings.on_boot || settings.disabled {
                continue;
            }
            if let Err(failure) = self.restore(&ve.id.to_string(), None, &Sink::nowhere()).await {
                tracing::error!(id = %ve.id, "cannot resume this VE: {failure}");
            }
        }
    }
}

/// Removes the checkpoint of a VE that runs again.
fn discard_suspended(ve: &Arc<Ve>) {
    if let Err(error) = ve.discard_suspended() {
        tracing::error!(id = %ve.id, "cannot remove the checkpoint of a resumed VE: {}", chain(&error));
    }
}
