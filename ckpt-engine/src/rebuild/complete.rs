//! The last of what a process is, up to the registers of its threads.

use std::{fs, io, os::fd::AsFd};

use ckpt_format::process::{
    Credentials, Process, Processes, Shape, SignalAction, SignalInfo, Thread,
};

use nix::poll::{PollFd, PollFlags, poll};

use super::{
    Bone, Inconsistency, Ready, RebuildError, Skeleton, bits32,
    calls::Calls,
    controls, credentials, keys,
    outside::{When, schedule},
    timers, tree,
};
use crate::{
    inject::{Batch, Gate, InjectError},
    procfs,
    sys::{
        event,
        ptrace::{self, Stop},
        task,
    },
};

/// Where in the gate's loop its `syscall` instruction stands.
const GATE_SYSCALL: u64 = 32;
const PR_SET_TIMERSLACK: u64 = 29;
const LAST_PID: &str = "/proc/sys/kernel/ns_last_pid";
const SS_ONSTACK: u64 = 1;
const SS_DISABLE: u64 = 2;

impl Skeleton {
    /// Registers. Afterwards every process stands where the source's stood, nothing of ours is
    /// left in it, and only [`Ready::release`] is left to do.
    pub fn finalize(mut self, processes: &Processes) -> Result<Ready, RebuildError> {
        self.seal_shared()?;
        self.end_zombies(processes)?;
        // All leave at once: the tracer goes on until it needs the first of them.
        for bone in self.processes.values() {
            let begun = self.gate.begin_close(&bone.thread, bone.vdso()?);
            begun.map_err(bone.failed("remove our own code"))?;
        }
        let mut ready = Vec::new();
        for process in &processes.processes {
            let bone = self
                .processes
                .remove(&process.pid)
                .ok_or(RebuildError::Stream(Inconsistency::UnknownProcess(process.pid)))?;
            ready.push(self.set_registers(bone, process)?);
        }
        match self.processes.keys().next() {
            Some(&pid) => Err(Inconsistency::UnknownProcess(pid).into()),
            None => Ok(Ready::new(ready)),
        }
    }

    /// What comes before a process has its descriptors: limits that must not be exceeded, and what
    /// takes calls of its own.
    pub(super) fn prepare_to_complete(
        &self,
        bone: &Bone,
        process: &Process,
    ) -> Result<(), RebuildError> {
        self.protect_memory(bone)?;
        self.inherited.limit(bone.thread.tid, &process.limits, When::First);
        self.set_login(bone, process)?;
        timers::create_posix_timers(&bone.thread, self.gate, &process.posix_timers)
            .map_err(bone.failed("make its timers"))?;
        self.set_local_segments(bone, process)?;
        if bone.is_32_bit() {
            self.set_as_32_bit(bone, process)?;
        }
        Ok(())
    }

    /// Signals, timers and credentials: the last of the calls of a process.
    pub(super) fn complete(
        &self,
        mut calls: Calls<'_>,
        process: &Process,
        mut keys: Option<&mut keys::Made<'_>>,
    ) -> Result<(), RebuildError> {
        let bone = calls.bone;
        let elapsed_ns = event::elapsed(process.timers_read_at_ns, self.ahead_ns)
            .map_err(|source| outside(process.pid, "read the clock", source))?;
        let is_32_bit = bone.is_32_bit();
        let power = self.power(bone)?;
        // What all share is set by the first in the same stop as its own.
        calls.batch.step("set its signals and timers");
        if !is_32_bit {
            set_actions(&mut calls.batch, &process.actions);
        }
        whole_process(&mut calls.batch, process, elapsed_ns);
        let mut first = Some(calls);
        let stopped = std::iter::once(&bone.thread).chain(&bone.others);
        for (stopped, thread) in stopped.zip(process.living()) {
            controls::set_speculation(stopped, self.gate, thread)
                .map_err(bone.failed("control a thread's speculation"))?;
            let mut calls = first.take().unwrap_or_else(|| Calls::of(stopped, self.gate, bone));
            calls.batch.step("set a thread's credentials and signals");
            let (head, len) = thread.robust_list;
            if len != 0 && !is_32_bit {
                calls.batch.call("set_robust_list", libc::SYS_set_robust_list, &[head, len]);
            }
            if calls.batch.is_nearly_full() {
                calls.run()?;
            }
            // From a user namespace below that of the VE they cannot be joined.
            let joining = match (&keys, power) {
                (Some(made), Power::Root { .. }) => made.join(&mut calls.batch, thread.tid),
                _ => keys::Joining::default(),
            };
            one_thread(&mut calls.batch, process, thread, power);
            let done = calls.run()?;
            if let (Some(made), Some(done)) = (&mut keys, done) {
                made.joined(&done, &joining, thread)
                    .map_err(|source| outside(process.pid, "give it its keyrings", source))?;
            }
        }
        let host = bone.thread.tid;
        self.inherited.limit(host, &process.limits, When::Last);
        self.inherited.describe(host, process.oom_score_adjustment, process.coredump_filter);
        Ok(())
    }

