//! The state that all threads of a process share.

use std::{collections::HashMap, sync::Mutex};

use ckpt_format::{
    blocker::Blocker,
    controls::ProcessControls,
    ipc::SemaphoreSet,
    memory::MemoryMap,
    process::{IntervalTimer, PosixTimer, Process, Ring, SignalAction, SignalInfo, Thread},
};

use super::{
    CaptureError, IdMap, bits32, common, controls,
    seccomp::Filters,
    thread,
    timers::{self, TimerLine, timer_lines},
};
use crate::{
    aio,
    inject::{Batch, Done, Gate, InjectError, Stopped},
    ipc,
    procfs::{self, ProcError, Stat, Status},
    surgeon::Patient,
    sys::{event, ptrace, task},
    unnamed,
};

const MEMBARRIER_GET_REGISTRATIONS: u64 = 1 << 9;
const LIMITS: u32 = 16;
const LAST_PID: &str = "/proc/sys/kernel/ns_last_pid";

/// The places in the batch's data and results where the answers will be.
struct Questions {
    actions: Vec<u64>,
    intervals: Vec<u64>,
    timers: Vec<(TimerLine, u64, usize)>,
    subreaper: u64,
    dumpable: usize,
    controls: controls::ProcessQuestions,
    brk: usize,
    membarrier: usize,
    leader: thread::Questions,
}

/// Captures one process whose threads are all stopped; the leader comes first.
pub(super) fn capture(
    patient: &Patient,
    threads: &mut [Stopped],
    ids: IdMap,
    sets: &[SemaphoreSet],
    filters: &Mutex<Filters>,
) -> Result<Process, CaptureError> {
    let host = patient.host;
    let vdso = patient.vdso.ok_or(InjectError::NoVdso)?;
    let outside = threads
        .iter_mut()
        .map(|stopped| thread::from_outside(host, stopped, ids, filters))
        .collect::<Result<Vec<_>, _>>()?;
    let leader = threads.first().ok_or(InjectError::Ended { tid: host })?;
    let gate = Gate::open(leader, vdso, None)?;
    let start = now(host)?;
    let answers = ask(host, gate, threads);
    let timers_read_at_ns = now(host)?;
    let undo = ipc::adjustments(leader, gate, sets);
    let segments = bits32::local_segments(leader, gate, threads);
    let locks = match vdso.is_32_bit {
        true => bits32::robust_lists(gate, threads).map(Some),
        false => Ok(None),
    };
    // Signals last: a timer that ends meanwhile is then seen as a pending signal.
    let pending = pending(leader.tid, threads);
    let end = now(host)?;
    let status = Status::read(host);
    // Only a task of a pid namespace can say.
    let founder = outside.first().is_some_and(|leader| leader.below.last() == Some(&1));
    let last_pid = match founder {
        true => read_in(leader, gate, LAST_PID).map(|text| text.trim().parse().unwrap_or(0)),
        false => Ok(0),
    };
    let lock_future =
        status.as_ref().map_or(0, |status| controls::lock_future(host, status, gate.base));
    gate.close(leader, vdso)?;
    let (questions, done, others) = answers?;
    let (pending, pending_by_thread) = pending?;
    let (semaphore_undo, last_pid) = (undo?, last_pid?);
    let (local_segments, locks) = (segments?, locks?);

    let mut all = Vec::with_capacity(threads.len());
    let asked = std::iter::once((&questions.leader, &done))
        .chain(others.iter().map(|(questions, done)| (questions, done)));
    for ((outside, (questions, done)), pending) in
        outside.into_iter().zip(asked).zip(pending_by_thread)
    {
        all.push(Thread { pending, ..thread::complete(outside, questions, done)? });
    }
    let mut process = from_outside(host, patient.inner, &status?, ids)?;
    if patient.rings {
        process.rings = rings(patient)?;
    }
    if threads.len() > 1 && common::has_table_apart(host) {
        let object = "a thread with a descriptor table of its own".to_owned();
        return Err(blocked(patient, object, "end the program"));
    }
    for (thread, locks) in all.iter_mut().zip(locks.into_iter().flatten()) {
        thread.robust_list = locks;
    }
    process.local_segments = local_segments;
    process.controls.lock_future = lock_future;
    process.stopped = threads.iter().find_map(Stopped::stop_signal);
    let inner_by_host: HashMap<i32, i32> = threads
        .iter()
        .zip(&all)
        .map(|(stopped, thread)| (stopped.tid, own_number(thread)))
        .collect();
    set_threads(&mut process, patient, all, ids)?;
    process.semaphore_undo = semaphore_undo;
    process.last_pid = last_pid;
    process.pending = pending;
    fill_in(&mut process, &questions, &done)?;
    process.timers_read_at_ns = timers_read_at_ns;
    timers::count_once(&mut process, end.saturating_sub(start).unsigned_abs());
    for timer in &mut process.posix_timers {
        timer.thread = inner_by_host.get(&timer.thread).copied().unwrap_or(0);
    }
    Ok(process)
}

