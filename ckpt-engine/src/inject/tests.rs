//! A process that is made to do something.

use nix::{
    sys::{
        signal::{Signal, kill},
        wait::{WaitPidFlag, WaitStatus, waitpid},
    },
    unistd::Pid,
};

use super::*;
use crate::{areas::AddressSpace, bits32, sys::testing::fork_holder};

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
    kill(pid, Signal::SIGKILL).unwrap();
    waitpid(pid, None).unwrap();
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
