//! fork(2), for a process with one thread, and the end of a single thread.

use std::io;

/// Runs `body` in a child process and returns the child's pid. The child ends with the number
/// that `body` returns, without running destructors of what it inherited.
///
/// Refused in a process with more than one thread: the child could meet a lock that a thread it
/// does not have will never release.
pub fn fork(body: impl FnOnce() -> i32) -> io::Result<libc::pid_t> {
    if std::fs::read_dir("/proc/self/task")?.count() != 1 {
        return Err(io::Error::from(io::ErrorKind::ResourceBusy));
    }
    // SAFETY: this process has exactly one thread, as checked above, so no lock is held by a
    // thread that is missing in the child.
    let pid = unsafe { libc::fork() };
    match pid {
        -1 => Err(io::Error::last_os_error()),
        0 => {
            let code = body();
            // SAFETY: `_exit` never returns and touches no memory.
            unsafe { libc::_exit(code) }
        }
        child => Ok(child),
    }
}

/// As [`fork`], for a child that has these tables in common with its parent: `CLONE_FILES`,
/// `CLONE_FS`. What the child does with descriptors it does for both.
pub fn fork_sharing(tables: i32, body: impl FnOnce() -> i32) -> io::Result<libc::pid_t> {
    const ALLOWED: i32 = libc::CLONE_FILES | libc::CLONE_FS;
    if tables & !ALLOWED != 0 {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    if std::fs::read_dir("/proc/self/task")?.count() != 1 {
        return Err(io::Error::from(io::ErrorKind::ResourceBusy));
    }
    let flags = libc::c_long::from(tables | libc::SIGCHLD);
    // SAFETY: without a stack and without CLONE_VM the call is fork(2): the child has its own copy
    // of all memory. This process has exactly one thread, as checked above.
    let pid = unsafe { libc::syscall(libc::SYS_clone, flags, 0, 0, 0, 0) };
    match pid {
        -1 => Err(io::Error::last_os_error()),
        0 => {
            let code = body();
            // SAFETY: `_exit` never returns and touches no memory.
            unsafe { libc::_exit(code) }
        }
        child => i32::try_from(child).map_err(io::Error::other),
    }
}

/// Ends the calling thread alone (exit(2)), without running destructors of what is on its stack.
/// The first thread of a process then stays as a dead one until the others have ended.
pub fn end_thread(code: i32) -> ! {
    loop {
        // SAFETY: the call takes an integer and does not return. The stack stays mapped, so what
        // others borrow from it stays valid.
        unsafe { libc::syscall(libc::SYS_exit, code) };
    }
}
