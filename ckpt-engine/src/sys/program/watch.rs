//! inotify(7) and fanotify(7).

use std::ffi::CString;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

/// A set of watches that does not block.
#[derive(Debug)]
pub struct Watches(OwnedFd);

/// What was told: the watch, the events, and the name in a folder.
pub type Told = (i32, u32, String);

impl Watches {
    /// Without any.
    pub fn new() -> io::Result<Self> {
        // SAFETY: integers only.
        let fd = number(unsafe { libc::inotify_init1(libc::IN_CLOEXEC | libc::IN_NONBLOCK) })?;
        // SAFETY: the kernel has just made this descriptor for us alone.
        Ok(Self(unsafe { OwnedFd::from_raw_fd(fd) }))
    }

    /// Watches for these events; returns the number of the watch.
    pub fn add(&self, path: &Path, events: u32) -> io::Result<i32> {
        let path = CString::new(path.as_os_str().as_bytes()).map_err(io::Error::other)?;
        // SAFETY: the path is terminated and lives during the call.
        number(unsafe { libc::inotify_add_watch(self.0.as_raw_fd(), path.as_ptr(), events) })
    }

    /// Ends a watch.
    pub fn remove(&self, watch: i32) -> io::Result<()> {
        // SAFETY: integers only.
        number(unsafe { libc::inotify_rm_watch(self.0.as_raw_fd(), watch) }).map(drop)
    }

    /// Everything that waits to be read.
    pub fn read(&self) -> io::Result<Vec<Told>> {
        let mut bytes = [0; 16 << 10];
        let count = match nix::unistd::read(&self.0, &mut bytes) {
            Err(nix::Error::EAGAIN) => 0,
            count => count?,
        };
        let mut rest = &bytes[..count];
        let mut told = Vec::new();
        // struct inotify_event: watch, events, cookie, length of the name that follows.
        while let Some(head) = rest.first_chunk::<16>() {
            let word = |at: usize| u32::from_ne_bytes([0, 1, 2, 3].map(|byte| head[at + byte]));
            let length = word(12) as usize;
            let name = rest.get(16..16 + length).ok_or(io::ErrorKind::InvalidData)?;
            let name = name.split(|&byte| byte == 0).next().unwrap_or_default();
            let name = String::from_utf8_lossy(name).into_owned();
            told.push((word(0).cast_signed(), word(4), name));
            rest = &rest[16 + length..];
        }
        Ok(told)
    }
}

/// A fanotify group of the kind that everybody may have, which tells names. It does not block.
#[derive(Debug)]
pub struct Group(OwnedFd);

impl Group {
    /// Without marks.
    pub fn new() -> io::Result<Self> {
        let flags = libc::FAN_CLASS_NOTIF
            | libc::FAN_REPORT_DFID_NAME
            | libc::FAN_CLOEXEC
            | libc::FAN_NONBLOCK;
        // SAFETY: integers only.
        let fd = number(unsafe { libc::fanotify_init(flags, 0) })?;
        // SAFETY: the kernel has just made this descriptor for us alone.
        Ok(Self(unsafe { OwnedFd::from_raw_fd(fd) }))
    }

    /// Changes the marks on a path: `how` is `FAN_MARK_*`.
    pub fn mark(&self, how: u32, events: u64, path: &Path) -> io::Result<()> {
        let path = CString::new(path.as_os_str().as_bytes()).map_err(io::Error::other)?;
        let group = self.0.as_raw_fd();
        // SAFETY: the path is terminated and lives during the call.
        let result =
            unsafe { libc::fanotify_mark(group, how, events, libc::AT_FDCWD, path.as_ptr()) };
        number(result).map(drop)
    }

    /// Everything that waits to be read: the events, and the name if there is one.
    pub fn read(&self) -> io::Result<Vec<(u64, String)>> {
        let mut bytes = [0; 16 << 10];
        let count = match nix::unistd::read(&self.0, &mut bytes) {
            Err(nix::Error::EAGAIN) => 0,
            count => count?,
        };
        let mut rest = &bytes[..count];
        let mut told = Vec::new();
        // struct fanotify_event_metadata: length, three more numbers, events, descriptor, process.
        while let Some(head) = rest.first_chunk::<24>() {
            let length = u32::from_ne_bytes([0, 1, 2, 3].map(|at| head[at])) as usize;
            let events = u64::from_ne_bytes([0, 1, 2, 3, 4, 5, 6, 7].map(|at| head[8 + at]));
            let event = rest.get(24..length).ok_or(io::ErrorKind::InvalidData)?;
            told.push((events, name(event).unwrap_or_default()));
            rest = &rest[length..];
        }
        Ok(told)
    }
}

/// The name in what follows an event: a header of four bytes, the number of a file system, a handle
/// with its length, and then the name.
fn name(event: &[u8]) -> Option<String> {
    let length = u32::from_ne_bytes(*event.get(12..)?.first_chunk()?) as usize;
    let name = event.get(20 + length..)?.split(|&byte| byte == 0).next()?;
    Some(String::from_utf8_lossy(name).into_owned())
}

fn number(result: libc::c_int) -> io::Result<i32> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}