/// The threads, with the first one where that has ended before these.
fn set_threads(
    process: &mut Process,
    patient: &Patient,
    all: Vec<Thread>,
    ids: IdMap,
) -> Result<(), CaptureError> {
    process.threads = all;
    let (Some(tid), Some(like)) = (patient.ended, process.threads.first()) else { return Ok(()) };
    let (ended, status) = thread::ended(patient.host, tid, like, ids)?;
    // In the place of that of the thread the kernel tells the signal that has stopped the process.
    let status = if process.stopped.is_some() { 0 } else { status };
    // As by SECCOMP_RET_KILL_THREAD, which no call of its own does.
    if status & 0xff != 0 {
        let object = "an ended main thread that was killed, with live threads".to_owned();
        return Err(blocked(patient, object, "end the program"));
    }
    process.threads.insert(0, ended);
    process.ended = Some(status);
    Ok(())
}

/// A thread's number in its own pid namespace.
fn own_number(thread: &Thread) -> i32 {
    thread.below.last().copied().unwrap_or(thread.tid)
}

/// The rings of its AIO contexts.
fn rings(patient: &Patient) -> Result<Vec<Ring>, CaptureError> {
    aio::capture(patient.host).map_err(|why| {
        let (object, hint) = why.describe();
        blocked(patient, object, hint)
    })
}

fn blocked(patient: &Patient, object: String, hint: &str) -> CaptureError {
    let command = procfs::read_text(patient.host, "comm").unwrap_or_default();
    CaptureError::Blocked(vec![Blocker {
        pid: patient.inner,
        command: command.trim_end().to_owned(),
        fd: None,
        object,
        hint: hint.to_owned(),
    }])
}

/// Our own clock, to which timers are related.
fn now(host: i32) -> Result<i64, InjectError> {
    event::elapsed(0, 0).map_err(|source| InjectError::Control { tid: host, source })
}

type Pending = (Vec<SignalInfo>, Vec<Vec<SignalInfo>>);

/// The signals that wait for the process, and for each of its threads.
fn pending(leader: i32, threads: &[Stopped]) -> Result<Pending, InjectError> {
    let read = |tid, of_process| -> Result<Vec<SignalInfo>, InjectError> {
        let signals = ptrace::pending_signals(tid, of_process)
            .map_err(|source| InjectError::Control { tid, source })?;
        Ok(signals.into_iter().map(|info| SignalInfo(info.to_vec())).collect())
    };
    let of_threads = threads.iter().map(|thread| read(thread.tid, false)).collect::<Result<_, _>>();
    Ok((read(leader, true)?, of_threads?))
}

/// The number that the newest process of the VE got; only a task of the VE can say.
pub(super) fn last_pid(patient: &Patient, init: &Stopped) -> Result<i32, InjectError> {
    let vdso = patient.vdso.ok_or(InjectError::NoVdso)?;
    let gate = Gate::open(init, vdso, None)?;
    let text = read_in(init, gate, LAST_PID);
    gate.close(init, vdso)?;
    Ok(text?.trim().parse().unwrap_or(0))
}

