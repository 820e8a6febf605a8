//! Processes and threads.

use serde::{Deserialize, Serialize};

use crate::{
    container::Namespaces,
    controls::{ProcessControls, ThreadControls},
    files::FileId,
    ipc::SemaphoreUndo,
    keys::Keys,
    memory::{MemoryMap, SharedObject},
    seccomp::Filter,
};

/// The shape of a VE's processes at one moment: what the target's skeleton is built from.
///
/// Sent in every round; the target applies the difference to what it has. Their areas follow
/// where they have changed.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Layout {
    /// Parents before their children, and the process with which a pid namespace begins before all
    /// others in it; the first is the VE's init.
    pub processes: Vec<Shape>,
    /// The shared objects that the areas refer to.
    pub shared: Vec<SharedObject>,
}

/// One process in a [`Layout`].
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Shape {
    /// The process number.
    pub pid: i32,
    /// Tells two processes with one number apart: which life of this number it is.
    /// A successful execve(2) also starts a new life, because it has a new address space.
    pub life: u64,
    /// The parent's number; 0 for init.
    pub parent: i32,
    /// The process group.
    pub group: i32,
    /// The session.
    pub session: i32,
    /// The signal that the parent gets when the process ends.
    pub exit_signal: i32,
    /// Set for a zombie: the wait status that its parent has still to collect.
    pub zombie: Option<i32>,
    /// It starts as a copy of its parent, as that stands at this place in the stream: what the two
    /// have in common is then kept in memory once. Only for one that is new, and in its parent's
    /// session or the leader of its own.
    pub heir: bool,
    /// The namespaces that it is in.
    #[serde(default)]
    pub namespaces: Namespaces,
    /// What it has in common with its parent.
    #[serde(default)]
    pub common: Common,
    /// Its own number and others in pid namespaces below the VE's own.
    #[serde(default)]
    pub below: Below,
}

/// Numbers in the pid namespaces below the VE's own that a process is in, the outermost first.
/// Nothing for a process that is in none.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Below {
    /// Of the process. One that is 1 in the last of them has made that.
    pub process: Vec<i32>,
    /// Of its process group; 0 where that cannot be seen.
    pub group: Vec<i32>,
    /// Of its session; 0 where that cannot be seen.
    pub session: Vec<i32>,
    /// Who the process is.
    #[serde(default)]
    pub identity: Identity,
    /// Its working directory inside the VE.
    #[serde(default)]
    pub directory: String,
}

/// Users and groups of a process, as numbered inside the VE.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    /// Real, effective, saved and file-system user.
    pub users: [u32; 4],
    /// Real, effective, saved and file-system group.
    pub groups: [u32; 4],
    /// Supplementary groups.
    pub supplementary: Vec<u32>,
}

/// What a process uses together with its parent, although it is no thread of it (clone(2)).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Common {
    /// `CLONE_FILES`: the descriptor table.
    pub descriptors: bool,
    /// `CLONE_FS`: root, working directory and umask.
    pub directories: bool,
}

/// All that is left to say once the VE is frozen.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Processes {
    /// As in the last [`Layout`], in the same order.
    pub processes: Vec<Process>,
    /// `/proc/sys/kernel/ns_last_pid` of the VE.
    pub last_pid: i32,
    /// The seccomp filters that threads refer to.
    pub filters: Vec<Filter>,
    /// What they possess.
    #[serde(default)]
    pub keys: Keys,
}