    /// What its threads are before they have their own credentials.
    pub(super) fn power(&self, bone: &Bone) -> Result<Power<'_>, RebuildError> {
        Ok(match self.is_user_apart(bone.pid)? {
            false => Power::Root { bounding: self.bounding, born: self.born.as_ref() },
            // All that there are.
            true => Power::Apart {
                bounding: procfs::Status::read(bone.thread.tid)?.number("CapBnd", 16)?,
            },
        })
    }

    /// The next new process in the pid namespace of this one gets the number after this.
    pub(super) fn set_last_pid(&self, by: &Bone, last_pid: i32) -> Result<(), RebuildError> {
        if last_pid > 0
            && let Err(error) = self.write_last_pid(by, last_pid)?
        {
            tracing::debug!(%error, "cannot set the last process number of the VE");
        }
        Ok(())
    }

    /// The same; the inner error is that of a process that cannot reach the setting.
    pub(super) fn write_last_pid(
        &self,
        by: &Bone,
        last_pid: i32,
    ) -> Result<Result<(), InjectError>, RebuildError> {
        if !by.below.is_empty() {
            return self.pass_last_pid(by, last_pid);
        }
        let mut batch = self.gate.batch();
        let path = batch.text(LAST_PID);
        let text = last_pid.to_string();
        let flags = (libc::O_WRONLY | libc::O_CLOEXEC) as u64;
        let open = batch.call("open", libc::SYS_open, &[path, flags]);
        let fd = match batch.run(&by.thread)?.value(open) {
            Ok(fd) => fd,
            Err(error) => return Ok(Err(error)),
        };
        let mut batch = self.gate.batch();
        let bytes = batch.bytes(text.as_bytes());
        batch.call("write", libc::SYS_write, &[fd, bytes, text.len() as u64]);
        batch.call("close", libc::SYS_close, &[fd]);
        batch.run(&by.thread)?.all().map_err(by.failed("set its last process number"))?;
        Ok(Ok(()))
    }

    /// The same for one that may not see the setting, or not as what can be written: what is open
    /// for us is about the pid namespace of whoever writes. Only while it has the channel.
    fn pass_last_pid(
        &self,
        by: &Bone,
        last_pid: i32,
    ) -> Result<Result<(), InjectError>, RebuildError> {
        let failed = |source| outside(by.pid, "open the last process number", source);
        let setting = fs::File::options().write(true).open(LAST_PID).map_err(failed)?;
        self.pass_descriptor(&by.thread, by.pid, &setting.into())?;
        let mut batch = self.gate.batch();
        let text = last_pid.to_string();
        let bytes = batch.bytes(text.as_bytes());
        let write = batch.call("write", libc::SYS_write, &[0, bytes, text.len() as u64]);
        batch.call("close", libc::SYS_close, &[0]);
        Ok(batch.run(&by.thread)?.value(write).map(drop))
    }

    /// Makes the processes that have ended on the source but are not yet waited for.
    pub(super) fn bear_zombies(&mut self) -> Result<(), RebuildError> {
        let mut leaders = Vec::new();
        for shape in self.zombies.clone() {
            self.bear(&shape, &mut leaders)?;
            self.join_zombie_group(&shape)?;
        }
        for leader in leaders {
            tree::end(&leader)?;
        }
        Ok(())
    }

    /// Lets them end, now that their parents no longer ignore it. A parent has been told of it
    /// on the source already, and is not told again.
    fn end_zombies(&mut self, processes: &Processes) -> Result<(), RebuildError> {
        let mut told = Vec::new();
        let mut zombies = std::mem::take(&mut self.zombies);
        // With the first process of a pid namespace all others in it end.
        zombies.sort_by_key(|shape| {
            let below = &shape.below.process;
            std::cmp::Reverse(if below.last() == Some(&1) { below.len() } else { usize::MAX })
        });
        for shape in zombies {
            let Some(bone) = self.processes.remove(&shape.pid) else { continue };
            let failed = |source| outside(shape.pid, "end it as a zombie", source);
            let pidfd = task::pidfd_open(bone.thread.tid).map_err(failed)?;
            end_with(&bone, self.gate.base, shape.zombie.unwrap_or(0))?;
            wait_for_end(&pidfd).map_err(failed)?;
            told.push((shape.parent, shape.exit_signal));
        }
        for process in &processes.processes {
            let waits = |signal: i32| pending(process).any(|info| number(info) == signal);
            let again = told.iter().filter(|&&(pid, signal)| pid == process.pid && !waits(signal));
            let signals: u64 = again
                .filter(|(_, signal)| (1..=64).contains(signal))
                .fold(0, |set, (_, signal)| set | 1 << (signal - 1));
            if signals != 0 {
                self.forget_signals(process.pid, signals)?;
            }
        }
        Ok(())
    }

    /// Takes pending signals from a process.
    fn forget_signals(&self, pid: i32, signals: u64) -> Result<(), RebuildError> {
        let bone = self.bone(pid)?;
        for _ in 0..signals.count_ones() {
            let mut batch = self.gate.batch();
            let set = batch.bytes(&signals.to_le_bytes());
            let now = batch.room(16);
            let arguments = [set, 0, now, 8];
            batch.call("rt_sigtimedwait", libc::SYS_rt_sigtimedwait, &arguments);
            // An error says that none is there: the parent does not care how its children end.
            batch.run(&bone.thread)?;
        }
        Ok(())
    }

    fn join_zombie_group(&mut self, shape: &Shape) -> Result<(), RebuildError> {
        let bone = self.bone(shape.pid)?;
        if bone.group == shape.group {
            return Ok(());
        }
        self.set_group(shape)
    }

    /// Sets the registers; nothing of ours is left in the process.
    fn set_registers(&self, bone: Bone, process: &Process) -> Result<Vec<Rebuilt>, RebuildError> {
        self.gate.end_close(&bone.thread).map_err(bone.failed("remove our own code"))?;
        if process.stopped.is_some() {
            meet_stop_signal(bone.thread.tid).map_err(bone.failed("stop it"))?;
        }
        let mut rebuilt = Vec::with_capacity(process.living().len());
        let stopped = std::iter::once(&bone.thread).chain(&bone.others);
        for (index, (stopped, thread)) in stopped.zip(process.living()).enumerate() {
            let tid = stopped.tid;
            let control = |source| InjectError::Control { tid, source };
            let registers = ptrace::registers_from_bytes(&thread.registers)
                .ok_or(Inconsistency::Registers(process.pid))?;
            ptrace::set_extended_state(tid, &thread.extended).map_err(control)?;
            bits32::set_segments(tid, &thread.segments).map_err(control)?;
            ptrace::set_registers(tid, &registers).map_err(control)?;
            ptrace::set_signal_mask(tid, thread.signal_mask).map_err(control)?;
            if thread.controls.dispatch.is_some() {
                ptrace::set_dispatch(tid, thread.controls.dispatch).map_err(control)?;
            }
            schedule(tid, thread)
                .map_err(|source| outside(process.pid, "set its scheduling", source))?;
            let stop_signal = if index == 0 { process.stopped.unwrap_or(0) } else { 0 };
            rebuilt.push(Rebuilt { tid, stop_signal });
        }
        Ok(rebuilt)
    }
}

