//! `/sys`, which shows the network of whoever mounted it.
//!
//! Nothing tells which network that is but what can be seen there: every network has a loopback
//! device of its own, and that has the same inode wherever it is shown.

use std::{
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

use nix::{fcntl::AtFlags, sys::stat::fstatat};

use crate::sys::{mount::FilesystemContext, namespace::in_network_of};

/// The inode of the loopback device in a `/sys`.
pub(super) fn loopback(sysfs: BorrowedFd<'_>) -> Option<u64> {
    let status = fstatat(sysfs, "class/net/lo", AtFlags::AT_SYMLINK_NOFOLLOW).ok()?;
    Some(status.st_ino)
}

/// The same for a network namespace.
pub(super) fn loopback_of(network: &OwnedFd) -> io::Result<u64> {
    let mounted = in_network_of(network.as_fd(), || FilesystemContext::open("sysfs")?.mount(0))?;
    loopback(mounted.as_fd()).ok_or_else(|| io::ErrorKind::NotFound.into())
}