/// The state of one process.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Process {
    /// The process number.
    pub pid: i32,
    /// The `mm` fields and the auxiliary vector.
    pub memory: MemoryMap,
    /// The program, by its path inside the VE.
    pub exe: String,
    /// The program, where the path has gone: a [`SharedObject::id`] of the layout.
    pub exe_object: Option<u64>,
    /// The working directory inside the VE.
    pub cwd: String,
    /// The root directory inside the VE, `/` unless it called chroot(2).
    pub root: String,
    /// umask(2).
    pub umask: u32,
    /// The 64 signal actions, index 0 is signal 1.
    pub actions: Vec<SignalAction>,
    /// Signals pending for the whole process, oldest first.
    pub pending: Vec<SignalInfo>,
    /// `ITIMER_REAL`, `ITIMER_VIRTUAL`, `ITIMER_PROF`.
    pub interval_timers: [IntervalTimer; 3],
    /// timer_create(2) timers.
    pub posix_timers: Vec<PosixTimer>,
    /// When these timers were read: CLOCK_MONOTONIC of the source in nanoseconds.
    pub timers_read_at_ns: i64,
    /// The resource limits in the order of `RLIMIT_*`: soft, hard. `u64::MAX` is infinity.
    pub limits: Vec<(u64, u64)>,
    /// The descriptor table in ascending order.
    pub descriptors: Vec<Descriptor>,
    /// `PR_SET_CHILD_SUBREAPER`.
    pub child_subreaper: bool,
    /// `/proc/PID/oom_score_adj`.
    pub oom_score_adjustment: i32,
    /// `/proc/PID/loginuid`, if it is set.
    #[serde(default)]
    pub login: Option<u32>,
    /// `/proc/PID/coredump_filter`.
    pub coredump_filter: u32,
    /// `PR_SET_DUMPABLE`.
    pub dumpable: u32,
    /// Switches of prctl(2).
    pub controls: ProcessControls,
    /// `MEMBARRIER_CMD_GET_REGISTRATIONS`.
    pub membarrier: u32,
    /// personality(2).
    pub personality: u32,
    /// Stopped by a signal (job control), and by which.
    pub stopped: Option<i32>,
    /// What the end of the process adds to semaphores.
    #[serde(default)]
    pub semaphore_undo: Vec<SemaphoreUndo>,
    /// The rings of AIO contexts.
    #[serde(default)]
    pub rings: Vec<Ring>,
    /// `ns_last_pid` as the first process of a pid namespace below the VE's own reads it; 0 for
    /// all others.
    #[serde(default)]
    pub last_pid: i32,
    /// The segments that its threads have in common, as modify_ldt(2) reads them: 8 bytes for
    /// each number, up to the last that is used.
    #[serde(default, with = "serde_bytes")]
    pub local_segments: Vec<u8>,
    /// The first of its threads has ended, with this status, and others run.
    #[serde(default)]
    pub ended: Option<i32>,
    /// The threads; the first is the leader.
    pub threads: Vec<Thread>,
}

impl Process {
    /// The threads that have not ended.
    pub fn living(&self) -> &[Thread] {
        let ended = usize::from(self.ended.is_some());
        self.threads.get(ended..).unwrap_or_default()
    }
}

/// The ring of an AIO context (io_setup(2)), all of whose requests are completed.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ring {
    /// Its address, by which the program knows the context.
    pub start: u64,
    /// How many requests the program asked for; 0 for a ring that a child has from its parent,
    /// which is only memory there.
    pub requests: u32,
    /// How many events it has room for.
    pub events: u32,
    /// The place of the first event that is not read.
    pub head: u32,
    /// The place of the next event to come.
    pub tail: u32,
    /// What stands in it, up to the last byte that is not zero.
    #[serde(with = "serde_bytes")]
    pub contents: Vec<u8>,
}

/// One entry of a descriptor table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Descriptor {
    /// The number.
    pub fd: i32,
    /// The open file description.
    pub file: FileId,
    /// `FD_CLOEXEC`.
    pub close_on_exec: bool,
}

/// The state of one thread.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Thread {
    /// The thread number.
    pub tid: i32,
    /// Its numbers in the pid namespaces below the VE's own, the outermost first.
    #[serde(default)]
    pub below: Vec<i32>,
    /// The command name (`PR_SET_NAME`).
    #[serde(with = "serde_bytes")]
    pub name: Vec<u8>,
    /// `struct user_regs_struct` of the architecture.
    #[serde(with = "serde_bytes")]
    pub registers: Vec<u8>,
    /// The extended state as `PTRACE_GETREGSET(NT_X86_XSTATE)` gives it. Zeros at its end may be
    /// left out: registers that are rarely used take most of it.
    #[serde(with = "serde_bytes")]
    pub extended: Vec<u8>,
    /// The blocked signals.
    pub signal_mask: u64,
    /// Signals pending for this thread, oldest first.
    pub pending: Vec<SignalInfo>,
    /// sigaltstack(2): address, flags, size.
    pub alternate_stack: (u64, u32, u64),
    /// set_tid_address(2).
    pub tid_address: u64,
    /// set_robust_list(2): head and length.
    pub robust_list: (u64, u64),
    /// rseq(2), when registered.
    pub rseq: Option<Rseq>,
    /// Who the thread is.
    pub credentials: Credentials,
    /// How the thread is scheduled.
    pub scheduling: Scheduling,
    /// `PR_SET_PDEATHSIG`.
    pub parent_death_signal: i32,
    /// `/proc/TID/timerslack_ns`.
    pub timer_slack_ns: u64,
    /// Its own seccomp filters, oldest first, as places in [`Processes::filters`].
    pub filters: Vec<u32>,
    /// Switches of prctl(2).
    pub controls: ThreadControls,
    /// For one that has them apart from the other threads (`CLONE_FS` of unshare(2)).
    #[serde(default)]
    pub directories: Option<Directories>,
    /// Its own segments (set_thread_area(2)), which programs of 32 bits have for thread-locals.
    #[serde(default)]
    pub segments: Vec<Segment>,
}

