//! The moment at which a rebuilt VE starts to run.

use std::time::{Duration, Instant};

use super::{RebuildError, complete::ProcessThreads};
use crate::{freeze::Frozen, inject::InjectError, procfs, sys::ptrace};

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
        let stopped = self.processes.iter().flatten().filter(|thread| thread.stop_signal != 0);
        let stopped: Vec<i32> = stopped.map(|thread| thread.tid).collect();
        for thread in self.processes.into_iter().flatten() {
            let tid = thread.tid;
            let control = |source| InjectError::Control { tid, source };
            ptrace::detach(tid, thread.stop_signal).map_err(control)?;
        }
        stopped.into_iter().for_each(wait_until_stopped);
        Ok(())
    }
}

/// A process that takes its stop signal does so by itself, also in a frozen cgroup. It must have
/// done it before others run that may look at it.
fn wait_until_stopped(host: i32) {
    const PATIENCE: Duration = Duration::from_secs(1);
    let start = Instant::now();
    let stands =
        || procfs::Stat::read(host).map_or(true, |stat| matches!(stat.state, 'T' | 'Z' | 'X'));
    while !stands() {
        if start.elapsed() > PATIENCE {
            tracing::warn!(host, "a stopped process takes its time to stop");
            return;
        }
        std::thread::yield_now();
    }
}
