//! inotify(7).

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

fn number(result: libc::c_int) -> io::Result<i32> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}