/// A segment of a thread (`struct user_desc`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Segment {
    /// Its number among all segments.
    pub entry: u32,
    /// Where it begins.
    pub base: u32,
    /// Its last address, in bytes or pages.
    pub limit: u32,
    /// Of which kind it is.
    pub flags: u32,
}

/// Where a thread of its own mind is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Directories {
    /// The root directory inside the VE.
    pub root: String,
    /// The working directory inside the VE.
    pub cwd: String,
    /// umask(2).
    pub umask: u32,
}

/// One signal action (`struct kernel_sigaction`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[expect(missing_docs, reason = "the names are those of struct kernel_sigaction")]
pub struct SignalAction {
    pub handler: u64,
    pub flags: u64,
    pub restorer: u64,
    pub mask: u64,
}

/// One pending signal: the 128 bytes of `siginfo_t`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SignalInfo(#[serde(with = "serde_bytes")] pub Vec<u8>);

/// The value of a setitimer(2) timer, in microseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[expect(missing_docs, reason = "the names are those of struct itimerval")]
pub struct IntervalTimer {
    pub value_us: u64,
    pub interval_us: u64,
}

/// A timer_create(2) timer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PosixTimer {
    /// `timer_t`.
    pub id: i32,
    /// `CLOCK_*`, as passed to timer_create(2).
    pub clock: i32,
    /// `SIGEV_*`, with `SIGEV_THREAD_ID` where set.
    pub notify: i32,
    /// The signal.
    pub signal: i32,
    /// `sigev_value`.
    pub value: u64,
    /// The thread for `SIGEV_THREAD_ID`, as the process itself numbers it.
    pub thread: i32,
    /// Nanoseconds until the next expiry; 0 is disarmed.
    pub remaining_ns: u64,
    /// The period in nanoseconds; 0 is one shot.
    pub interval_ns: u64,
    /// timer_getoverrun(2).
    pub overrun: i32,
}

/// rseq(2) registration.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[expect(missing_docs, reason = "the names are those of struct ptrace_rseq_configuration")]
pub struct Rseq {
    pub pointer: u64,
    pub size: u32,
    pub signature: u32,
}

/// Users, groups and capabilities of one thread, as numbered inside the VE.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Credentials {
    /// Real, effective, saved and file-system user.
    pub users: [u32; 4],
    /// Real, effective, saved and file-system group.
    pub groups: [u32; 4],
    /// Supplementary groups.
    pub supplementary: Vec<u32>,
    /// Inheritable, permitted, effective, bounding, ambient.
    pub capabilities: [u64; 5],
    /// `PR_SET_SECUREBITS`.
    pub secure_bits: u32,
    /// `PR_SET_NO_NEW_PRIVS`.
    pub no_new_privileges: bool,
}

/// Scheduling of one thread.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Scheduling {
    /// `SCHED_*`.
    pub policy: u32,
    /// The nice value.
    pub nice: i32,
    /// The real-time priority.
    pub priority: u32,
    /// `SCHED_FLAG_RESET_ON_FORK` and the like.
    pub flags: u64,
    /// ioprio_get(2).
    pub io_priority: i32,
    /// sched_getaffinity(2), as words of 64 processors; empty for a thread that is not bound.
    pub processors: Vec<u64>,
}
