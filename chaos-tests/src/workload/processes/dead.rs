//! Children that have ended, each in another way, and are not yet waited for.

use std::time::Duration;

use ckpt_engine::sys::program::fork::fork;
use nix::sys::resource::{Resource, setrlimit};
use nix::sys::signal::{Signal, raise};
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::Pid;

use crate::workload::context::Context;
use crate::workload::outcome::{Failure, ensure, same};
use crate::workload::process::proc_text;

pub(super) fn run(context: &mut Context) -> Result<(), Failure> {
    let mut dead = Vec::new();
    for code in [0, 1, 42, 255] {
        let pid = Pid::from_raw(fork(|| code)?);
        dead.push((pid, WaitStatus::Exited(pid, code)));
    }
    for signal in [Signal::SIGKILL, Signal::SIGQUIT, Signal::SIGABRT, Signal::SIGUSR1] {
        let pid = Pid::from_raw(fork(|| {
            // No core file: whether there was one cannot be told again.
            let _ = setrlimit(Resource::RLIMIT_CORE, 0, 0);
            let _ = raise(signal);
            7
        })?);
        dead.push((pid, WaitStatus::Signaled(pid, signal, false)));
    }
    while context.step(Duration::from_millis(20))? {
        if context.progress.plant() {
            waitpid(dead[0].0, None)?;
        }
        for (pid, _) in &dead {
            let stat = proc_text(format!("/proc/{pid}/stat"))?;
            // Those that have just been told to end are on their way.
            let settled = context.progress.checks() > 5;
            let is_dead = stat.rsplit_once(") ").is_some_and(|(_, rest)| rest.starts_with('Z'));
            ensure(is_dead || !settled, || format!("the state of a dead child is {stat:?}"))?;
        }
    }
    dead.into_iter()
        .try_for_each(|(pid, status)| same("end of a child", waitpid(pid, None)?, status))
}
