//! What we are told of our children.

use std::io;

use super::check;

/// No signal comes any more when a child, or whoever is traced, stops: whoever waits for that is
/// woken all the same. Each of these signals would run the handler of SIGCHLD, if there is one,
/// and wake a thread that looks for children that have ended. To be called when the handler is
/// there: whoever sets another one undoes it.
pub fn stop_without_signal() -> io::Result<()> {
    // SAFETY: `sigaction` is a plain structure, for which zero is valid.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    // SAFETY: no action is set, and the result is a live local variable.
    let result = unsafe { libc::sigaction(libc::SIGCHLD, std::ptr::null(), &raw mut action) };
    check(result.into())?;
    action.sa_flags |= libc::SA_NOCLDSTOP;
    // SAFETY: the handler is the one that is set already.
    let result = unsafe { libc::sigaction(libc::SIGCHLD, &raw const action, std::ptr::null_mut()) };
    check(result.into()).map(drop)
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicI32, Ordering};

    use nix::{
        sys::{
            signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, kill, sigaction},
            wait::{WaitPidFlag, WaitStatus, waitpid},
        },
        unistd::Pid,
    };

    use super::*;
    use crate::sys::testing::fork_holder;

    /// The last process whose stop was told.
    static STOPPED: AtomicI32 = AtomicI32::new(0);

    extern "C" fn note(_: i32, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
        // SAFETY: the kernel passes a live structure.
        let info = unsafe { &*info };
        if info.si_code == libc::CLD_STOPPED {
            // SAFETY: it is that of a SIGCHLD, which has the number of a process.
            STOPPED.store(unsafe { info.si_pid() }, Ordering::SeqCst);
        }
    }

    #[test]
    fn a_stop_is_waited_for_without_a_signal() {
        let flags = SaFlags::SA_RESTART | SaFlags::SA_SIGINFO;
        let noting = SigAction::new(SigHandler::SigAction(note), flags, SigSet::empty());
        // SAFETY: the handler stores a number and nothing else.
        let before = unsafe { sigaction(Signal::SIGCHLD, &noting) }.unwrap();
        stop_without_signal().unwrap();
        let child = Pid::from_raw(fork_holder(&[]).unwrap());
        kill(child, Signal::SIGSTOP).unwrap();
        let stopped = waitpid(child, Some(WaitPidFlag::WUNTRACED)).unwrap();
        kill(child, Signal::SIGKILL).unwrap();
        waitpid(child, None).unwrap();
        // SAFETY: that is the action from before.
        let set = unsafe { sigaction(Signal::SIGCHLD, &before) }.unwrap();
        assert_eq!(stopped, WaitStatus::Stopped(child, Signal::SIGSTOP));
        assert_ne!(STOPPED.load(Ordering::SeqCst), child.as_raw());
        assert!(matches!(set.handler(), SigHandler::SigAction(_)));
    }
}
