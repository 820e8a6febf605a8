//! Which members of the kernel's structures are read, and where they are in the running kernel.

use std::{io, sync::OnceLock};

use serde::{Deserialize, Serialize};

use crate::{btf::Types, keys};

/// Structures that the program finds from a task on, in the order in which it follows pointers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Base {
    Task,
    Number,
    Memory,
    Signals,
    Handlers,
    Directories,
    Credentials,
    Groups,
    Parent,
    Group,
    Session,
    Program,
    IoContext,
    Proxy,
    Namespace,
}

/// The pointers that lead to them: from where, through which member, and the place in it if it is
/// an array. The first, to the task, is given; the last, to the last pid namespace that a task is
/// in, is found by its depth.
pub(super) const POINTERS: [(Base, Base, &str, &str, u32); 13] = [
    (Base::Number, Base::Task, "task_struct", "thread_pid", 0),
    (Base::Memory, Base::Task, "task_struct", "mm", 0),
    (Base::Signals, Base::Task, "task_struct", "signal", 0),
    (Base::Handlers, Base::Task, "task_struct", "sighand", 0),
    (Base::Directories, Base::Task, "task_struct", "fs", 0),
    (Base::Credentials, Base::Task, "task_struct", "real_cred", 0),
    (Base::Groups, Base::Credentials, "cred", "group_info", 0),
    (Base::Parent, Base::Task, "task_struct", "real_parent", 0),
    // `enum pid_type` in include/linux/pid_types.h.
    (Base::Group, Base::Signals, "signal_struct", "pids", 2),
    (Base::Session, Base::Signals, "signal_struct", "pids", 3),
    (Base::Program, Base::Memory, "mm_struct", "exe_file", 0),
    (Base::IoContext, Base::Task, "task_struct", "io_context", 0),
    (Base::Proxy, Base::Task, "task_struct", "nsproxy", 0),
];

