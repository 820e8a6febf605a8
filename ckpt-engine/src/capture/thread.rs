//! The state of one thread.

use std::sync::{Mutex, OnceLock, PoisonError};

use ckpt_format::{
    controls::ThreadControls,
    process::{Credentials, Directories, Rseq, Scheduling, SignalInfo, Thread},
};

use super::{CaptureError, IdMap, controls, restart, seccomp::Filters};
use crate::{
    inject::{Batch, Done, InjectError, Stopped, is_32_bit_code, restart_interrupted},
    procfs::{self, ProcError, Stat, Status},
    sys::{
        ptrace::{self, Registers},
        task, vm,
    },
};

/// Where the answers of a thread will be.
pub(super) struct Questions {
    alternate_stack: u64,
    tid_address: u64,
    death_signal: u64,
    secure_bits: usize,
    timer_slack: usize,
    controls: controls::ThreadQuestions,
}

/// Adds to `batch` what only the thread itself can say.
pub(super) fn questions(batch: &mut Batch) -> Questions {
    let alternate_stack = batch.room(24);
    batch.call("sigaltstack", libc::SYS_sigaltstack, &[0, alternate_stack]);
    let tid_address = batch.room(8);
    let death_signal = batch.room(8);
    let prctl = libc::SYS_prctl;
    batch.call("prctl", prctl, &[libc::PR_GET_TID_ADDRESS as u64, tid_address]);
    batch.call("prctl", prctl, &[libc::PR_GET_PDEATHSIG as u64, death_signal]);
    Questions {
        alternate_stack,
        tid_address,
        death_signal,
        secure_bits: batch.call("prctl", prctl, &[libc::PR_GET_SECUREBITS as u64]),
        timer_slack: batch.call("prctl", prctl, &[libc::PR_GET_TIMERSLACK as u64]),
        controls: controls::ThreadQuestions::ask(batch),
    }
}

/// What is to be had without asking the thread.
///
/// Also moves a thread out of an rseq(2) critical section, as the kernel would have done on its
/// way back from our stop: its registers say so afterwards on both ends.
pub(super) fn from_outside(
    host: i32,
    stopped: &mut Stopped,
    ids: IdMap,
    filters: &Mutex<Filters>,
) -> Result<Thread, CaptureError> {
    let tid = stopped.tid;
    let control = |source| InjectError::Control { tid, source };
    let status = Status::of_thread(host, tid)?;
    let rseq = ptrace::rseq(tid).map_err(control)?;
    abort_critical_section(host, &mut stopped.registers, rseq.pointer);
    let mut registers = stopped.registers;
    restart_interrupted(&mut registers);
    restart::again(host, &mut registers, || restart::function_of(tid));
    let pending = ptrace::pending_signals(tid, false).map_err(control)?;
    let scheduling = task::scheduling(tid).map_err(control)?;
    Ok(Thread {
        tid: status.in_ve("NSpid")?,
        below: status.below_ve("NSpid")?,
        name: name(host, tid)?,
        registers: ptrace::registers_to_bytes(&registers),
        extended: without_zeros(ptrace::extended_state(tid).map_err(control)?),
        signal_mask: stopped.mask,
        pending: pending.into_iter().map(|info| SignalInfo(info.to_vec())).collect(),
        alternate_stack: (0, 0, 0),
        tid_address: 0,
        robust_list: task::robust_list(tid).map_err(control)?,
        rseq: (rseq.pointer != 0).then_some(Rseq {
            pointer: rseq.pointer,
            size: rseq.size,
            signature: rseq.signature,
        }),
        credentials: credentials(&status, ids)?,
        scheduling: Scheduling {
            policy: scheduling.policy,
            nice: scheduling.nice,
            priority: scheduling.priority,
            flags: scheduling.flags,
            io_priority: task::io_priority(tid).map_err(control)?,
            processors: processors(tid).map_err(control)?,
        },
        parent_death_signal: 0,
        timer_slack_ns: 0,
        filters: filters.lock().unwrap_or_else(PoisonError::into_inner).of_thread(tid, &status)?,
        directories: directories(host, tid, &status)?,
        segments: match has_segments(&stopped.registers) {
            true => ptrace::segments(tid).map_err(control)?,
            false => Vec::new(),
        },
        controls: ThreadControls { dispatch: stopped.dispatch, ..ThreadControls::default() },
    })
}

/// What is left of the first thread of a process that has ended before another one, `like`, and the
/// status with which it has.
pub(super) fn ended(
    host: i32,
    tid: i32,
    like: &Thread,
    ids: IdMap,
) -> Result<(Thread, i32), CaptureError> {
    let status = Status::of_thread(host, tid)?;
    let thread = Thread {
        tid: status.in_ve("NSpid")?,
        below: status.below_ve("NSpid")?,
        name: name(host, tid)?,
        credentials: Credentials {
            secure_bits: like.credentials.secure_bits,
            ..credentials(&status, ids)?
        },
        pending: Vec::new(),
        alternate_stack: (0, libc::SS_DISABLE.cast_unsigned(), 0),
        tid_address: 0,
        robust_list: (0, 0),
        rseq: None,
        parent_death_signal: 0,
        filters: Vec::new(),
        directories: None,
        segments: Vec::new(),
        controls: ThreadControls::default(),
        ..like.clone()
    };
    Ok((thread, Stat::read(tid)?.field(52, "exit_code")?))
}

