//! A process that is made to do something.

use nix::{
    sys::{
        signal::{Signal, kill},
        wait::{WaitPidFlag, WaitStatus, waitpid},
    },
    unistd::Pid,
};

use super::*;
use crate::{
    areas::AddressSpace,
    bits32,
    sys::testing::{fork_holder, fork_signals},
};

#[test]
fn a_signal_to_stop_waits_until_the_thread_is_let_go() {
    let host = fork_holder(&[]).unwrap();
    let pid = Pid::from_raw(host);
    // It is ready when it has closed what it does not keep.
    while std::fs::read_dir(procfs::path(host, "fd")).unwrap().count() != 0 {
        std::thread::yield_now();
    }
    let vdso = AddressSpace::read(host).unwrap().vdso().unwrap();
    let thread = Stopped::attach(&[host], 0).unwrap().pop().unwrap();
    kill(pid, Signal::SIGSTOP).unwrap();
    assert_eq!(thread.call(vdso, libc::SYS_getpid, &[]).unwrap(), host as u64);
    let gate = Gate::open(&thread, vdso, None).unwrap();
    let mut batch = gate.batch();
    let call = batch.call("getpid", libc::SYS_getpid, &[]);
    assert_eq!(batch.run(&thread).unwrap().value(call).unwrap(), host as u64);
    gate.close(&thread, vdso).unwrap();
    assert_eq!(thread.stop_signal(), Some(libc::SIGSTOP));
    thread.detach().unwrap();
    let stopped = waitpid(pid, Some(WaitPidFlag::WUNTRACED)).unwrap();
    assert_eq!(stopped, WaitStatus::Stopped(pid, Signal::SIGSTOP));
    end(host);
}

#[test]
fn calls_of_both_interfaces_are_made_in_a_program_of_32_bits() {
    const GETPID: i64 = 20;
    // Where there are no such programs nothing is to be done.
    let Ok(program) = bits32::start() else { return };
    let host = program.0.id().cast_signed();
    let vdso = AddressSpace::read(host).unwrap().vdso().unwrap();
    assert!(vdso.is_32_bit);
    let thread = Stopped::attach(&[host], 0).unwrap().pop().unwrap();
    assert!(is_32_bit_code(&thread.registers));
    let gate = Gate::open(&thread, vdso, None).unwrap();
    assert!(gate.base + Gate::SIZE <= 1 << 32);
    let mut batch = gate.batch();
    let call = batch.call("getpid", libc::SYS_getpid, &[]);
    assert_eq!(batch.run(&thread).unwrap().value(call).unwrap(), host as u64);
    let mut batch = gate.batch_32();
    let (first, second) = (batch.call("getpid", GETPID, &[]), batch.call("getpid", GETPID, &[]));
    let done = batch.run(&thread).unwrap();
    assert_eq!(done.value(first).unwrap(), host as u64);
    assert_eq!(done.value(second).unwrap(), host as u64);
    gate.close(&thread, vdso).unwrap();
    // It may not be taken for what it was before.
    let other = Vdso { is_32_bit: false, ..vdso };
    assert!(matches!(Gate::open(&thread, other, None), Err(InjectError::NoVdso)));
    let before = thread.registers;
    thread.detach().unwrap();
    let thread = Stopped::attach(&[host], 0).unwrap().pop().unwrap();
    assert_eq!((thread.registers.cs, thread.registers.rsp), (before.cs, before.rsp));
    thread.detach().unwrap();
}