/// Lets a thread go on up to where it is asked about a signal that stops it. Only there the one is
/// taken with which it is let go; anywhere else a frozen cgroup comes first.
fn meet_stop_signal(tid: i32) -> Result<(), InjectError> {
    let control = |source| InjectError::Control { tid, source };
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(tid), nix::sys::signal::Signal::SIGSTOP)
        .map_err(|errno| control(errno.into()))?;
    ptrace::resume(tid, 0).map_err(control)?;
    match ptrace::wait(tid).map_err(control)? {
        Stop::Stopped { signal: libc::SIGSTOP, event: 0 } => Ok(()),
        Stop::Stopped { signal, event } => Err(InjectError::Unexpected { tid, signal, event }),
        Stop::Ended(_) => Err(InjectError::Ended { tid }),
    }
}

/// What a thread is before it has its own credentials.
#[derive(Clone, Copy, Debug)]
pub(super) enum Power<'a> {
    /// Root of the VE.
    Root { bounding: u64, born: Option<&'a Credentials> },
    /// The user that it is to be, with all capabilities in a user namespace.
    Apart { bounding: u64 },
}

/// A thread that only has to be let go.
#[derive(Clone, Copy, Debug)]
pub(super) struct Rebuilt {
    pub(super) tid: i32,
    /// The signal that keeps its process stopped, 0 for a running one.
    pub(super) stop_signal: i32,
}

