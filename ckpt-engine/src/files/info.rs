//! What `/proc/PID/fdinfo/FD` tells.

use std::{
    fs::File,
    io::{self, Read},
    os::fd::{AsRawFd, BorrowedFd, OwnedFd},
};

use nix::{
    fcntl::{OFlag, open, openat},
    sys::stat::Mode,
};

use crate::procfs;

/// The directory `/proc/PID/fdinfo`: a file in it is opened faster than by its whole path.
#[derive(Debug)]
pub(super) struct Directory(OwnedFd);

impl Directory {
    /// Of a process.
    pub(super) fn of_process(host_pid: i32) -> io::Result<Self> {
        let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        let path = format!("/proc/{host_pid}/fdinfo");
        Ok(Self(open(path.as_str(), flags, Mode::empty())?))
    }

    fn open(&self, fd: i32) -> io::Result<File> {
        let flags = OFlag::O_RDONLY | OFlag::O_CLOEXEC;
        Ok(openat(&self.0, fd.to_string().as_str(), flags, Mode::empty())?.into())
    }

    /// The lines that every descriptor has, in one read.
    pub(super) fn head(&self, fd: i32) -> io::Result<Info> {
        let mut buffer = [0; 512];
        let length = self.open(fd)?.read(&mut buffer)?;
        Ok(Info(String::from_utf8_lossy(&buffer[..length]).into_owned()))
    }

    /// All lines.
    pub(super) fn whole(&self, fd: i32) -> io::Result<Info> {
        let text = procfs::read_rest(&self.open(fd)?)?;
        Ok(Info(String::from_utf8_lossy(&text).into_owned()))
    }
}

/// The text of one fdinfo file.
#[derive(Clone, Debug)]
pub(super) struct Info(String);

impl Info {
    /// Of one of our own descriptors.
    pub(super) fn of(fd: BorrowedFd<'_>) -> io::Result<Self> {
        // The process, not the thread: the table is the same, and the path is shorter to walk.
        std::fs::read_to_string(format!("/proc/self/fdinfo/{}", fd.as_raw_fd())).map(Self)
    }

    /// The values of all lines that begin with this name.
    pub(super) fn all<'a>(&'a self, name: &'a str) -> impl Iterator<Item = &'a str> {
        self.0.lines().filter_map(move |line| {
            line.strip_prefix(name).and_then(|rest| rest.strip_prefix(':')).map(str::trim)
        })
    }

    /// All lines that begin with these words.
    pub(super) fn lines_from<'a>(&'a self, start: &'a str) -> impl Iterator<Item = &'a str> {
        self.0.lines().filter(move |line| line.starts_with(start))
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
