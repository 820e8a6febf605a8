//! What is asked of one process for all that must say the same, at one look at a VE that stands still.
//!
//! A path is the same for all who are at the same name below the same mount, and the scheduling of
//! a thread for all with the same words in the kernel's records. Both cost several calls.

use std::collections::HashMap;

use ckpt_format::process::Scheduling;

use super::{Field, Record};
use crate::{
    capture::{CaptureError, process, thread},
    inject::InjectError,
    procfs,
    sys::task,
};

/// Paths by name and mount, scheduling by the words that it comes from.
#[derive(Debug, Default)]
pub(super) struct Answers {
    programs: HashMap<Vec<u8>, Program>,
    directories: HashMap<Vec<u8>, String>,
    scheduling: HashMap<Vec<u8>, Scheduling>,
}

/// The program of a process.
#[derive(Clone, Debug)]
pub(super) struct Program {
    pub(super) path: String,
    /// Its contents, if the path has gone.
    pub(super) object: Option<u64>,
}

impl Answers {
    /// The program of the process with this leader.
    pub(super) fn program(&mut self, leader: &Record<'_>) -> Result<Program, CaptureError> {
        let host = leader.process();
        kept(&mut self.programs, Some(leader.bytes(Field::Program).to_vec()), || {
            let path = procfs::link(host, "exe")?;
            Ok(Program { path, object: process::gone_program(host)? })
        })
    }

    /// The directory that the process has as `cwd` or `root`.
    pub(super) fn directory(
        &mut self,
        leader: &Record<'_>,
        field: Field,
        name: &str,
    ) -> Result<String, CaptureError> {
        let ask = || Ok(procfs::link(leader.process(), name)?);
        kept(&mut self.directories, Some(leader.bytes(field).to_vec()), ask)
    }

    /// The scheduling of a thread.
    pub(super) fn scheduling(&mut self, record: &Record<'_>) -> Result<Scheduling, CaptureError> {
        let tid = record.thread();
        let ask = || {
            let attributes = task::scheduling(tid)?;
            Ok(Scheduling {
                policy: attributes.policy,
                nice: attributes.nice,
                priority: attributes.priority,
                flags: attributes.flags,
                io_priority: task::io_priority(tid)?,
                processors: thread::processors(tid)?,
            })
        };
        let failed = |source| InjectError::Control { tid, source }.into();
        kept(&mut self.scheduling, record.scheduling(), || ask().map_err(failed))
    }
}

/// The answer that was given for this key; without one it is asked for each time.
fn kept<T: Clone>(
    answers: &mut HashMap<Vec<u8>, T>,
    key: Option<Vec<u8>>,
    ask: impl FnOnce() -> Result<T, CaptureError>,
) -> Result<T, CaptureError> {
    if let Some(answer) = key.as_ref().and_then(|key| answers.get(key)) {
        return Ok(answer.clone());
    }
    let answer = ask()?;
    if let Some(key) = key {
        answers.insert(key, answer.clone());
    }
    Ok(answer)
}