/// The signals that wait for a process or one of its threads.
fn pending(process: &Process) -> impl Iterator<Item = &SignalInfo> {
    process.pending.iter().chain(process.threads.iter().flat_map(|thread| &thread.pending))
}

/// Which signal it is.
fn number(signal: &SignalInfo) -> i32 {
    signal.0.first_chunk().map_or(0, |bytes| i32::from_le_bytes(*bytes))
}

/// Waits until a process that was told to end has ended.
fn wait_for_end(pidfd: &impl AsFd) -> io::Result<()> {
    const PATIENCE_MS: u16 = 5000;
    let mut ended = [PollFd::new(pidfd.as_fd(), PollFlags::POLLIN)];
    match poll(&mut ended, PATIENCE_MS)? {
        0 => Err(io::ErrorKind::TimedOut.into()),
        _ => Ok(()),
    }
}

pub(super) fn outside(pid: i32, what: &'static str, source: io::Error) -> RebuildError {
    RebuildError::Outside { pid, what, source }
}

/// What is done about signals that is not done in a skeleton already: that is born with all
/// actions at their default but one.
pub(super) fn can_be_set(actions: &[SignalAction]) -> impl Iterator<Item = (u64, &SignalAction)> {
    const NEVER: [u64; 2] = [libc::SIGKILL as u64, libc::SIGSTOP as u64];
    let other = |action: &SignalAction| *action != SignalAction::default();
    (1..).zip(actions).filter(move |(signal, action)| {
        !NEVER.contains(signal) && (other(action) || *signal == libc::SIGCHLD as u64)
    })
}

fn set_actions(batch: &mut Batch, actions: &[SignalAction]) {
    for (signal, action) in can_be_set(actions) {
        let fields = [action.handler, action.flags, action.restorer, action.mask];
        let bytes: Vec<u8> = fields.iter().flat_map(|field| field.to_le_bytes()).collect();
        let address = batch.bytes(&bytes);
        batch.call("rt_sigaction", libc::SYS_rt_sigaction, &[signal, address, 0, 8]);
    }
}

/// What all threads share but signal actions; runs in the leader.
fn whole_process(batch: &mut Batch, process: &Process, elapsed_ns: i64) {
    let prctl = libc::SYS_prctl;
    timers::start_posix_timers(batch, &process.posix_timers, elapsed_ns);
    timers::interval_timers(batch, &process.interval_timers, elapsed_ns);
    // The kernel lets only the thread itself forge the sender, and takes its number as well.
    let first = process.living().first();
    let own = own_number(first, first.map_or(process.pid, |thread| thread.tid));
    for signal in &process.pending {
        queue(batch, own, None, signal);
    }
    batch.call("umask", libc::SYS_umask, &[u64::from(process.umask)]);
    if process.personality != 0 {
        batch.call("personality", libc::SYS_personality, &[u64::from(process.personality)]);
    }
    if process.child_subreaper {
        batch.call("prctl", prctl, &[libc::PR_SET_CHILD_SUBREAPER as u64, 1]);
    }
    controls::whole_process(batch, &process.controls);
    for bit in [1 << 2, 1 << 4, 1 << 6, 1 << 8] {
        if process.membarrier & bit != 0 {
            batch.call("membarrier", libc::SYS_membarrier, &[u64::from(bit), 0, 0]);
        }
    }
}

