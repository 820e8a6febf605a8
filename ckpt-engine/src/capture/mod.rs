//! Captures the state of the processes of a frozen VE.
//!
//! There are two ways. Most processes are told by what the kernel keeps about them, which is read
//! without touching them ([`kernel`]). The others are stopped: what `/proc`, ptrace and a few system
//! calls tell is read from outside, and what only the process itself can say is asked by a table of
//! calls made in it, one stop for each thread. Afterwards every thread is as it was, still frozen.

mod bits32;
mod check;
mod common;
mod controls;
pub(crate) mod kernel;
mod process;
mod restart;
mod seccomp;
mod thread;
mod timers;

use std::{
    collections::HashSet,
    num::NonZero,
    sync::{
        Mutex, PoisonError,
        mpsc::{Receiver, Sender, channel},
    },
};

use ckpt_format::{
    blocker::Blocker,
    ipc::SemaphoreSet,
    keys::Keys,
    process::{Process, Processes},
};
use serde::{Deserialize, Serialize};

pub use self::check::check;
use self::kernel::{Told, View};
use crate::{
    freeze::{FreezeError, Frozen},
    inject::{InjectError, Stopped, let_go_late_stops},
    keys,
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

/// With fewer processes for each than this, more threads are not worth their start.
const SHARE_MIN: usize = 8;

/// Takes captured processes as they come.
pub(crate) type Take<'a> = dyn FnMut(Vec<Process>) + 'a;

/// Captures processes: those that the tracker saw in its last round. `view` tells most of them.
/// While there are many they are given to `take`; what is returned are the others.
pub(crate) fn capture(
    frozen: &Frozen,
    patients: &[Patient],
    ids: IdMap,
    sets: &[Vec<SemaphoreSet>],
    view: Option<&mut View>,
    take: &mut Take<'_>,
) -> Result<Processes, CaptureError> {
    let mut filters = seccomp::Filters::default();
    let any = sets.iter().any(|sets| !sets.is_empty());
    let mut keys = None;
    let mut told = Told::default();
    if let Some(view) = view {
        match view.tell(patients, ids, any, (&mut filters, &mut told), take) {
            Ok(()) => keys = view.keys(&told, ids)?,
            Err(error) => {
                tracing::warn!(%error, "processes of a VE are stopped and asked");
            }
        }
    }
    let keys = match keys {
        Some(keys) => keys,
        None => no_keys(ids)?,
    };
    let processes = std::mem::take(&mut told.rest);
    if let Some(last_pid) = told.last_pid
        && told.hosts.len() == patients.len()
    {
        return Ok(Processes { processes, last_pid, filters: filters.into_list(), keys });
    }
    let asked = patients.len() - told.hosts.len();
    tracing::debug!(asked, of = patients.len(), "processes are stopped to be captured");
    let mut asked = stop_and_ask(frozen, patients, ids, sets, (told.hosts, filters))?;
    asked.processes.extend(processes);
    Ok(Processes { keys, ..asked })
}

/// Of a VE whose keys cannot be read: it must not have any.
fn no_keys(ids: IdMap) -> Result<Keys, CaptureError> {
    let found = keys::unseen(ids).map_err(|source| InjectError::Control { tid: 0, source })?;
    if found.is_empty() { Ok(Keys::default()) } else { Err(CaptureError::Blocked(found)) }
}

/// Captures those processes that could not be told.
///
/// All threads are stopped together, so that nothing of the VE runs while the cgroup is open
/// for our own calls. A tracee belongs to the thread that has attached it, so each of our
/// threads has a share of the processes from the first to the last.
fn stop_and_ask(
    frozen: &Frozen,
    patients: &[Patient],
    ids: IdMap,
    sets: &[Vec<SemaphoreSet>],
    (told, filters): (HashSet<i32>, seccomp::Filters),
) -> Result<Processes, CaptureError> {
    // What this thread has seized in vain before could not be stopped by another one.
    let_go_late_stops();
    let cpus = std::thread::available_parallelism().map_or(1, NonZero::get);
    let count = cpus.min(patients.len() / SHARE_MIN).max(1);
    let share = patients.len().div_ceil(count).max(1);
    let ward = Ward { ids, sets, filters: Mutex::new(filters), told };
    let shares = std::thread::scope(|scope| {
        let begun = patients.chunks(share).map(|patients| {
            let ((orders, ordered), (tell, told)) = (channel(), channel());
            let ward = &ward;
            let thread = scope.spawn(move || ward.treat(patients, &ordered, &tell));
            (thread, orders, told)
        });
        let begun: Vec<_> = begun.collect();
        // Each tells whether its processes are stopped, and when it has captured them. One that
        // has panicked hangs up.
        let stopped = begun.iter().fold(true, |all, (_, _, told)| told.recv() == Ok(true) && all);
        let opened = if stopped { frozen.open_for_injection() } else { Ok(()) };
        if stopped && opened.is_ok() {
            for (_, orders, _) in &begun {
                let _ = orders.send(());
            }
            for (_, _, told) in &begun {
                let _ = told.recv();
            }
        }
        // Frozen again first: a thread let go must not run.
        let refrozen = frozen.again();
        let ended = begun.into_iter().map(|(thread, orders, _)| {
            drop(orders);
            thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        });
        let ended: Vec<_> = ended.collect();
        opened?;
        refrozen?;
        // What went wrong, before what was given up for it.
        let (given_up, ended): (Vec<_>, Vec<_>) = ended
            .into_iter()
            .partition(|it| matches!(it, Err(CaptureError::Freeze(FreezeError::Abandoned))));
        ended.into_iter().chain(given_up).collect::<Result<Vec<Share>, CaptureError>>()
    })?;
    let mut processes = Processes::default();
    for share in shares {
        processes.processes.extend(share.processes);
        processes.last_pid = processes.last_pid.max(share.last_pid);
    }
    let filters = ward.filters.into_inner().unwrap_or_else(PoisonError::into_inner);
    processes.filters = filters.into_list();
    Ok(processes)
}

/// What all our threads know.
struct Ward<'a> {
    ids: IdMap,
    /// The semaphores of each IPC namespace.
    sets: &'a [Vec<SemaphoreSet>],
    filters: Mutex<seccomp::Filters>,
    /// Those that need not be asked, by their numbers on the host.
    told: HashSet<i32>,
}