/// What `/proc/PID/status` says in a line of a set of signals.
fn signals(host: i32, name: &str) -> u64 {
    let status = procfs::read_text(host, "status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(":\t"));
    u64::from_str_radix(line.unwrap(), 16).unwrap()
}

#[test]
fn ignored_blocked_and_pending_signals_are_as_before() {
    let bits = |signals: &[i32]| signals.iter().fold(0, |all, signal| all | 1 << (signal - 1));
    let ignored = [libc::SIGTRAP, libc::SIGPWR];
    let blocked = [libc::SIGTRAP, libc::SIGSTKFLT];
    let host = fork_signals(&ignored, &blocked).unwrap();
    let pid = Pid::from_raw(host);
    while signals(host, "SigBlk") != bits(&blocked) {
        std::thread::yield_now();
    }
    kill(pid, Signal::SIGSTKFLT).unwrap();
    let look = || ["SigIgn", "SigBlk"].map(|name| signals(host, name));
    let is_pending = || (signals(host, "ShdPnd") | signals(host, "SigPnd")) == bits(&blocked[1..]);
    let [ignoring, blocking] = look();
    assert_eq!(ignoring & bits(&ignored), bits(&ignored));
    let vdso = AddressSpace::read(host).unwrap().vdso().unwrap();
    let thread = Stopped::attach(&[host], 0).unwrap().pop().unwrap();
    let gate = Gate::open(&thread, vdso, None).unwrap();
    let mut batch = gate.batch();
    let call = batch.call("getpid", libc::SYS_getpid, &[]);
    assert_eq!(batch.run(&thread).unwrap().value(call).unwrap(), host as u64);
    gate.close(&thread, vdso).unwrap();
    let told = [false, true].map(|shared| ptrace::pending_signals(host, shared).unwrap());
    let told = told.concat().pop().unwrap();
    assert_eq!(told[..4], libc::SIGSTKFLT.to_ne_bytes());
    assert_eq!(told[16..20], std::process::id().to_ne_bytes(), "who has sent it");
    thread.detach().unwrap();
    let [ignoring_after, blocking_after] = look();
    assert_eq!((ignoring_after, blocking_after), (ignoring, blocking));
    assert!(is_pending());
    end(host);
}

#[test]
fn a_failure_is_told_with_what_the_call_was_made_for() {
    let host = fork_holder(&[]).unwrap();
    let vdso = AddressSpace::read(host).unwrap().vdso().unwrap();
    let thread = Stopped::attach(&[host], 0).unwrap().pop().unwrap();
    let gate = Gate::open(&thread, vdso, None).unwrap();
    let run = |bad: usize| {
        let mut batch = gate.batch();
        for (index, step) in ["first", "second", "third"].into_iter().enumerate() {
            batch.step(step);
            batch.call("getpid", libc::SYS_getpid, &[]);
            let fd = if index == bad { u64::MAX } else { batch.room(8) };
            match index == bad {
                true => batch.call("close", libc::SYS_close, &[fd]),
                false => batch.call("rt_sigpending", libc::SYS_rt_sigpending, &[fd, 8]),
            };
        }
        batch.run(&thread).unwrap().all_steps().map_err(|(step, error)| (step, error.to_string()))
    };
    assert_eq!(run(3), Ok(()));
    for (bad, step) in ["first", "second", "third"].into_iter().enumerate() {
        let (told, error) = run(bad).unwrap_err();
        assert_eq!(told, step);
        assert!(error.contains("close("), "{error}");
    }
    thread.detach().unwrap();
    end(host);
}

#[test]
fn many_threads_lose_their_gates_at_once() {
    let hosts = [0; 8].map(|_| fork_holder(&[]).unwrap());
    let vdso = AddressSpace::read(hosts[0]).unwrap().vdso().unwrap();
    let threads = Stopped::attach(&hosts, 0).unwrap();
    let gates = threads.iter().map(|thread| Gate::open(thread, vdso, None).unwrap());
    let gates: Vec<Gate> = gates.collect();
    let has = |host, gate: Gate| {
        let areas = AddressSpace::read(host).unwrap().areas;
        areas.iter().any(|area| area.start <= gate.base && gate.base < area.end)
    };
    assert!(hosts.iter().zip(&gates).all(|(&host, &gate)| has(host, gate)));
    for (thread, gate) in threads.iter().zip(&gates) {
        gate.begin_close(thread, vdso).unwrap();
    }
    for (thread, gate) in threads.iter().zip(&gates) {
        gate.end_close(thread).unwrap();
        assert!(!has(thread.tid, *gate));
    }
    for thread in threads {
        thread.detach().unwrap();
    }
    hosts.into_iter().for_each(end);
}

fn end(host: i32) {
    let pid = Pid::from_raw(host);
    kill(pid, Signal::SIGKILL).unwrap();
    waitpid(pid, None).unwrap();
}
