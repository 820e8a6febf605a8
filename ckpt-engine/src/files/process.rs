//! pidfd_open(2).

use std::{io, os::fd::OwnedFd};

use ckpt_format::files::Kind;

use super::{
    Source,
    find::{Object, Refusal},
    rebuild::{RebuildError, Target},
};
use crate::sys::descriptor;

/// Whether it is a pidfd.
pub(super) fn is_pidfd(object: &Object) -> bool {
    object.link.starts_with(b"anon_inode:[pidfd]") || object.link.starts_with(b"pidfd:[")
}

pub(super) fn capture(source: &Source<'_>, object: &Object) -> Result<Kind, Refusal> {
    let host_pid: i32 = object.info()?.text("Pid")?.parse().map_err(io::Error::other)?;
    let pid = source.pid_inside(host_pid).ok_or_else(|| {
        Refusal::new(
            "a pidfd of a process that has ended or is outside the VE",
            "try again, or end the program",
        )
    })?;
    Ok(Kind::Process { pid, thread: object.flags & libc::O_EXCL != 0 })
}

pub(super) fn rebuild(target: &Target, pid: i32, thread: bool) -> Result<OwnedFd, RebuildError> {
    let host_pid = *target.processes.get(&pid).ok_or(RebuildError::Damaged)?;
    descriptor::open_process(host_pid, thread)
        .map_err(|source| RebuildError::Kernel { object: "pidfd", source })
}