/// What one of our threads has captured.
struct Share {
    processes: Vec<Process>,
    last_pid: i32,
}

impl Ward<'_> {
    /// Everything for some of the processes. They are captured when `ordered` says so, and let go
    /// when it hangs up.
    fn treat(
        &self,
        patients: &[Patient],
        ordered: &Receiver<()>,
        tell: &Sender<bool>,
    ) -> Result<Share, CaptureError> {
        let (mut stopped, attached) = attach(patients);
        // Whoever asked waits for both answers; it does not go away before us.
        let _ = tell.send(attached.is_ok());
        let captured = match (attached, ordered.recv()) {
            (Ok(()), Ok(())) => {
                let captured = self.capture(&mut stopped);
                let _ = tell.send(captured.is_ok());
                while ordered.recv().is_ok() {}
                captured
            }
            (Err(error), _) => Err(error),
            (Ok(()), Err(_)) => Err(FreezeError::Abandoned.into()),
        };
        let_go(stopped);
        captured
    }

    fn capture(&self, stopped: &mut Halted<'_>) -> Result<Share, CaptureError> {
        let mut share = Share { processes: Vec::with_capacity(stopped.len()), last_pid: 0 };
        for (patient, threads) in stopped {
            let theirs = usize::try_from(patient.ipc).ok().and_then(|it| self.sets.get(it));
            let sets = theirs.map(Vec::as_slice).unwrap_or_default();
            if patient.inner == 1
                && let Some(init) = threads.first()
            {
                share.last_pid = process::last_pid(patient, init)?;
            }
            if !self.told.contains(&patient.host) {
                let captured = process::capture(patient, threads, self.ids, sets, &self.filters)?;
                share.processes.push(captured);
            }
        }
        Ok(share)
    }
}

/// Processes with their stopped threads.
type Halted<'a> = Vec<(&'a Patient, Vec<Stopped>)>;

/// Stops these processes, as far as that is possible.
fn attach(patients: &[Patient]) -> (Halted<'_>, Result<(), CaptureError>) {
    let mut stopped = Vec::with_capacity(patients.len());
    for patient in patients {
        let tids = procfs::threads(patient.host).map_err(CaptureError::from);
        let living = |tids: Vec<i32>| {
            tids.into_iter().filter(|&tid| Some(tid) != patient.ended).collect::<Vec<_>>()
        };
        let threads =
            tids.map(living).and_then(|tids| Ok(Stopped::attach(&tids, ptrace::SUSPEND_SECCOMP)?));
        match threads {
            Ok(threads) => stopped.push((patient, threads)),
            Err(error) => return (stopped, Err(error)),
        }
    }
    (stopped, Ok(()))
}

/// Makes sure that the freeze itself is not noticed by what goes on afterwards.
///
/// Thawing alone would end epoll_wait(2) and its like with EINTR; only at a ptrace stop can they
/// be told to go on. [`capture`] does the same for the threads that it stops.
pub fn hide_interruption(frozen: &Frozen) -> Result<(), CaptureError> {
    let list = |source| FreezeError::File { path: frozen.cgroup().to_owned(), source };
    for host in procfs::cgroup_processes(frozen.cgroup()).map_err(list)? {
        let tids = match procfs::living_threads(host) {
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

fn let_go(stopped: Halted<'_>) {
    for thread in stopped.into_iter().flat_map(|(_, threads)| threads) {
        let tid = thread.tid;
        if let Err(error) = thread.detach() {
            tracing::warn!(tid, %error, "cannot let a thread go");
        }
    }
}
