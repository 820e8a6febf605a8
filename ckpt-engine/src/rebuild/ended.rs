//! Processes whose first thread has ended while others run.
//!
//! The kernel keeps that thread for as long as the process lives: it is dead, and only tells who it
//! was. In a skeleton it does all that there is to do until the process is about to become what it
//! was on the source. Then it ends, and the second one goes on in its place. That comes before any
//! process asks for a signal at its parent's end: the kernel sends it at the end of a thread.

use std::time::{Duration, Instant};

use ckpt_format::process::{Process, Processes};

use super::{
    Inconsistency, RebuildError, Skeleton,
    calls::Calls,
    complete::{end_by, give_credentials, give_name, outside},
};
use crate::procfs::Stat;

/// How long a thread may take to end.
const PATIENCE: Duration = Duration::from_secs(5);

impl Skeleton {
    /// Ends the first threads of those processes that had lost theirs.
    pub(super) fn end_leaders(&mut self, processes: &Processes) -> Result<(), RebuildError> {
        for process in &processes.processes {
            if let Some(status) = process.ended {
                self.end_leader(process, status)?;
            }
        }
        Ok(())
    }

    fn end_leader(&mut self, process: &Process, status: i32) -> Result<(), RebuildError> {
        let pid = process.pid;
        let bone = self.bone(pid)?;
        let none = RebuildError::Stream(Inconsistency::NoThreads(pid));
        let (Some(leader), false) = (process.threads.first(), bone.others.is_empty()) else {
            return Err(none);
        };
        let mut calls = Calls::new(self.gate, bone);
        calls.batch.step("end its first thread");
        give_name(&mut calls.batch, leader);
        give_credentials(&mut calls.batch, leader, self.power(bone)?);
        calls.run()?;
        end_by(bone, self.gate.base, libc::SYS_exit, status >> 8)?;
        wait_until_dead(bone.thread.tid)
            .map_err(|source| outside(pid, "end its first thread", source))?;
        let bone = self.bone_mut(pid)?;
        bone.thread = bone.others.remove(0);
        Ok(())
    }
}

fn wait_until_dead(tid: i32) -> std::io::Result<()> {
    let start = Instant::now();
    while Stat::read(tid).map_err(std::io::Error::other)?.state != 'Z' {
        if start.elapsed() > PATIENCE {
            return Err(std::io::ErrorKind::TimedOut.into());
        }
        std::thread::yield_now();
    }
    Ok(())
}
