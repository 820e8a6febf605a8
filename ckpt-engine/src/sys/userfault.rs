//! userfaultfd(2), asynchronous write protection (Documentation/admin-guide/mm/userfaultfd.rst).

use std::{
    io,
    os::fd::{AsRawFd, FromRawFd, OwnedFd},
};

use super::check;

/// Only faults from user mode are reported: needs no privilege, and asynchronous write
/// protection tracks writes by the kernel all the same.
pub const USER_MODE_ONLY: i32 = 1;

const UFFD_API: u64 = 0xaa;
const FEATURE_PAGEFAULT_FLAG_WP: u64 = 1;
const FEATURE_WP_HUGETLBFS_SHMEM: u64 = 1 << 12;
const FEATURE_WP_UNPOPULATED: u64 = 1 << 13;
const FEATURE_WP_ASYNC: u64 = 1 << 15;
const REGISTER_MODE_WP: u64 = 2;
const UFFDIO_API: libc::c_ulong = 0xc018_aa3f;
const UFFDIO_REGISTER: libc::c_ulong = 0xc020_aa00;
const UFFDIO_WRITEPROTECT: libc::c_ulong = 0xc018_aa06;

#[repr(C)]
struct Api {
    api: u64,
    features: u64,
    ioctls: u64,
}

#[repr(C)]
struct Register {
    start: u64,
    len: u64,
    mode: u64,
    ioctls: u64,
}

#[repr(C)]
struct WriteProtect {
    start: u64,
    len: u64,
    mode: u64,
}

/// Says what is expected of a userfaultfd that has not been used yet.
pub(super) fn enable(fd: &OwnedFd, features: u64) -> io::Result<()> {
    let mut api = Api { api: UFFD_API, features, ioctls: 0 };
    // SAFETY: the argument is a live `struct uffdio_api`.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), UFFDIO_API, &raw mut api) }.into()).map(drop)
}

/// Registers `start..end` in this mode.
pub(super) fn register(fd: &OwnedFd, start: u64, end: u64, mode: u64) -> io::Result<()> {
    let mut register = Register { start, len: end - start, mode, ioctls: 0 };
    // SAFETY: the argument is a live `struct uffdio_register`.
    let result = unsafe { libc::ioctl(fd.as_raw_fd(), UFFDIO_REGISTER, &raw mut register) };
    check(result.into()).map(drop)
}

/// A userfaultfd of another process, set up for asynchronous write protection.
///
/// Dropping it ends the tracking and leaves nothing behind in the process.
#[derive(Debug)]
pub struct Tracking(OwnedFd);

impl Tracking {
    /// For the calling process itself.
    pub fn own() -> io::Result<Self> {
        // SAFETY: no pointers.
        let fd = check(unsafe {
            libc::syscall(libc::SYS_userfaultfd, USER_MODE_ONLY | libc::O_CLOEXEC)
        })?;
        // SAFETY: the kernel has just made this descriptor for us alone.
        Self::new(unsafe { OwnedFd::from_raw_fd(fd as i32) })
    }

    /// Takes a descriptor made by userfaultfd(2) in the process to track.
    pub fn new(fd: OwnedFd) -> io::Result<Self> {
        let features = FEATURE_PAGEFAULT_FLAG_WP
            | FEATURE_WP_HUGETLBFS_SHMEM
            | FEATURE_WP_UNPOPULATED
            | FEATURE_WP_ASYNC;
        enable(&fd, features)?;
        Ok(Self(fd))
    }

    /// Tracks writes to `start..end`, which must be one area of the process.
    pub fn register(&self, start: u64, end: u64) -> io::Result<()> {
        register(&self.0, start, end, REGISTER_MODE_WP)
    }

    /// Takes the protection marks off `start..end`, which must be registered.
    pub fn clear(&self, start: u64, end: u64) -> io::Result<()> {
        let mut protect = WriteProtect { start, len: end - start, mode: 0 };
        // SAFETY: the argument is a live `struct uffdio_writeprotect`.
        let result =
            unsafe { libc::ioctl(self.0.as_raw_fd(), UFFDIO_WRITEPROTECT, &raw mut protect) };
        check(result.into()).map(drop)
    }
}
