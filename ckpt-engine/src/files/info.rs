//! What `/proc/PID/fdinfo/FD` tells.

use std::{fs, io, os::fd::AsRawFd, os::fd::BorrowedFd};

/// The text of one fdinfo file.
#[derive(Debug)]
pub(super) struct Info(String);

impl Info {
    /// Of a descriptor of another process.
    pub(super) fn of_process(host_pid: i32, fd: i32) -> io::Result<Self> {
        fs::read_to_string(format!("/proc/{host_pid}/fdinfo/{fd}")).map(Self)
    }

    /// Of one of our own descriptors.
    pub(super) fn of(fd: BorrowedFd<'_>) -> io::Result<Self> {
        // The process, not the thread: the table is the same, and the path is shorter to walk.
        fs::read_to_string(format!("/proc/self/fdinfo/{}", fd.as_raw_fd())).map(Self)
    }

    /// The values of all lines that begin with this name.
    pub(super) fn all<'a>(&'a self, name: &'a str) -> impl Iterator<Item = &'a str> {
        self.0.lines().filter_map(move |line| {
            line.strip_prefix(name).and_then(|rest| rest.strip_prefix(':')).map(str::trim)
        })
    }

    /// The value of the first line with this name.
    pub(super) fn text(&self, name: &str) -> io::Result<&str> {
        let missing = || io::Error::new(io::ErrorKind::InvalidData, "no such line in fdinfo");
        // Not `all`, which would tie the lifetime of the name to the result.
        self.0
            .lines()
            .find_map(|line| line.strip_prefix(name)?.strip_prefix(':').map(str::trim))
            .ok_or_else(missing)
    }

    /// The number in the first line with this name.
    pub(super) fn number(&self, name: &str, radix: u32) -> io::Result<u64> {
        parse(self.text(name)?, radix)
    }
}

/// Reads a number as fdinfo writes it.
pub(super) fn parse(text: &str, radix: u32) -> io::Result<u64> {
    u64::from_str_radix(text.trim(), radix)
        .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))
}