fn one_thread(batch: &mut Batch, process: &Process, thread: &Thread, power: Power<'_>) {
    let prctl = libc::SYS_prctl;
    give_name(batch, thread);
    batch.call("set_tid_address", libc::SYS_set_tid_address, &[thread.tid_address]);
    let (stack, flags, size) = thread.alternate_stack;
    if u64::from(flags) & SS_DISABLE == 0 {
        let fields = [stack, u64::from(flags) & !SS_ONSTACK, size];
        let bytes: Vec<u8> = fields.iter().flat_map(|field| field.to_le_bytes()).collect();
        let address = batch.bytes(&bytes);
        batch.call("sigaltstack", libc::SYS_sigaltstack, &[address, 0]);
    }
    batch.call("prctl", prctl, &[PR_SET_TIMERSLACK, thread.timer_slack_ns]);
    give_credentials(batch, thread, power);
    if thread.parent_death_signal != 0 {
        let signal = thread.parent_death_signal as u64;
        batch.call("prctl", prctl, &[libc::PR_SET_PDEATHSIG as u64, signal]);
    }
    // A change of user has cleared it; 2 is what the kernel alone can set.
    if process.dumpable < 2 {
        let dumpable = u64::from(process.dumpable);
        batch.call("prctl", prctl, &[libc::PR_SET_DUMPABLE as u64, dumpable]);
    }
    for signal in &thread.pending {
        let pid = own_number(process.threads.first(), process.pid);
        queue(batch, pid, Some(own_number(Some(thread), thread.tid)), signal);
    }
    if let Some(rseq) = thread.rseq {
        let arguments = [rseq.pointer, u64::from(rseq.size), 0, u64::from(rseq.signature)];
        batch.call("rseq", libc::SYS_rseq, &arguments);
    }
    controls::one_thread(batch, &thread.controls);
}

pub(super) fn give_name(batch: &mut Batch, thread: &Thread) {
    let name = batch.bytes(&[&thread.name[..], &[0]].concat());
    batch.call("prctl", libc::SYS_prctl, &[libc::PR_SET_NAME as u64, name]);
}

pub(super) fn give_credentials(batch: &mut Batch, thread: &Thread, power: Power<'_>) {
    match power {
        // It is that already.
        Power::Root { born, .. } if born == Some(&thread.credentials) => {}
        Power::Root { bounding, .. } => credentials::set(batch, &thread.credentials, bounding),
        Power::Apart { bounding } => credentials::limit(batch, &thread.credentials, bounding),
    }
}

/// The number of a thread in its own pid namespace.
fn own_number(thread: Option<&Thread>, in_ve: i32) -> i32 {
    thread.and_then(|thread| thread.below.last()).copied().unwrap_or(in_ve)
}

/// Queues a signal with all it carries: only the process itself may forge the sender.
fn queue(batch: &mut Batch, pid: i32, tid: Option<i32>, signal: &SignalInfo) {
    let number = number(signal) as u64;
    let info = batch.bytes(&signal.0);
    let pid = pid as u64;
    match tid {
        None => batch.call("rt_sigqueueinfo", libc::SYS_rt_sigqueueinfo, &[pid, number, info]),
        Some(tid) => batch.call(
            "rt_tgsigqueueinfo",
            libc::SYS_rt_tgsigqueueinfo,
            &[pid, tid as u64, number, info],
        ),
    };
}

/// Lets the process end with this wait status, so that its parent finds it as a zombie.
fn end_with(bone: &Bone, gate: u64, status: i32) -> Result<(), RebuildError> {
    let tid = bone.thread.tid;
    let control = |source| InjectError::Control { tid, source };
    let signal = status & 0x7f;
    if signal != 0 {
        // No core file: it was written, if at all, when the process died.
        task::set_limit(tid, libc::RLIMIT_CORE, 0, 0)
            .map_err(|source| outside(bone.pid, "end it as a zombie", source))?;
    }
    if signal == 0 {
        return end_by(bone, gate, libc::SYS_exit_group, status >> 8);
    }
    let mut registers = bone.thread.registers;
    registers.orig_rax = u64::MAX;
    // A signal is delivered only from a signal stop: make one, then let it die of the right one.
    ptrace::set_signal_mask(tid, 0).map_err(control)?;
    registers.rip = gate + Gate::END;
    registers.r15 = libc::SIGSTKFLT as u64;
    ptrace::set_registers(tid, &registers).map_err(control)?;
    ptrace::resume(tid, 0).map_err(control)?;
    ptrace::wait(tid).map_err(control)?;
    ptrace::detach(tid, signal).map_err(control)?;
    Ok(())
}

/// Lets the first thread go with this call, which ends it or all of them, and this code.
pub(super) fn end_by(bone: &Bone, gate: u64, call: i64, code: i32) -> Result<(), RebuildError> {
    let tid = bone.thread.tid;
    let control = |source| InjectError::Control { tid, source };
    let mut registers = bone.thread.registers;
    registers.rip = gate + GATE_SYSCALL;
    registers.rax = call as u64;
    registers.rdi = (code & 0xff) as u64;
    registers.orig_rax = u64::MAX;
    ptrace::set_registers(tid, &registers).map_err(control)?;
    ptrace::detach(tid, 0).map_err(control)?;
    Ok(())
}

/// The threads of one rebuilt process.
pub(super) type ProcessThreads = Vec<Rebuilt>;
