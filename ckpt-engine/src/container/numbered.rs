//! Pid namespaces of a running container, from its own on.

use std::{
    collections::HashMap,
    fs::{self, File},
    io,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::fs::MetadataExt,
    },
};

use ckpt_format::container::Children;

use super::users::{UserSpaces, inode_of};
use crate::{procfs, sys::pids};

/// Tells of a namespace that has ended with all its processes, which nobody can be in any more.
pub(super) const ENDED: u32 = u32::MAX;

/// The pid namespaces that there are.
#[derive(Debug, Default)]
pub(super) struct PidSpaces {
    /// The container's own first.
    all: Vec<OwnedFd>,
    numbers: HashMap<u64, u32>,
}

impl PidSpaces {
    /// Adds the one of a process. The first is the container's own; false for a process that is in
    /// none at or below that.
    pub(super) fn add_process(&mut self, pid: i32) -> io::Result<bool> {
        let path = format!("/proc/{pid}/ns/pid");
        if self.numbers.contains_key(&fs::metadata(&path)?.ino()) {
            return Ok(true);
        }
        let opened = OwnedFd::from(File::open(path)?);
        if !self.all.is_empty() && !self.is_below(opened.as_fd())? {
            return Ok(false);
        }
        let number = u32::try_from(self.all.len()).map_err(io::Error::other)?;
        self.numbers.insert(inode_of(opened.as_fd())?, number);
        self.all.push(opened);
        Ok(true)
    }

    /// Whether it is the container's own or one below.
    fn is_below(&self, namespace: BorrowedFd<'_>) -> io::Result<bool> {
        let mut at = namespace.try_clone_to_owned()?;
        loop {
            if self.numbers.contains_key(&inode_of(at.as_fd())?) {
                return Ok(true);
            }
            at = match pids::around(at.as_fd()) {
                Ok(around) => around,
                // Above all that we see.
                Err(_) => return Ok(false),
            };
        }
    }

    /// The number of the one that a process is in; `None` for one that is not known.
    pub(super) fn of(&self, pid: i32) -> io::Result<Option<u32>> {
        let inode = fs::metadata(format!("/proc/{pid}/ns/pid"))?.ino();
        Ok(self.numbers.get(&inode).copied())
    }

    /// The one that the next children of a process are born into; `None` for one that is not
    /// known. `own` is that of the process.
    pub(super) fn of_children(&self, pid: i32, own: u32) -> io::Result<Option<Children>> {
        let inode = match fs::metadata(format!("/proc/{pid}/ns/pid_for_children")) {
            Ok(metadata) => metadata.ino(),
            // What has no process cannot be looked at.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Ok(Some(Children::New));
            }
            Err(error) => return Err(error),
        };
        Ok(self.numbers.get(&inode).map(|&number| match number {
            number if number == own => Children::Own,
            number => Children::Joined(number),
        }))
    }

    /// Their numbers by inode.
    pub(super) fn numbers(&self) -> &HashMap<u64, u32> {
        &self.numbers
    }

    /// The user namespaces that they belong to, without the container's own.
    pub(super) fn owners(&self, users: &mut UserSpaces) -> io::Result<Vec<u32>> {
        self.all.iter().skip(1).map(|namespace| users.owner(namespace.as_fd())).collect()
    }
}

/// Whether a thread that is not its process's first bears children elsewhere than it was born.
pub(super) fn parts_in_threads(pid: i32, threads: &[i32]) -> bool {
    let link = |tid: &i32, name: &str| procfs::link(pid, &format!("task/{tid}/ns/{name}")).ok();
    let mut others = threads.iter().filter(|&&tid| tid != pid);
    // One that has ended has none for children.
    let elsewhere = |tid: &i32| {
        link(tid, "pid_for_children").is_some_and(|born| link(tid, "pid") != Some(born))
    };
    others.any(elsewhere)
}
