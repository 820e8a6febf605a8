//! Calls of several purposes that a process of the skeleton makes in one stop.

use std::io;

use super::{Bone, RebuildError};
use crate::inject::{Batch, Done, Gate, Stopped};

/// Calls that are collected until there is something to wait for.
pub(super) struct Calls<'a> {
    pub(super) bone: &'a Bone,
    thread: &'a Stopped,
    gate: Gate,
    pub(super) batch: Batch,
    /// Which of the calls opens the program, and the program.
    pub(super) program: Option<(usize, String)>,
    /// Where the numbers of descriptors that come will stand, the first of them, and how many
    /// there are.
    pub(super) coming: Option<(u64, usize, usize)>,
}

impl<'a> Calls<'a> {
    /// None yet, to be made by the first thread of a process.
    pub(super) fn new(gate: Gate, bone: &'a Bone) -> Self {
        Self::of(&bone.thread, gate, bone)
    }

    /// To be made by one of its threads.
    pub(super) fn of(thread: &'a Stopped, gate: Gate, bone: &'a Bone) -> Self {
        Self { bone, thread, gate, batch: gate.batch(), program: None, coming: None }
    }

    /// The error of descriptors that did not arrive.
    pub(super) fn lost(&self, source: io::Error) -> RebuildError {
        RebuildError::Outside { pid: self.bone.pid, what: "pass its descriptors", source }
    }

    /// Makes the calls up to here, if there are any, and returns what those of the last batch have.
    pub(super) fn run(&mut self) -> Result<Option<Done>, RebuildError> {
        let batch = std::mem::replace(&mut self.batch, self.gate.batch());
        if batch.is_empty() {
            return Ok(None);
        }
        let pid = self.bone.pid;
        let done = batch.run(self.thread)?;
        if let Some((open, path)) = self.program.take() {
            done.value(open).map_err(|source| RebuildError::Open { pid, path, source })?;
        }
        let failed = |(what, source)| RebuildError::Process { pid, what, source };
        done.all_steps().map_err(failed)?;
        let Some((numbers, first, count)) = self.coming.take() else { return Ok(Some(done)) };
        let received = |index: usize| done.word(numbers + 4 * index as u64) as usize;
        match (0..count).all(|index| received(index) == first + index) {
            true => Ok(Some(done)),
            false => Err(self.lost(io::ErrorKind::InvalidData.into())),
        }
    }
}
