//! pidfd_open(2).

use std::{
    io,
    os::fd::{AsFd, OwnedFd},
};

use ckpt_format::files::Kind;

use super::{
    Source,
    find::{Object, Refusal},
    rebuild::{RebuildError, Target},
};
use crate::sys::{descriptor, namespace, task};

/// linux/magic.h: where pidfds have inodes of their own.
const PID_FS_MAGIC: i64 = 0x5049_4446;

/// Whether it is a pidfd.
pub(super) fn is_pidfd(object: &Object) -> bool {
    object.link.starts_with(b"anon_inode:[pidfd]") || object.link.starts_with(b"pidfd:[")
}

/// The numbers of a process in the pid namespaces that it is seen from, the outermost first.
fn numbers(object: &Object) -> io::Result<Vec<i32>> {
    let info = object.info()?;
    let numbers = info.text("NSpid")?.split_whitespace();
    numbers.map(|number| number.parse().map_err(io::Error::other)).collect()
}

pub(super) fn capture(source: &Source<'_>, object: &Object) -> Result<Kind, Refusal> {
    let thread = object.flags & libc::O_EXCL != 0;
    let number: i32 = object.info()?.text("Pid")?.parse().map_err(io::Error::other)?;
    if number < 0 {
        let status = descriptor::exit_status(object.fd()).unwrap_or(0);
        return Ok(Kind::GoneProcess { status, thread });
    }
    let own_inode = descriptor::file_system(object.fd())? == PID_FS_MAGIC;
    let inode = if own_inode { object.status.inode } else { 0 };
    if let Some(pid) = source.pid_inside(number) {
        return Ok(Kind::Process { pid, thread, inode });
    }
    // A zombie or a thread. A process of the host has no number inside.
    match numbers(object)?.get(source.depth()?.max(1)) {
        Some(&pid) => Ok(Kind::Process { pid, thread, inode }),
        None => Err(Refusal::new(
            "a pidfd of a process that is outside the VE",
            "end the program, or the command from the host that has passed it",
        )),
    }
}

pub(super) fn rebuild(target: &Target, pid: i32, thread: bool) -> Result<OwnedFd, RebuildError> {
    let host_pid = *target.processes.get(&pid).ok_or(RebuildError::Damaged)?;
    descriptor::open_process(host_pid, thread)
        .map_err(|source| RebuildError::Kernel { object: "pidfd", source })
}

/// A process of the VE that ends at once, is collected, and leaves its pidfd.
pub(super) fn rebuild_gone(
    target: &Target,
    status: i32,
    thread: bool,
) -> Result<OwnedFd, RebuildError> {
    let failed =
        |source| RebuildError::Kernel { object: "pidfd of a process that is gone", source };
    let init = *target.processes.get(&1).ok_or(RebuildError::Damaged)?;
    let init = task::pidfd_open(init).map_err(failed)?;
    namespace::ended_process(init.as_fd(), status, thread).map_err(failed)
}
