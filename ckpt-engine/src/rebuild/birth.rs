//! Births: clone3(2) in processes of the skeleton, into the pid namespaces where they belong.
//!
//! A pid namespace begins with its first process, and ends with it. Whoever bears one of the
//! others from outside goes there for that moment, as far as its children are concerned.

use std::{fs::File, io, os::fd::OwnedFd};

use ckpt_format::process::Shape;

use super::{Bone, Inconsistency, RebuildError, Skeleton};
use crate::inject::{InjectError, Stopped};

/// The most pid namespaces in one another that the kernel has (`MAX_PID_NS_LEVEL`).
const LEVELS_MAX: usize = 32;

/// Where a process is born, and with which numbers.
#[derive(Clone, Copy, Debug)]
pub(super) struct Place<'a> {
    /// The number in the VE's own pid namespace; 0 is any, also in those below.
    pub(super) pid: i32,
    /// The number of its pid namespace.
    pub(super) space: u32,
    /// The numbers in those below the VE's own, the outermost first.
    pub(super) below: &'a [i32],
}

impl<'a> Place<'a> {
    pub(super) fn of(shape: &'a Shape) -> Self {
        Self { pid: shape.pid, space: shape.namespaces.pid, below: &shape.below.process }
    }

    /// Any number in a pid namespace.
    pub(super) fn any(space: u32) -> Self {
        Self { pid: 0, space, below: &[] }
    }

    /// Whether it begins its pid namespace.
    fn is_first(&self) -> bool {
        self.below.last() == Some(&1)
    }

    /// As clone3(2) wants them, the innermost first.
    fn numbers(&self) -> Vec<u8> {
        if self.pid == 0 {
            return Vec::new();
        }
        let all = self.below.iter().rev().chain([&self.pid]);
        all.flat_map(|number| number.to_le_bytes()).collect()
    }
}

/// The number that a namespace in which `depth` others are around it, from the VE's own on, sees
/// for what has these numbers; 0 for none.
pub(super) fn seen(pid: i32, below: &[i32], depth: usize) -> i32 {
    match depth.checked_sub(1) {
        None => pid,
        Some(place) => below.get(place).copied().unwrap_or(0),
    }
}

impl Skeleton {
    /// Makes a process by one that is in the pid namespace `from`, which is that of the new one or
    /// around it.
    pub(super) fn bear_by(
        &self,
        by: &Stopped,
        from: u32,
        place: Place<'_>,
        flags: u64,
        exit_signal: i32,
    ) -> Result<Stopped, RebuildError> {
        if place.is_first() {
            let flags = flags | libc::CLONE_NEWPID as u64;
            return self.clone_in(by, place, flags, exit_signal);
        }
        if place.space == from {
            return self.clone_in(by, place, flags, exit_signal);
        }
        self.join_pids(by, place.pid, place.space)?;
        let born = self.clone_in(by, place, flags, exit_signal)?;
        self.join_pids(by, place.pid, from)?;
        Ok(born)
    }

    /// The children of a thread are born into a pid namespace from now on.
    pub(super) fn join_pids(
        &self,
        thread: &Stopped,
        pid: i32,
        space: u32,
    ) -> Result<(), RebuildError> {
        let namespace = self.pid_space(pid, space)?;
        self.pass_namespace(thread, pid, &namespace)?;
        let mut batch = self.gate.batch();
        batch.call("setns", libc::SYS_setns, &[0, libc::CLONE_NEWPID as u64]);
        batch.call("close", libc::SYS_close, &[0]);
        let failed = |source| RebuildError::Process { pid, what: "enter a pid namespace", source };
        batch.run(thread)?.all().map_err(failed)
    }

    /// A pid namespace; its first process must be there. `pid` is whom it is for.
    pub(super) fn pid_space(&self, pid: i32, space: u32) -> Result<OwnedFd, RebuildError> {
        let first = match space {
            0 => self.bone(1)?,
            _ => self.first_of(space).ok_or(Inconsistency::UnknownNamespace(pid))?,
        };
        let what = "open a pid namespace";
        let failed = |source: io::Error| RebuildError::Outside { pid, what, source };
        Ok(File::open(format!("/proc/{}/ns/pid", first.thread.tid)).map_err(failed)?.into())
    }

    /// The process with which a pid namespace begins.
    pub(super) fn first_of(&self, space: u32) -> Option<&Bone> {
        let mut all = self.processes.values();
        all.find(|bone| bone.space == space && bone.below.last() == Some(&1))
    }

    /// Whom the kernel gives the children of processes in a pid namespace that end.
    pub(super) fn reaper_of(&self, space: u32) -> i32 {
        self.first_of(space).map_or(1, |first| first.pid)
    }

    /// clone3(2) in a stopped process; the child stops at once.
    pub(super) fn clone_in(
        &self,
        parent: &Stopped,
        place: Place<'_>,
        flags: u64,
        exit_signal: i32,
    ) -> Result<Stopped, RebuildError> {
        const ARGUMENTS: usize = 80;
        let pid = place.pid;
        let failed = |source| RebuildError::Process { pid, what: "make it", source };
        if place.below.len() >= LEVELS_MAX {
            return Err(Inconsistency::UnknownNamespace(pid).into());
        }
        let mut batch = self.gate.batch();
        let numbers = place.numbers();
        let count = numbers.len() / size_of::<i32>();
        let numbers = batch.bytes(&numbers);
        let mut arguments = [0u8; ARGUMENTS];
        let mut put = |index: usize, value: u64| {
            arguments[index * 8..][..8].copy_from_slice(&value.to_le_bytes());
        };
        put(0, flags);
        put(4, exit_signal as u64);
        if count != 0 {
            put(8, numbers);
            put(9, count as u64);
        }
        let arguments = batch.bytes(&arguments);
        let call = batch.call("clone3", libc::SYS_clone3, &[arguments, ARGUMENTS as u64]);
        let done = batch.run(parent).map_err(failed)?;
        done.value(call).map_err(failed)?;
        let born = done.births.first().copied();
        let born = born.ok_or(InjectError::Ended { tid: parent.tid }).map_err(failed)?;
        Stopped::at_birth(born).map_err(failed)
    }
}
