//! Captures the state of the processes of a frozen VE.
//!
//! What `/proc`, ptrace and a few system calls tell from outside is read from outside; what
//! only the process itself can say is asked by a table of calls made in it, one stop for each
//! thread. Afterwards every thread is as it was, still frozen.

mod check;
mod common;
mod controls;
mod process;
mod seccomp;
mod thread;
mod timers;

use ckpt_format::{blocker::Blocker, ipc::SemaphoreSet, process::Processes};
use serde::{Deserialize, Serialize};

pub use self::check::check;
use crate::{
    freeze::{FreezeError, Frozen},
    inject::{InjectError, Stopped},
    procfs::{self, ProcError},
    surgeon::Patient,
    sys::ptrace,
};

/// Why the state could not be captured. The VE is unharmed.
#[derive(Debug, thiserror::Error, Serialize, Deserialize)]
pub enum CaptureError {
    /// Something in the VE cannot be moved.
    #[error("{} cannot be moved: {}", count(.0), list(.0))]
    Blocked(Vec<Blocker>),
    /// A file of `/proc` was not readable.
    #[error(transparent)]
    Proc(#[from] ProcError),
    /// A thread could not be asked.
    #[error(transparent)]
    Inject(#[from] InjectError),
    /// The freezer failed.
    #[error(transparent)]
    Freeze(#[from] FreezeError),
}

fn count(blockers: &[Blocker]) -> String {
    match blockers.len() {
        1 => "an object".to_owned(),
        many => format!("{many} objects"),
    }
}

fn list(blockers: &[Blocker]) -> String {
    blockers.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ")
}

/// How the ids of the VE are seen from the host.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct IdMap {
    /// The host's id of the VE's id 0.
    pub base: u32,
    /// How many ids there are.
    pub count: u32,
}

impl IdMap {
    /// The id inside the VE; the overflow id for one that the VE does not have.
    pub fn inside(self, host: u64) -> u32 {
        let base = u64::from(self.base);
        match host.checked_sub(base) {
            Some(id) if id < u64::from(self.count) => id as u32,
            _ => 65534,
        }
    }
}

/// Captures processes, in this order: those that the tracker saw in its last round.
///
/// All threads are stopped together, so that nothing of the VE runs while the cgroup is open
/// for our own calls.
pub(crate) fn capture(
    frozen: &Frozen,
    patients: &[Patient],
    ids: IdMap,
    sets: &[SemaphoreSet],
) -> Result<Processes, CaptureError> {
    let mut stopped = Vec::new();
    for patient in patients {
        let tids = procfs::threads(patient.host)?;
        let threads = match Stopped::attach(&tids, ptrace::SUSPEND_SECCOMP) {
            Ok(threads) => threads,
            Err(error) => {
                let_go(stopped);
                return Err(error.into());
            }
        };
        stopped.push((patient, threads));
    }
    let captured = capture_stopped(frozen, &mut stopped, ids, sets);
    // Frozen again first: a thread let go must not run.
    let refrozen = frozen.again();
    let_go(stopped);
    refrozen?;
    captured
}

/// Makes sure that the freeze itself is not noticed by what goes on afterwards.
///
/// Thawing alone would end epoll_wait(2) and its like with EINTR; only at a ptrace stop can they
/// be told to go on. [`capture`] does the same for the threads that it stops.
pub fn hide_interruption(frozen: &Frozen) -> Result<(), CaptureError> {
    let list = |source| FreezeError::File { path: frozen.cgroup().to_owned(), source };
    for host in procfs::cgroup_processes(frozen.cgroup()).map_err(list)? {
        let tids = match procfs::threads(host) {
            Ok(tids) => tids,
            Err(error) if error.is_gone() => continue,
            Err(error) => return Err(error.into()),
        };
        // Zombies cannot be stopped, and a thread under another tracer is not ours.
        let Ok(threads) = Stopped::attach(&tids, 0) else { continue };
        for thread in threads {
            thread.detach()?;
        }
    }
    Ok(())
}

fn let_go(stopped: Vec<(&Patient, Vec<Stopped>)>) {
    for thread in stopped.into_iter().flat_map(|(_, threads)| threads) {
        let tid = thread.tid;
        if let Err(error) = thread.detach() {
            tracing::warn!(tid, %error, "cannot let a thread go");
        }
    }
}

fn capture_stopped(
    frozen: &Frozen,
    stopped: &mut [(&Patient, Vec<Stopped>)],
    ids: IdMap,
    sets: &[SemaphoreSet],
) -> Result<Processes, CaptureError> {
    frozen.open_for_injection()?;
    let mut processes = Processes::default();
    let init = stopped.iter().find(|(patient, _)| patient.inner == 1);
    let namespace = |host| procfs::link(host, "ns/ipc").ok();
    let theirs = init.filter(|_| !sets.is_empty()).and_then(|(init, _)| namespace(init.host));
    let mut filters = seccomp::Filters::default();
    for (patient, threads) in stopped {
        // In a namespace of its own the same numbers mean others.
        let seen = theirs.is_some() && namespace(patient.host) == theirs;
        let sets = if seen { sets } else { &[] };
        if patient.inner == 1
            && let Some(init) = threads.first()
        {
            processes.last_pid = process::last_pid(patient, init)?;
        }
        processes.processes.push(process::capture(patient, threads, ids, sets, &mut filters)?);
    }
    processes.filters = filters.into_list();
    Ok(processes)
}