/// Whether a thread uses segments in a way in which only programs of 32 bits do, and those of 64
/// that contain such code.
pub(super) fn has_segments(registers: &Registers) -> bool {
    let Registers { ds, es, fs, gs, .. } = *registers;
    is_32_bit_code(registers) || ds | es | fs | gs != 0
}

/// The directories of a thread that has them apart from its process.
fn directories(host: i32, tid: i32, status: &Status) -> Result<Option<Directories>, CaptureError> {
    let control = |source| InjectError::Control { tid, source };
    if tid == host || task::share(host, tid, task::Common::Directories).map_err(control)? {
        return Ok(None);
    }
    let link = |name: &str| procfs::link(host, &format!("task/{tid}/{name}"));
    let umask = status.number("Umask", 8)? as u32;
    Ok(Some(Directories { root: link("root")?, cwd: link("cwd")?, umask }))
}

/// Adds the answers.
pub(super) fn complete(
    thread: Thread,
    questions: &Questions,
    done: &Done,
) -> Result<Thread, InjectError> {
    let stack = questions.alternate_stack;
    Ok(Thread {
        alternate_stack: (done.number(stack), done.word(stack + 8), done.number(stack + 16)),
        tid_address: done.number(questions.tid_address),
        parent_death_signal: done.word(questions.death_signal) as i32,
        timer_slack_ns: done.result(questions.timer_slack).unwrap_or(50_000),
        controls: questions.controls.answers(done, thread.controls.dispatch),
        credentials: Credentials {
            secure_bits: done.value(questions.secure_bits)? as u32,
            ..thread.credentials
        },
        ..thread
    })
}

/// The processors that the thread is bound to; empty for one that may use all there are.
pub(super) fn processors(tid: i32) -> std::io::Result<Vec<u64>> {
    let mask = task::affinity(tid)?;
    let bound: u32 = mask.iter().map(|word| word.count_ones()).sum();
    Ok(if bound as usize >= processors_there()? { Vec::new() } else { mask.to_vec() })
}

/// How many processors the host has, counted once: a thread may be bound to any of them.
fn processors_there() -> std::io::Result<usize> {
    static ALL: OnceLock<usize> = OnceLock::new();
    if let Some(&all) = ALL.get() {
        return Ok(all);
    }
    let is_processor = |entry: &std::fs::DirEntry| {
        let name = entry.file_name();
        let number = name.to_str().and_then(|name| name.strip_prefix("cpu"));
        number.is_some_and(|number| number.parse::<u32>().is_ok())
    };
    let entries = std::fs::read_dir("/sys/devices/system/cpu")?.flatten();
    Ok(*ALL.get_or_init(|| entries.filter(is_processor).count()))
}

fn name(host: i32, tid: i32) -> Result<Vec<u8>, ProcError> {
    let mut name = procfs::read(host, &format!("task/{tid}/comm"))?;
    name.pop();
    Ok(name)
}

fn credentials(status: &Status, ids: IdMap) -> Result<Credentials, ProcError> {
    let four = |key| -> Result<[u32; 4], ProcError> {
        let numbers = status.numbers(key, 10)?;
        let mut four = [65534; 4];
        for (slot, number) in four.iter_mut().zip(numbers) {
            *slot = ids.inside(number);
        }
        Ok(four)
    };
    let supplementary = status.numbers("Groups", 10)?;
    let capability = |key| status.number(key, 16);
    Ok(Credentials {
        users: four("Uid")?,
        groups: four("Gid")?,
        supplementary: supplementary.into_iter().map(|id| ids.inside(id)).collect(),
        capabilities: [
            capability("CapInh")?,
            capability("CapPrm")?,
            capability("CapEff")?,
            capability("CapBnd")?,
            capability("CapAmb")?,
        ],
        secure_bits: 0,
        no_new_privileges: status.number("NoNewPrivs", 10)? != 0,
    })
}

/// The extended state of a thread as it is told.
pub(super) fn without_zeros(mut extended: Vec<u8>) -> Vec<u8> {
    extended.truncate(extended.iter().rposition(|byte| *byte != 0).map_or(0, |last| last + 1));
    extended
}

/// Code of a process.
pub(super) fn code<const LEN: usize>(host: i32, address: u64) -> Option<[u8; LEN]> {
    let mut code = [0; LEN];
    let read = vm::read_process(host, &mut code, &[(address, LEN)]);
    matches!(read, Ok(count) if count == LEN).then_some(code)
}

/// `struct rseq` has `rseq_cs` at 8; `struct rseq_cs` is version and flags, then start, length
/// and abort address (include/uapi/linux/rseq.h).
pub(super) fn abort_critical_section(host: i32, registers: &mut Registers, rseq: u64) {
    let word = |address: u64| {
        let mut bytes = [0u8; 8];
        match vm::read_process(host, &mut bytes, &[(address, 8)]) {
            Ok(8) => u64::from_le_bytes(bytes),
            _ => 0,
        }
    };
    if rseq == 0 {
        return;
    }
    let section = word(rseq + 8);
    if section == 0 {
        return;
    }
    let (start, len, abort) = (word(section + 8), word(section + 16), word(section + 24));
    if registers.rip.wrapping_sub(start) < len {
        registers.rip = abort;
    }
}