macro_rules! fields {
    ($($(#[$text:meta])* $name:ident: $base:ident, $len:expr, [$(($structure:literal, $member:literal)),+];)+) => {
        /// What is read.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub(super) enum Field {
            $($(#[$text])* $name),+
        }

        /// Where from, how many bytes, and the way to the member.
        const FIELDS: &[(Base, u32, &[(&str, &str)])] =
            &[$((Base::$base, $len, &[$(($structure, $member)),+])),+];
    };
}

/// The most supplementary groups that are read.
pub(super) const GROUPS_MAX: u32 = 32;
/// The most processors that are told of, as by [`task::affinity`](crate::sys::task::affinity).
const PROCESSORS_MAX: u32 = 1024;
/// The most pid namespaces, from that of the VE on, whose numbers are read.
pub(super) const DEPTH_MAX: u32 = 4;
/// `AT_VECTOR_SIZE`, with some room.
const AUXILIARY: u32 = 64 * 8;

fields! {
    Process: Task, 4, [("task_struct", "tgid")];
    Thread: Task, 4, [("task_struct", "pid")];
    /// How many programs it has executed.
    Executed: Task, 4, [("task_struct", "self_exec_id")];
    /// When it was born.
    Birth: Task, 8, [("task_struct", "start_boottime")];
    ExitState: Task, 4, [("task_struct", "exit_state")];
    ExitSignal: Task, 4, [("task_struct", "exit_signal")];
    ParentNumber: Parent, 4, [("task_struct", "tgid")];
    GroupNumber: Group, 4, [("pid", "numbers")];
    SessionNumber: Session, 4, [("pid", "numbers")];
    Tracer: Task, 4, [("task_struct", "ptrace")];
    OnProcessor: Task, 4, [("task_struct", "on_cpu")];
    Flags: Task, 4, [("task_struct", "flags")];
    JobControl: Task, 8, [("task_struct", "jobctl")];
    AtomicFlags: Task, 8, [("task_struct", "atomic_flags")];
    Personality: Task, 4, [("task_struct", "personality")];
    Blocked: Task, 8, [("task_struct", "blocked")];
    SavedMask: Task, 8, [("task_struct", "saved_sigmask")];
    StackAddress: Task, 8, [("task_struct", "sas_ss_sp")];
    StackSize: Task, 8, [("task_struct", "sas_ss_size")];
    StackFlags: Task, 4, [("task_struct", "sas_ss_flags")];
    /// By which function an interrupted call would go on.
    RestartFunction: Task, 8, [("task_struct", "restart_block"), ("restart_block", "fn")];
    ClearTid: Task, 8, [("task_struct", "clear_child_tid")];
    DeathSignal: Task, 4, [("task_struct", "pdeath_signal")];
    TimerSlack: Task, 8, [("task_struct", "timer_slack_ns")];
    Name: Task, 16, [("task_struct", "comm")];
    FilterCount: Task, 4, [("task_struct", "seccomp"), ("seccomp", "filter_count")];
    Filter: Task, 8, [("task_struct", "seccomp"), ("seccomp", "filter")];
    RseqPointer: Task, 8, [("task_struct", "rseq")];
    RseqSize: Task, 4, [("task_struct", "rseq_len")];
    RseqSignature: Task, 4, [("task_struct", "rseq_sig")];
    Dispatch: Task, 24, [("task_struct", "syscall_dispatch")];
    ThreadFlags: Task, 8, [("task_struct", "thread_info"), ("thread_info", "flags")];
    CallWork: Task, 8, [("task_struct", "thread_info"), ("thread_info", "syscall_work")];
    FileTable: Task, 8, [("task_struct", "files")];
    DirectoriesPointer: Task, 8, [("task_struct", "fs")];
    MemoryPointer: Task, 8, [("task_struct", "mm")];
    SemaphoreUndo: Task, 8, [("task_struct", "sysvsem"), ("sysv_sem", "undo_list")];
    SegmentEs: Task, 2, [("task_struct", "thread"), ("thread_struct", "es")];
    SegmentDs: Task, 2, [("task_struct", "thread"), ("thread_struct", "ds")];
    SegmentFs: Task, 2, [("task_struct", "thread"), ("thread_struct", "fsindex")];
    SegmentGs: Task, 2, [("task_struct", "thread"), ("thread_struct", "gsindex")];
    BaseFs: Task, 8, [("task_struct", "thread"), ("thread_struct", "fsbase")];
    BaseGs: Task, 8, [("task_struct", "thread"), ("thread_struct", "gsbase")];
    RobustList: Task, 8, [("task_struct", "robust_list")];
    Policy: Task, 4, [("task_struct", "policy")];
    /// By which the kernel remembers the nice value.
    StaticPriority: Task, 4, [("task_struct", "static_prio")];
    RealTimePriority: Task, 4, [("task_struct", "rt_priority")];
    IoContextPointer: Task, 8, [("task_struct", "io_context")];
    IoPriority: IoContext, 2, [("io_context", "ioprio")];
    Depth: Number, 4, [("pid", "level")];
    Umask: Directories, 4, [("fs_struct", "umask")];
    /// Mount and name, `struct path`, as the next two.
    Program: Program, 16, [("file", "f_path")];
    WorkingDirectory: Directories, 16, [("fs_struct", "pwd")];
    RootDirectory: Directories, 16, [("fs_struct", "root")];
    /// Real, saved, effective and file-system user and group, in the order of the kernel.
    Users: Credentials, 32, [("cred", "uid")];
    UserNamespace: Credentials, 8, [("cred", "user_ns")];
    /// All eight but that of its users, one pointer behind the other.
    Namespaces: Proxy, 64, [("nsproxy", "uts_ns")];
    SecureBits: Credentials, 4, [("cred", "securebits")];
    Inheritable: Credentials, 8, [("cred", "cap_inheritable")];
    Permitted: Credentials, 8, [("cred", "cap_permitted")];
    Effective: Credentials, 8, [("cred", "cap_effective")];
    Bounding: Credentials, 8, [("cred", "cap_bset")];
    Ambient: Credentials, 8, [("cred", "cap_ambient")];
    GroupCount: Groups, 4, [("group_info", "ngroups")];
    GroupList: Groups, 4 * GROUPS_MAX, [("group_info", "gid")];
    SignalFlags: Signals, 4, [("signal_struct", "flags")];
    PosixTimers: Signals, 8, [("signal_struct", "posix_timers")];
    /// Of `ITIMER_PROF` and `ITIMER_VIRTUAL`, each with its period.
    ProcessorTimers: Signals, 32, [("signal_struct", "it")];
    RealTimer: Signals, 8, [
        ("signal_struct", "real_timer"), ("hrtimer", "node"), ("timerqueue_node", "expires")
    ];
    RealTimerState: Signals, 1, [("signal_struct", "real_timer"), ("hrtimer", "state")];
    RealTimerPeriod: Signals, 8, [("signal_struct", "it_real_incr")];
    Limits: Signals, 256, [("signal_struct", "rlim")];
    OutOfMemory: Signals, 2, [("signal_struct", "oom_score_adj")];
    Actions: Handlers, 2048, [("sighand_struct", "action")];
    MemoryFlags: Memory, 8, [("mm_struct", "flags")];
    Barriers: Memory, 4, [("mm_struct", "membarrier_state")];
    FutureFlags: Memory, 8, [("mm_struct", "def_flags")];
    StartCode: Memory, 8, [("mm_struct", "start_code")];
    EndCode: Memory, 8, [("mm_struct", "end_code")];
    StartData: Memory, 8, [("mm_struct", "start_data")];
    EndData: Memory, 8, [("mm_struct", "end_data")];
    StartBreak: Memory, 8, [("mm_struct", "start_brk")];
    Break: Memory, 8, [("mm_struct", "brk")];
    StartStack: Memory, 8, [("mm_struct", "start_stack")];
    ArgumentStart: Memory, 8, [("mm_struct", "arg_start")];
    ArgumentEnd: Memory, 8, [("mm_struct", "arg_end")];
    EnvironmentStart: Memory, 8, [("mm_struct", "env_start")];
    EnvironmentEnd: Memory, 8, [("mm_struct", "env_end")];
    Auxiliary: Memory, AUXILIARY, [("mm_struct", "saved_auxv")];
    // After the timers: one that ends in between is then seen as a signal.
    Pending: Task, 8, [("task_struct", "pending"), ("sigpending", "signal")];
    PendingOfAll: Signals, 8, [("signal_struct", "shared_pending"), ("sigpending", "signal")];
    NextNumber: Namespace, 4, [("pid_namespace", "idr"), ("idr", "idr_next")];
}

/// One member: `len` bytes, `offset` behind the beginning of a structure.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(super) struct Place {
    pub(super) base: Base,
    pub(super) offset: u32,
    pub(super) len: u32,
    /// Where the program puts it.
    pub(super) at: u32,
}

/// A single bit.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(super) struct Bit {
    /// The byte, as other members.
    pub(super) place: Place,
    pub(super) mask: u8,
}

/// Where keyrings are (keyrings(7)).
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Possessions {
    /// The session keyring of a thread, its process keyring, its own, and the namespace of its user.
    pub(super) places: [Place; 4],
    /// The same in keyrings.
    pub(super) keys: keys::Places,
}

/// Where everything is in the running kernel.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Fields {
    /// The kernel's function that shows tasks.
    pub(super) iterator: u32,
    /// For each of [`POINTERS`], its offset.
    pub(super) pointers: Vec<u32>,
    pub(super) places: Vec<Place>,
    pub(super) subreaper: Bit,
    /// Whether [`Field::SavedMask`] is the one to go back to.
    pub(super) restores_mask: Bit,
    /// Whether children begin with the usual scheduling.
    pub(super) resets: Bit,
    /// On which processors a thread may run, as far as they are told.
    pub(super) processors: Place,
    /// Who has logged in, where the kernel keeps a record of it.
    pub(super) login: Option<Place>,
    /// The rights to memory by protection keys.
    pub(super) keys: Option<Place>,
    /// What threads possess, where the kernel has keys.
    pub(super) possessions: Option<Possessions>,
    /// How often the areas were locked to be changed (`CONFIG_PER_VMA_LOCK`).
    pub(super) locked: Option<Place>,
    /// The numbers of a task, from those of the first namespace on; each entry is 16 bytes.
    pub(super) numbers: u32,
    /// How many namespaces it is below the first one.
    pub(super) depth: u32,
    /// Where the pointer to the state of the extended registers is in a task.
    pub(super) extended: u32,
    /// Its size, and where it begins.
    pub(super) extended_size: u32,
    pub(super) extended_start: u32,
    /// How much room all of it takes but the extended registers: numbers, general registers, fields.
    pub(super) len: u32,
}

