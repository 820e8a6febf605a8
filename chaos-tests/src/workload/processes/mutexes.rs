//! Robust mutexes: a child takes one, keeps it for a while and dies with it. The kernel finds the
//! list of such mutexes through a pointer that the thread once gave it.

use std::time::Duration;

use ckpt_engine::sys::program::fork::fork;
use ckpt_engine::sys::program::mutex::{RobustMutex, Taken};
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::Pid;

use crate::workload::context::Context;
use crate::workload::outcome::{Failure, same};

pub(super) fn run(context: &mut Context) -> Result<(), Failure> {
    let mutex = RobustMutex::new()?;
    let mut planted = false;
    while context.step(Duration::from_millis(10))? {
        let (mut taken, send) = std::io::pipe()?;
        planted |= context.progress.plant();
        let releases = planted;
        let child = fork(|| {
            let held = mutex.lock();
            let told = std::io::Write::write_all(&mut &send, b"x");
            std::thread::sleep(Duration::from_millis(250));
            if releases {
                // The parent must notice that nobody died with the mutex.
                let _ = mutex.unlock();
            }
            i32::from(!matches!(held, Ok(Taken::Clean)) || told.is_err())
        })?;
        drop(send);
        std::io::Read::read_exact(&mut taken, &mut [0])?;
        // Waits in the kernel until the child dies.
        same("the mutex of a child that died", mutex.lock()?, Taken::OwnerDied)?;
        let pid = Pid::from_raw(child);
        same("end of the child", waitpid(pid, None)?, WaitStatus::Exited(pid, 0))?;
        mutex.unlock()?;
        context.progress.count();
        same("the mutex afterwards", mutex.lock()?, Taken::Clean)?;
        mutex.unlock()?;
    }
    Ok(())
}
