//! Processes on their way to the target before the rest of the state: it decodes those while others are
//! still read.

use ckpt_format::{
    codec,
    process::{Process, Processes},
};

use super::{blackout::CopyError, pipe::Pipe, postcopy::later::Memory};

/// Takes processes as they are captured.
pub(super) struct Parts<'a> {
    /// Where they go at once.
    pipe: Option<&'a Pipe>,
    /// Those that did not.
    kept: Vec<Process>,
    /// Whether all were taken.
    taken: Result<(), CopyError>,
}

impl<'a> Parts<'a> {
    pub(super) fn new(pipe: &'a Pipe, memory: Memory) -> Self {
        // What of them is needed at once is looked for in all of them.
        let ahead = pipe.takes_processes() && memory == Memory::Whole;
        Self { pipe: ahead.then_some(pipe), kept: Vec::new(), taken: Ok(()) }
    }

    /// Takes an encoded list of processes.
    pub(super) fn take(&mut self, some: Vec<u8>) {
        if self.taken.is_err() {
            return;
        }
        self.taken = match self.pipe {
            Some(pipe) => pipe.processes(some).map_err(|_| CopyError::Link),
            None => codec::decode::<Vec<Process>>(&some)
                .map(|some| self.kept.extend(some))
                .map_err(|_| CopyError::Damaged),
        };
    }

    /// With all that is to be in the state.
    pub(super) fn complete(self, mut rest: Processes) -> Result<Processes, CopyError> {
        self.taken?;
        rest.processes.extend(self.kept);
        Ok(rest)
    }
}
