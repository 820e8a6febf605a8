//! The source's VE while it stands still: what of its memory is kept back.

use std::collections::BTreeMap;

use ckpt_format::process::Processes;

use crate::migration::{
    blackout::{CopyError, Live},
    messages::{Item, LATER_MAX},
    pipe::Pipe,
};

/// What is sent of the memory of a VE that stands still.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::migration) enum Memory {
    /// All that was written.
    Whole,
    /// What cannot come after the switch.
    Later,
}

/// How much of the memory of each process is kept back, in bytes.
pub(in crate::migration) type KeptBack = BTreeMap<i32, u64>;

impl Live {
    /// Sends what cannot wait of the memory that was kept back, and tells of the rest. Returns how
    /// much that is.
    pub(in crate::migration) fn tell_later(
        &mut self,
        processes: &Processes,
        pipe: &Pipe,
    ) -> Result<KeptBack, CopyError> {
        let mut kept = KeptBack::new();
        for (pid, runs) in self.tracker.send_needed(processes, &mut pipe.clone())? {
            for runs in runs.chunks(LATER_MAX) {
                let bytes: u64 = runs.iter().map(|run| run.end() - run.start).sum();
                *kept.entry(pid).or_default() += bytes;
                let item = Item::Later { pid, runs: runs.to_vec() };
                pipe.item(item).map_err(|_| CopyError::Link)?;
            }
        }
        Ok(kept)
    }
}