/// Reads a small file as the process itself sees it; empty when it cannot be opened.
fn read_in(thread: &Stopped, gate: Gate, path: &str) -> Result<String, InjectError> {
    const ROOM: usize = 64;
    let mut batch = gate.batch();
    let path = batch.text(path);
    let flags = (libc::O_RDONLY | libc::O_CLOEXEC) as u64;
    let open = batch.call("open", libc::SYS_open, &[path, flags]);
    let Ok(fd) = batch.run(thread)?.result(open) else { return Ok(String::new()) };
    let mut batch = gate.batch();
    let room = batch.room(ROOM);
    let read = batch.call("read", libc::SYS_read, &[fd, room, ROOM as u64]);
    batch.call("close", libc::SYS_close, &[fd]);
    let done = batch.run(thread)?;
    let len = done.result(read).unwrap_or(0) as usize;
    Ok(String::from_utf8_lossy(done.data(room, len.min(ROOM))).into_owned())
}

type Answers = (Questions, Done, Vec<(thread::Questions, Done)>);

fn ask(host: i32, gate: Gate, threads: &[Stopped]) -> Result<Answers, CaptureError> {
    let mut batch = gate.batch();
    let questions = questions(host, &mut batch)?;
    let done = batch.run(&threads[0])?;
    let mut others = Vec::with_capacity(threads.len() - 1);
    for stopped in &threads[1..] {
        let mut batch = gate.batch();
        let questions = thread::questions(&mut batch);
        others.push((questions, batch.run(stopped)?));
    }
    Ok((questions, done, others))
}

fn questions(host: i32, batch: &mut Batch) -> Result<Questions, ProcError> {
    let actions = (1..=64)
        .map(|signal| {
            let room = batch.room(32);
            batch.call("rt_sigaction", libc::SYS_rt_sigaction, &[signal, 0, room, 8]);
            room
        })
        .collect();
    let intervals = (0..3)
        .map(|which| {
            let room = batch.room(32);
            batch.call("getitimer", libc::SYS_getitimer, &[which, room]);
            room
        })
        .collect();
    let timers = timer_lines(&procfs::read_text(host, "timers")?)
        .into_iter()
        .map(|line| {
            let room = batch.room(32);
            let id = line.id as u64;
            batch.call("timer_gettime", libc::SYS_timer_gettime, &[id, room]);
            let overrun = batch.call("timer_getoverrun", libc::SYS_timer_getoverrun, &[id]);
            (line, room, overrun)
        })
        .collect();
    let subreaper = batch.room(8);
    let prctl = libc::SYS_prctl;
    batch.call("prctl", prctl, &[libc::PR_GET_CHILD_SUBREAPER as u64, subreaper]);
    Ok(Questions {
        actions,
        intervals,
        timers,
        subreaper,
        dumpable: batch.call("prctl", prctl, &[libc::PR_GET_DUMPABLE as u64]),
        controls: controls::ProcessQuestions::ask(batch),
        brk: batch.call("brk", libc::SYS_brk, &[0]),
        membarrier: batch.call("membarrier", libc::SYS_membarrier, &[MEMBARRIER_GET_REGISTRATIONS]),
        leader: thread::questions(batch),
    })
}

