//! A process that is made to do something.

use nix::{
    sys::{
        signal::{Signal, kill},
        wait::{WaitPidFlag, WaitStatus, waitpid},
    },
    unistd::Pid,
};

use super::*;
use crate::{areas::AddressSpace, sys::testing::fork_holder};

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
