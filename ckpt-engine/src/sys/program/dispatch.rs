//! Syscall user dispatch: the system calls of a thread go to a handler of its own while a byte
//! says so.

use std::io;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};

static SELECTOR: AtomicU8 = AtomicU8::new(ALLOW);
static CAUGHT: AtomicU64 = AtomicU64::new(0);

const ALLOW: u8 = 0;
const BLOCK: u8 = 1;

/// Lets calls through again, so that it can return itself.
extern "C" fn caught(_signal: libc::c_int) {
    SELECTOR.store(ALLOW, Ordering::SeqCst);
    CAUGHT.fetch_add(1, Ordering::SeqCst);
}

/// Switches the dispatch on for the calling thread, or off. Only one thread may use it.
pub fn set(on: bool) -> io::Result<()> {
    const PR_SET_SYSCALL_USER_DISPATCH: i32 = 59;
    // SAFETY: all bits zero is a valid, empty action.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction = caught as *const () as usize;
    // SAFETY: the handler only touches atomics, and the action lives during the call.
    let result = unsafe { libc::sigaction(libc::SIGSYS, &raw const action, std::ptr::null_mut()) };
    if result != 0 {
        return Err(io::Error::last_os_error());
    }
    let selector = if on { SELECTOR.as_ptr() } else { std::ptr::null_mut() };
    // SAFETY: the selector is a static byte; nothing is exempt from the dispatch.
    let result =
        unsafe { libc::prctl(PR_SET_SYSCALL_USER_DISPATCH, u64::from(on), 0u64, 0u64, selector) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Makes one call while the byte says that it goes to the handler: true when it did.
pub fn catches() -> bool {
    let before = CAUGHT.load(Ordering::SeqCst);
    SELECTOR.store(BLOCK, Ordering::SeqCst);
    // SAFETY: getppid(2) takes no arguments and cannot fail.
    unsafe { libc::syscall(libc::SYS_getppid) };
    SELECTOR.store(ALLOW, Ordering::SeqCst);
    CAUGHT.load(Ordering::SeqCst) == before + 1
}
