//! Pid namespaces, and `/proc` of them.

use std::{
    io::{self, Read, Write},
    os::fd::{AsRawFd, BorrowedFd, OwnedFd},
};

use super::{
    mount::FilesystemContext,
    namespace::{join, on_own_thread},
    task,
    users::{related, visitor},
};

const NS_GET_PARENT: libc::Ioctl = 0xb702;

/// The namespace around a pid namespace, as far as the caller can see it.
pub fn around(pids: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    related(pids, NS_GET_PARENT)
}

/// Begins a file system of type `proc` for a pid namespace, to be completed by the caller. The
/// kernel takes the one of whoever begins it: a process that is there for a moment.
pub fn open_proc(pids: BorrowedFd<'_>) -> io::Result<FilesystemContext> {
    on_own_thread(|| {
        join(pids, libc::CLONE_NEWPID)?;
        let (mut told, mut tell) = io::pipe()?;
        let begin = |_: &io::PipeWriter| {
            let context = FilesystemContext::open_named(c"proc")?;
            let told = tell.write_all(&context.as_raw_fd().to_ne_bytes());
            // Open for as long as the process is there.
            std::mem::forget(context);
            told
        };
        // SAFETY: system calls only; no memory is taken or given back.
        let (visitor, _) = unsafe { visitor(begin) }?;
        let mut number = [0; 4];
        told.read_exact(&mut number)?;
        let process = task::pidfd_open(visitor.pid())?;
        let context = task::pidfd_getfd(&process, i32::from_ne_bytes(number))?;
        Ok(FilesystemContext::from(context))
    })
}
