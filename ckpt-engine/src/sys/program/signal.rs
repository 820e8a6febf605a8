//! Signals: counted by handlers, queued with values, waited for, and an alternate stack.

use std::io;
use std::mem::zeroed;
use std::ptr;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use super::map::Map;

const SIGNALS: usize = 65;

static COUNTS: [AtomicU64; SIGNALS] = [const { AtomicU64::new(0) }; SIGNALS];
static STACKS: [AtomicUsize; SIGNALS] = [const { AtomicUsize::new(0) }; SIGNALS];

/// Only touches atomics, so it may interrupt anything.
extern "C" fn handler(signal: libc::c_int) {
    let local = 0u8;
    if let Ok(index) = usize::try_from(signal)
        && let (Some(count), Some(stack)) = (COUNTS.get(index), STACKS.get(index))
    {
        count.fetch_add(1, Ordering::SeqCst);
        stack.store(&raw const local as usize, Ordering::SeqCst);
    }
}

/// Counts a signal from now on instead of what it did before. `flags` are those of sigaction(2).
pub fn count(signal: i32, flags: i32) -> io::Result<()> {
    // SAFETY: all bits zero is a valid, empty action.
    let mut action: libc::sigaction = unsafe { zeroed() };
    action.sa_sigaction = handler as *const () as usize;
    action.sa_flags = flags;
    // SAFETY: the handler only touches atomics, and the action lives during the call.
    check(unsafe { libc::sigaction(signal, &raw const action, ptr::null_mut()) })
}

/// Ignores a signal from now on.
pub fn ignore(signal: i32) -> io::Result<()> {
    // SAFETY: nothing of the program's own runs for an ignored signal.
    match unsafe { libc::signal(signal, libc::SIG_IGN) } {
        libc::SIG_ERR => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}

/// How often a counted signal has come.
pub fn counted(signal: i32) -> u64 {
    index(signal).map_or(0, |index| COUNTS[index].load(Ordering::SeqCst))
}

/// An address on the stack that the last handler of this signal ran on.
pub fn last_stack(signal: i32) -> usize {
    index(signal).map_or(0, |index| STACKS[index].load(Ordering::SeqCst))
}

fn index(signal: i32) -> Option<usize> {
    usize::try_from(signal).ok().filter(|index| *index < SIGNALS)
}

/// Lets handlers with `SA_ONSTACK` of this thread run in the map, which is never freed.
pub fn use_alternate_stack(map: &'static Map) -> io::Result<()> {
    let stack = libc::stack_t {
        ss_sp: map.address() as *mut libc::c_void,
        ss_flags: 0,
        ss_size: map.words() * size_of::<u64>(),
    };
    // SAFETY: the map lives for ever and nobody reads its words as anything else.
    check(unsafe { libc::sigaltstack(&raw const stack, ptr::null_mut()) })
}

/// Lets handlers with `SA_ONSTACK` of this thread run where it runs itself.
pub fn use_no_alternate_stack() -> io::Result<()> {
    let stack = libc::stack_t { ss_sp: ptr::null_mut(), ss_flags: libc::SS_DISABLE, ss_size: 0 };
    // SAFETY: no memory is given.
    check(unsafe { libc::sigaltstack(&raw const stack, ptr::null_mut()) })
}

/// Sends a signal with a value.
pub fn queue(pid: i32, signal: i32, value: usize) -> io::Result<()> {
    let value = libc::sigval { sival_ptr: ptr::without_provenance_mut(value) };
    // SAFETY: the value is only passed on, never followed.
    check(unsafe { libc::sigqueue(pid, signal, value) })
}

/// A signal that was waited for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Taken {
    /// Its number.
    pub signal: i32,
    /// The sender.
    pub pid: i32,
    /// The value that it was sent with.
    pub value: usize,
}

/// Takes one pending signal of these, which must be blocked. An error tells how the wait ended:
/// `EAGAIN` when none came in time, or `EINTR`.
pub fn take(signals: &[i32], timeout: Duration) -> io::Result<Taken> {
    // SAFETY: all bits zero is a valid, empty set.
    let mut set: libc::sigset_t = unsafe { zeroed() };
    for signal in signals {
        // SAFETY: the set is valid.
        check(unsafe { libc::sigaddset(&raw mut set, *signal) })?;
    }
    let timeout = libc::timespec {
        tv_sec: libc::time_t::try_from(timeout.as_secs()).unwrap_or(libc::time_t::MAX),
        tv_nsec: timeout.subsec_nanos().into(),
    };
    // SAFETY: all bits zero is valid for this plain structure.
    let mut info: libc::siginfo_t = unsafe { zeroed() };
    // SAFETY: the three structures live during the call.
    let signal = unsafe { libc::sigtimedwait(&raw const set, &raw mut info, &raw const timeout) };
    if signal < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the union was zeroed or filled by the kernel; every bit pattern is a valid pid.
    let pid = unsafe { info.si_pid() };
    // SAFETY: as above, and the pointer in it is not followed.
    let value = unsafe { info.si_value() };
    Ok(Taken { signal, pid, value: value.sival_ptr.addr() })
}

/// Blocks a signal of any number, real-time ones included, for this thread.
pub fn block(signal: i32) -> io::Result<()> {
    // SAFETY: all bits zero is a valid, empty set.
    let mut set: libc::sigset_t = unsafe { zeroed() };
    // SAFETY: the set is valid.
    check(unsafe { libc::sigaddset(&raw mut set, signal) })?;
    // SAFETY: the set lives during the call.
    let result = unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, &raw const set, ptr::null_mut()) };
    if result == 0 { Ok(()) } else { Err(io::Error::from_raw_os_error(result)) }
}

/// Makes SIGALRM come at this interval, or no more for an interval of zero.
pub fn set_interval_timer(interval: Duration) -> io::Result<()> {
    let value = libc::timeval {
        tv_sec: libc::time_t::try_from(interval.as_secs()).unwrap_or(libc::time_t::MAX),
        tv_usec: interval.subsec_micros().into(),
    };
    let timer = libc::itimerval { it_interval: value, it_value: value };
    // SAFETY: the structure lives during the call.
    check(unsafe { libc::setitimer(libc::ITIMER_REAL, &raw const timer, ptr::null_mut()) })
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