/// How many bytes of extended registers stand behind the rest.
pub(super) const EXTENDED_LEN_AT: usize = 8;
/// General registers, `struct pt_regs`.
pub(super) const REGISTERS_LEN: u32 = 168;
pub(super) const REGISTERS_AT: u32 = 16;
pub(super) const NUMBERS_AT: u32 = REGISTERS_AT + REGISTERS_LEN;
const FIELDS_AT: u32 = NUMBERS_AT + 16 * DEPTH_MAX;

impl Fields {
    /// Those of the running kernel, if it is one that is understood. Found once: it takes long.
    pub(crate) fn known() -> Option<&'static Self> {
        static FIELDS: OnceLock<Option<Fields>> = OnceLock::new();
        let find = || {
            let found = Self::find();
            if let Err(error) = &found {
                tracing::info!(%error, "the kernel does not tell where its structures are");
            }
            found.ok()
        };
        FIELDS.get_or_init(find).as_ref()
    }

    /// Whether they tell where keys are.
    pub(crate) fn tell_keys(&self) -> bool {
        self.possessions.is_some()
    }

    fn find() -> io::Result<Self> {
        let types = Types::read()?;
        let mut at = FIELDS_AT;
        let mut room = |len: u32| {
            let here = at;
            at += len.next_multiple_of(8);
            here
        };
        let way = |way: &[(&str, &str)]| -> io::Result<u32> {
            way.iter().map(|(structure, member)| types.offset(structure, member)).sum()
        };
        let places: Vec<Place> = FIELDS
            .iter()
            .map(|&(base, len, members)| {
                Ok(Place { base, offset: way(members)?, len, at: room(len) })
            })
            .collect::<io::Result<_>>()?;
        let mut bit = |base, structure: &str, member: &str| -> io::Result<Bit> {
            let bit = types.bit(structure, member)?;
            let place = Place { base, offset: bit / 8, len: 1, at: room(1) };
            Ok(Bit { place, mask: 1 << (bit % 8) })
        };
        let subreaper = bit(Base::Signals, "signal_struct", "is_child_subreaper")?;
        let restores_mask = bit(Base::Task, "task_struct", "restore_sigmask")?;
        let resets = bit(Base::Task, "task_struct", "sched_reset_on_fork")?;
        let len = types.size("cpumask")?.min(PROCESSORS_MAX / 8);
        let offset = types.offset("task_struct", "cpus_mask")?;
        let processors = Place { base: Base::Task, offset, len, at: room(len) };
        let mut perhaps = |base, len, members: &[(&str, &str)]| {
            let offset = way(members).ok()?;
            Some(Place { base, offset, len, at: room(len) })
        };
        let login = perhaps(Base::Task, 4, &[("task_struct", "loginuid")]);
        let keys = perhaps(Base::Task, 4, &[("task_struct", "thread"), ("thread_struct", "pkru")]);
        let locked = perhaps(Base::Memory, 4, &[("mm_struct", "mm_lock_seq")]);
        let mut possessed = ["session_keyring", "process_keyring", "thread_keyring", "user_ns"]
            .map(|member| perhaps(Base::Credentials, 8, &[("cred", member)]));
        let possessions = match possessed.each_mut().map(Option::take) {
            [Some(session), Some(process), Some(thread), Some(users)] => {
                let places = [session, process, thread, users];
                keys::Places::find(&types).ok().map(|keys| Possessions { places, keys })
            }
            _ => None,
        };
        // Behind the task itself from Linux 6.16 on.
        let registers = way(&[("task_struct", "thread"), ("thread_struct", "fpu")])
            .or_else(|_| types.size("task_struct"))?;
        let pointer = |(_, _, structure, member, place): &(_, _, &str, &str, u32)| {
            types.offset(structure, member).map(|offset| offset + 8 * place)
        };
        Ok(Self {
            iterator: types.function("bpf_iter_task")?,
            pointers: POINTERS.iter().map(pointer).collect::<io::Result<_>>()?,
            places,
            subreaper,
            restores_mask,
            resets,
            processors,
            login,
            keys,
            possessions,
            locked,
            numbers: types.offset("pid", "numbers")?,
            depth: types.offset("pid", "level")?,
            extended: registers + types.offset("fpu", "fpstate")?,
            extended_size: types.offset("fpstate", "size")?,
            extended_start: types.offset("fpstate", "regs")?,
            len: at,
        })
    }

    /// Everything that is copied by the program as it is.
    pub(super) fn all(&self) -> impl Iterator<Item = &Place> {
        let bits = [&self.subreaper.place, &self.restores_mask.place, &self.resets.place];
        let bits = bits.into_iter().chain([&self.processors]);
        let perhaps = self.login.iter().chain(&self.keys).chain(&self.locked);
        let possessions = self.possessions.iter().flat_map(|it| &it.places);
        self.places.iter().chain(bits).chain(perhaps).chain(possessions)
    }

    pub(super) fn place(&self, field: Field) -> &Place {
        &self.places[field as usize]
    }
}
