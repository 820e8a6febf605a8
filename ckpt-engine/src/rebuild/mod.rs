//! Rebuilds the processes of a VE from outside, while it still runs elsewhere.
//!
//! A [`Skeleton`] starts as the paused pid 1 of a new container. Records of the memory stream
//! give it processes, areas and pages ([`Skeleton::apply`]), as often as they change; the
//! processes never run a program meanwhile. Once the VE is frozen on the source the rest follows
//! in steps, with those of the open files ([`crate::files`]) between them:
//!
//! 1. [`Skeleton::populate`]: threads, and the processes that only wait to be mourned;
//! 2. [`Skeleton::install`]: program, working directory, descriptors, signals, timers, credentials;
//!    then, if pages are to come when the VE runs already, [`Skeleton::leave_out`];
//! 3. [`Skeleton::finalize`]: registers; consumes the skeleton;
//! 4. [`Ready::release`]: everything goes on at once.
//!
//! Until the release every process dies with the thread that built it (`PTRACE_O_EXITKILL`), so
//! that a daemon that is killed leaves nothing half built.

mod apart;
mod areas;
mod birth;
mod bits32;
mod calls;
mod complete;
mod controls;
mod credentials;
mod directory;
mod ended;
mod identities;
mod install;
mod keys;
mod lazy;
mod login;
mod namespaces;
mod opened;
mod outside;
mod pages;
mod protect;
mod release;
mod remote;
mod same;
mod threads;
mod timers;
mod tree;
mod waiting;

use std::{
    collections::{BTreeMap, HashMap},
    fs::File,
    io,
    os::fd::OwnedFd,
};

use ckpt_format::{
    container::Namespaces,
    ipc::SemaphoreSet,
    memory::{Area, Run},
    process::{Common, Credentials, Identity, Shape},
};

use self::outside::Inherited;
pub use self::{
    lazy::{Faults, Incomplete, Later},
    release::Ready,
};
use crate::{
    container::Handles,
    files::Early,
    inject::{Gate, InjectError, Stopped},
    kin::Kin,
    procfs::{self, ProcError},
    sys::{ptrace, task},
};