fn fill_in(process: &mut Process, questions: &Questions, done: &Done) -> Result<(), InjectError> {
    process.actions = questions
        .actions
        .iter()
        .map(|&at| SignalAction {
            handler: done.number(at),
            flags: done.number(at + 8),
            restorer: done.number(at + 16),
            mask: done.number(at + 24),
        })
        .collect();
    for (timer, &at) in process.interval_timers.iter_mut().zip(&questions.intervals) {
        let micros = |at| done.number(at) * 1_000_000 + done.number(at + 8);
        *timer = IntervalTimer { interval_us: micros(at), value_us: micros(at + 16) };
    }
    for (line, at, overrun) in &questions.timers {
        let nanos = |at| done.number(at) * 1_000_000_000 + done.number(at + 8);
        process.posix_timers.push(PosixTimer {
            id: line.id,
            clock: line.clock,
            notify: line.notify,
            signal: line.signal,
            value: line.value,
            thread: line.thread,
            interval_ns: nanos(*at),
            remaining_ns: nanos(*at + 16),
            overrun: done.value(*overrun)? as i32,
        });
    }
    process.child_subreaper = done.word(questions.subreaper) != 0;
    process.dumpable = done.value(questions.dumpable)? as u32;
    process.controls = questions.controls.answers(done, process.controls.lock_future);
    process.memory.brk = done.value(questions.brk)?;
    process.membarrier = done.result(questions.membarrier).unwrap_or(0) as u32;
    Ok(())
}

/// What is to be had without asking the process.
fn from_outside(host: i32, inner: i32, status: &Status, ids: IdMap) -> Result<Process, ProcError> {
    let stat = Stat::read(host)?;
    let number = |field, name| stat.field::<u64>(field, name);
    let memory = MemoryMap {
        start_code: number(26, "startcode")?,
        end_code: number(27, "endcode")?,
        start_stack: number(28, "startstack")?,
        start_data: number(45, "start_data")?,
        end_data: number(46, "end_data")?,
        start_brk: number(47, "start_brk")?,
        brk: 0,
        arg_start: number(48, "arg_start")?,
        arg_end: number(49, "arg_end")?,
        env_start: number(50, "env_start")?,
        env_end: number(51, "env_end")?,
        auxv: procfs::read(host, "auxv")?,
    };
    let small = |name, radix| -> Result<u32, ProcError> {
        let text = procfs::read_text(host, name)?;
        Ok(u32::from_str_radix(text.trim(), radix).unwrap_or(0))
    };
    let limits = (0..LIMITS)
        .map(|resource| task::limit(host, resource))
        .collect::<Result<_, _>>()
        .map_err(|source| ProcError::Read { path: procfs::path(host, "limits"), source })?;
    Ok(Process {
        pid: inner,
        memory,
        exe_object: gone_program(host)?,
        exe: procfs::link(host, "exe")?,
        cwd: procfs::link(host, "cwd")?,
        root: procfs::link(host, "root")?,
        umask: status.number("Umask", 8)? as u32,
        actions: Vec::new(),
        pending: Vec::new(),
        interval_timers: Default::default(),
        posix_timers: Vec::new(),
        timers_read_at_ns: 0,
        limits,
        descriptors: Vec::new(),
        child_subreaper: false,
        oom_score_adjustment: procfs::read_text(host, "oom_score_adj")?.trim().parse().unwrap_or(0),
        login: login(host, ids),
        coredump_filter: small("coredump_filter", 16)?,
        dumpable: 0,
        controls: ProcessControls::default(),
        membarrier: 0,
        personality: small("personality", 16)?,
        stopped: None,
        semaphore_undo: Vec::new(),
        rings: Vec::new(),
        last_pid: 0,
        local_segments: Vec::new(),
        ended: None,
        threads: Vec::new(),
    })
}

/// Who has logged in, where the kernel keeps a record of it.
fn login(host: i32, ids: IdMap) -> Option<u32> {
    const NONE: u64 = u32::MAX as u64;
    let login = procfs::read_text(host, "loginuid").ok()?.trim().parse().ok()?;
    (login != NONE).then(|| ids.inside(login))
}

/// The program of a process whose path has gone, for instance because there is a new version.
pub(super) fn gone_program(host: i32) -> Result<Option<u64>, ProcError> {
    let link = procfs::link(host, "exe")?;
    if !link.ends_with(" (deleted)") {
        return Ok(None);
    }
    unnamed::program_id(host, link.as_bytes())
        .map(Some)
        .map_err(|source| ProcError::Read { path: procfs::path(host, "exe"), source })
}
