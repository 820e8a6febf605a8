//! The moment at which a rebuilt VE starts to run.

use super::{RebuildError, complete::ProcessThreads};
use crate::{freeze::Frozen, inject::InjectError, sys::ptrace};

/// A rebuilt VE that stands ready to run. Dropped, or lost with its daemon, it is gone.
#[derive(Debug)]
pub struct Ready {
    processes: Vec<ProcessThreads>,
}

impl Ready {
    pub(super) fn new(processes: Vec<ProcessThreads>) -> Self {
        Self { processes }
    }

    /// Lets every thread go into the frozen cgroup, from where one thaw starts them together.
    ///
    /// From here on the processes no longer die with us.
    pub fn release(self, frozen: &Frozen) -> Result<(), RebuildError> {
        // Threads in ptrace stops count as frozen: this only makes sure that they stay so.
        frozen.again().map_err(|source| RebuildError::Freeze { source })?;
        for thread in self.processes.into_iter().flatten() {
            let tid = thread.tid;
            let control = |source| InjectError::Control { tid, source };
            ptrace::set_options(tid, 0).map_err(control)?;
            ptrace::detach(tid, thread.stop_signal).map_err(control)?;
        }
        Ok(())
    }
}