/// Why a VE could not be rebuilt here.
#[derive(Debug, thiserror::Error)]
pub enum RebuildError {
    /// A process could not be made to do something.
    #[error(transparent)]
    Inject(#[from] InjectError),
    /// A file of `/proc` was not usable.
    #[error(transparent)]
    Proc(#[from] ProcError),
    /// A system call made in a process of the VE failed.
    #[error("cannot rebuild process {pid}: {what}")]
    Process {
        /// The process, as numbered in the VE.
        pid: i32,
        /// What was being done.
        what: &'static str,
        /// Why it failed.
        source: InjectError,
    },
    /// Something done from outside failed.
    #[error("cannot rebuild process {pid}: {what}")]
    Outside {
        /// The process, as numbered in the VE.
        pid: i32,
        /// What was being done.
        what: &'static str,
        /// Why it failed.
        source: io::Error,
    },
    /// A file that a process maps or executes could not be opened.
    #[error("cannot rebuild process {pid}: cannot open {path}")]
    Open {
        /// The process, as numbered in the VE.
        pid: i32,
        /// The path inside the VE.
        path: String,
        /// Why it failed.
        source: InjectError,
    },
    /// The stream speaks of something that it did not announce.
    #[error("the stream is inconsistent: {0}")]
    Stream(Inconsistency),
    /// The parent, session or group of a process cannot be made.
    #[error("process {pid} has a session or parent that cannot be rebuilt")]
    Family {
        /// The process, as numbered in the VE.
        pid: i32,
    },
    /// A process of a pid namespace is somebody whom its user namespace has no number for.
    #[error("process {pid} is a user that its user namespace does not know")]
    Unmapped {
        /// The process, as numbered in the VE.
        pid: i32,
    },
    /// A cgroup namespace could not be made.
    #[error("cannot make a cgroup namespace")]
    Cgroups(#[from] crate::container::cgroups::CgroupError),
    /// An open file could not be made.
    #[error("cannot rebuild the open files")]
    Files(#[source] crate::files::RebuildError),
    /// The finished processes could not be held together for their start.
    #[error("cannot hold the processes for their start")]
    Freeze {
        /// Why.
        source: crate::freeze::FreezeError,
    },
    /// This host runs no programs of 32 bits.
    #[error("process {pid} is a program of 32 bits, and this host runs none")]
    Bits32 {
        /// The process, as numbered in the VE.
        pid: i32,
    },
    /// A shared object could not be filled.
    #[error("cannot write shared memory object {object}")]
    Shared {
        /// The object.
        object: u64,
        /// Why.
        source: io::Error,
    },
}

/// What does not fit together in what the source sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "Display says what each means")]
pub enum Inconsistency {
    NoInit,
    UnknownProcess(i32),
    UnknownObject(u64),
    HugePages(u64),
    UnknownFile(u32),
    UnknownNamespace(i32),
    AreaOutside(i32),
    PageCount,
    OtherContents(i32),
    Registers(i32),
    NoThreads(i32),
    UnknownFilter(u32),
    UnknownKey(u32),
}

impl std::fmt::Display for Inconsistency {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::NoInit => write!(f, "the first process is not init"),
            Self::UnknownProcess(pid) => write!(f, "process {pid} was not announced"),
            Self::UnknownObject(id) => write!(f, "shared memory object {id} was not announced"),
            Self::HugePages(page) => write!(f, "there are no huge pages of {page} bytes"),
            Self::UnknownFile(id) => write!(f, "open file {id} was not announced"),
            Self::UnknownNamespace(pid) => {
                write!(f, "a namespace of process {pid} was not announced")
            }
            Self::AreaOutside(pid) => write!(f, "an area of process {pid} is out of place"),
            Self::PageCount => write!(f, "page data and page list differ in size"),
            Self::OtherContents(pid) => {
                write!(f, "pages of process {pid} do not hold what others are to have of them")
            }
            Self::Registers(pid) => write!(f, "bad registers for a thread of process {pid}"),
            Self::NoThreads(pid) => write!(f, "process {pid} has no threads"),
            Self::UnknownKey(place) => write!(f, "key {place} was not announced"),
            Self::UnknownFilter(place) => write!(f, "seccomp filter {place} is unusable"),
        }
    }
}

/// Where the gate is in every process of a skeleton: below where programs are ever loaded.
const GATE: u64 = 0x1_0000;
/// The end of the address space of a process.
const TASK_SIZE: u64 = 0x7fff_ffff_f000;
/// The descriptor of the channel in every process, until its table is installed.
const CHANNEL: u64 = 3;

/// A VE in the making.
#[derive(Debug)]
pub struct Skeleton {
    processes: BTreeMap<i32, Bone>,
    shared: HashMap<u64, pages::SharedTarget>,
    /// Our end of the socket pair whose other end every process has as [`CHANNEL`].
    channel: OwnedFd,
    gate: Gate,
    /// The host's id of the VE's id 0.
    id_base: u32,
    /// The capabilities that init, and so every process, can have at most.
    bounding: u64,
    /// Who init, and so every process, is at first.
    born: Option<Credentials>,
    /// Zombies to be made at the end, as in the last layout.
    zombies: Vec<Shape>,
    vdso_len: u64,
    /// How far CLOCK_MONOTONIC of the source's host is ahead of ours.
    ahead_ns: i64,
    /// The semaphores of each IPC namespace, once they are there.
    semaphores: Vec<Vec<SemaphoreSet>>,
    /// The namespaces that processes can be in.
    nested: namespaces::Table,
    inherited: Inherited,
    /// The connections that are there already.
    early: Early,
}

/// One process in the making.
#[derive(Debug)]
struct Bone {
    pid: i32,
    thread: Stopped,
    /// Threads beside the leader, once installed.
    others: Vec<Stopped>,
    memory: File,
    life: u64,
    /// The life that the areas to come belong to.
    next_life: u64,
    /// Areas that have come, until they are complete.
    coming: Vec<Area>,
    parent: i32,
    session: i32,
    group: i32,
    exit_signal: i32,
    /// What it has in common with its parent.
    common: Common,
    /// The number of its pid namespace.
    space: u32,
    /// Its numbers in the pid namespaces below the VE's own, the outermost first.
    below: Vec<i32>,
    /// Who it was made as, where it begins a pid namespace.
    identity: Option<Identity>,
    /// The user namespace that it is in now; the VE's own for all that need not be elsewhere from
    /// their birth.
    users: u32,
    /// `None` for one that was born in a way that does not tell.
    namespaces: Option<Namespaces>,
    areas: Vec<Area>,
    /// Pages by address that could not be written yet: behind the end of a file that is to grow.
    late: BTreeMap<u64, Vec<u8>>,
    /// Guard regions, to be installed when nothing is written any more.
    guards: Vec<Run>,
}

impl Skeleton {
    /// Takes over the paused pid 1 of a new container, numbered `init` on the host, which holds
    /// the other end of `channel` as descriptor 3.
    ///
    /// The calling thread becomes the tracer: all further calls must come from it.
    pub fn adopt(init: i32, channel: OwnedFd, id_base: u32) -> Result<Self, RebuildError> {
        let space = areas::read_space(init)?;
        let vdso = space.vdso().ok_or(InjectError::NoVdso)?;
        let options = ptrace::EXIT_KILL | ptrace::TRACE_BIRTHS | ptrace::SUSPEND_SECCOMP;
        let thread =
            Stopped::attach(&[init], options)?.pop().ok_or(InjectError::Ended { tid: init })?;
        share_a_cpu(init);
        let gate = Gate::open(&thread, vdso, Some(GATE))?;
        let secure_bits = wipe(&thread, gate)?;
        let mut status = procfs::Status::read(init)?;
        if let Some(first) = credentials::read(&status, id_base, secure_bits)? {
            let mut batch = gate.batch();
            let capset = credentials::disarm(&mut batch, &first);
            batch.run(&thread)?.value(capset)?;
            status = procfs::Status::read(init)?;
        }
        let bounding = status.number("CapBnd", 16)?;
        let born = credentials::read(&status, id_base, secure_bits)?;
        let mut bone = Bone::new(1, thread, None)?;
        bone.session = status.in_ve("NSsid")?;
        bone.group = status.in_ve("NSpgid")?;
        raise_limits(init);
        Ok(Self {
            processes: BTreeMap::from([(1, bone)]),
            shared: HashMap::new(),
            channel,
            gate,
            id_base,
            bounding,
            born,
            zombies: Vec::new(),
            vdso_len: areas::vdso_len(&space),
            ahead_ns: 0,
            semaphores: Vec::new(),
            nested: namespaces::Table::default(),
            inherited: Inherited::of(init),
            early: Early::default(),
        })
    }

    /// Takes the namespaces that were made for programs of the VE.
    pub fn set_nested(&mut self, handles: Handles) -> Result<(), RebuildError> {
        let failed = |source| RebuildError::Outside { pid: 1, what: "find its namespaces", source };
        let times = handles.times.clone();
        self.nested = namespaces::Table::new(self.init()?, handles).map_err(failed)?;
        self.make_clocks(&times)
    }

    /// Tells how far CLOCK_MONOTONIC of the source's host is ahead of ours, so that timers end
    /// when they would have ended there.
    pub fn set_source_clock(&mut self, ahead_ns: i64) {
        self.ahead_ns = ahead_ns;
    }

    fn bone_mut(&mut self, pid: i32) -> Result<&mut Bone, RebuildError> {
        self.processes.get_mut(&pid).ok_or(RebuildError::Stream(Inconsistency::UnknownProcess(pid)))
    }

    fn bone(&self, pid: i32) -> Result<&Bone, RebuildError> {
        self.processes.get(&pid).ok_or(RebuildError::Stream(Inconsistency::UnknownProcess(pid)))
    }
}

impl Bone {
    fn new(pid: i32, thread: Stopped, parent: Option<&Self>) -> Result<Self, RebuildError> {
        let memory = crate::inject::memory(thread.tid).map_err(|source| RebuildError::Outside {
            pid,
            what: "open its memory",
            source,
        })?;
        let (parent_pid, session, group) =
            parent.map_or((0, 0, 0), |parent| (parent.pid, parent.session, parent.group));
        let namespaces = parent.map_or(Some(Namespaces::default()), |parent| parent.namespaces);
        Ok(Self {
            pid,
            thread,
            others: Vec::new(),
            memory,
            life: 0,
            next_life: 0,
            coming: Vec::new(),
            parent: parent_pid,
            session,
            group,
            exit_signal: libc::SIGCHLD,
            common: Common::default(),
            space: 0,
            below: Vec::new(),
            identity: None,
            users: parent.map_or(0, |parent| parent.users),
            namespaces,
            areas: Vec::new(),
            late: BTreeMap::new(),
            guards: Vec::new(),
        })
    }

    fn kin(&self) -> Kin {
        Kin {
            parent: self.parent,
            session: self.session,
            exit_signal: self.exit_signal,
            common: self.common,
            space: self.space,
            below: self.below.clone(),
            identity: self.identity.clone(),
        }
    }

    /// For the errors of calls made in this process.
    fn failed(&self, what: &'static str) -> impl Fn(InjectError) -> RebuildError + use<> {
        let pid = self.pid;
        move |source| RebuildError::Process { pid, what, source }
    }
}

/// Empties the process but for its gate, and takes from it what the kernel would still use.
/// Returns its secure bits, which only itself can tell.
fn wipe(thread: &Stopped, gate: Gate) -> Result<u32, RebuildError> {
    const RSEQ_FLAG_UNREGISTER: u64 = 1;
    let tid = thread.tid;
    let rseq = ptrace::rseq(tid).map_err(|source| InjectError::Control { tid, source })?;
    let mut batch = gate.batch();
    if rseq.pointer != 0 {
        let signature = u64::from(rseq.signature);
        let arguments = [rseq.pointer, u64::from(rseq.size), RSEQ_FLAG_UNREGISTER, signature];
        batch.call("rseq", libc::SYS_rseq, &arguments);
    }
    batch.call("set_robust_list", libc::SYS_set_robust_list, &[0, 24]);
    batch.call("set_tid_address", libc::SYS_set_tid_address, &[0]);
    // That of the program which it was; what fork(2) makes of it inherits it.
    let words = [0_u64, libc::SS_DISABLE as u64, 0];
    let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
    let no_stack = batch.bytes(&bytes);
    batch.call("sigaltstack", libc::SYS_sigaltstack, &[no_stack, 0]);
    batch.call("close_range", libc::SYS_close_range, &[0, CHANNEL - 1, 0]);
    batch.call("close_range", libc::SYS_close_range, &[CHANNEL + 1, u64::from(u32::MAX), 0]);
    let ignore = batch.bytes(&ignore_action());
    batch.call("rt_sigaction", libc::SYS_rt_sigaction, &[libc::SIGCHLD as u64, ignore, 0, 8]);
    let behind = gate.base + Gate::SIZE;
    batch.call("munmap", libc::SYS_munmap, &[0, gate.base]);
    batch.call("munmap", libc::SYS_munmap, &[behind, TASK_SIZE - behind]);
    let secure_bits = batch.call("prctl", libc::SYS_prctl, &[libc::PR_GET_SECUREBITS as u64]);
    let done = batch.run(thread)?;
    done.all()?;
    Ok(done.value(secure_bits)? as u32)
}

/// `struct kernel_sigaction` with SIG_IGN: a skeleton that ends leaves nothing behind.
fn ignore_action() -> [u8; 32] {
    let mut action = [0u8; 32];
    action[0] = libc::SIG_IGN as u8;
    action
}

/// Tracer and tracee on one CPU: a stop needs no wake-up across CPUs then, which costs five
/// times as much. Children inherit it; [`Skeleton::finalize`] gives every thread its own.
fn share_a_cpu(init: i32) {
    let cpu = nix::sched::sched_getcpu().unwrap_or(0);
    let mut mask = [0u64; 16];
    mask[cpu / 64 % 16] = 1 << (cpu % 64);
    for tid in [0, init] {
        if let Err(error) = task::set_affinity(tid, &mask) {
            tracing::debug!(%error, "cannot bind tracer and tracee to one CPU");
        }
    }
}

/// The descriptors of the VE are installed, and its memory is locked, before its limits are set.
fn raise_limits(init: i32) {
    for resource in [libc::RLIMIT_NOFILE, libc::RLIMIT_MEMLOCK] {
        let raised = task::limit(init, resource).and_then(|(_, hard)| {
            let beyond = match resource {
                libc::RLIMIT_MEMLOCK => task::set_limit(init, resource, u64::MAX, u64::MAX),
                _ => Err(io::ErrorKind::Unsupported.into()),
            };
            beyond.or_else(|_| task::set_limit(init, resource, hard, hard))
        });
        if let Err(error) = raised {
            tracing::debug!(resource, %error, "cannot raise a limit of a new VE");
        }
    }
}
