//! Births: clone3(2) in processes of the skeleton, into the pid namespaces where they belong.
//!
//! A pid namespace begins with its first process, and ends with it. Whoever bears one of the
//! others from outside goes there for that moment, as far as its children are concerned.
//!
//! Numbers are chosen (clone3(2) `set_tid`) where whoever bears a process may do so. What is in a
//! user namespace already may not in the pid namespaces around that.

use std::{fs::File, io, os::fd::OwnedFd};

use ckpt_format::{container::Namespaces, process::Shape};

use super::{
    Bone, Inconsistency, RebuildError, Skeleton, credentials,
    tree::{CLONE_PARENT, end},
};
use crate::{
    inject::{InjectError, Stopped},
    procfs::Status,
};

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
    /// What is born, unless it is there only for a moment.
    pub(super) shape: Option<&'a Shape>,
}

impl<'a> Place<'a> {
    pub(super) fn of(shape: &'a Shape) -> Self {
        let (space, below) = (shape.namespaces.pid, &shape.below.process);
        Self { pid: shape.pid, space, below, shape: Some(shape) }
    }

    /// Any number in a pid namespace.
    pub(super) fn any(space: u32) -> Self {
        Self { pid: 0, space, below: &[], shape: None }
    }

    /// What is to be born, where it begins its pid namespace.
    fn founder(&self) -> Option<&'a Shape> {
        self.shape.filter(|_| self.below.last() == Some(&1))
    }

    /// All its numbers, the outermost first.
    fn numbers(&self) -> Vec<i32> {
        match self.pid {
            0 => Vec::new(),
            pid => std::iter::once(pid).chain(self.below.iter().copied()).collect(),
        }
    }
}

/// Who bears a process.
#[derive(Clone, Copy, Debug)]
pub(super) struct By<'a> {
    pub(super) thread: &'a Stopped,
    /// The number of its pid namespace.
    pub(super) space: u32,
    /// That of its user namespace.
    pub(super) users: u32,
    pub(super) namespaces: Option<Namespaces>,
}

impl<'a> By<'a> {
    pub(super) fn of(bone: &'a Bone) -> Self {
        let Bone { space, users, namespaces, .. } = *bone;
        let namespaces = namespaces.map(Namespaces::of_child);
        Self { thread: &bone.thread, space, users, namespaces }
    }
}

/// What was born.
#[derive(Debug)]
pub(super) struct Born {
    pub(super) thread: Stopped,
    /// The number of the user namespace that it is in.
    pub(super) users: u32,
    pub(super) namespaces: Option<Namespaces>,
}

impl Born {
    /// As one that bears others, in its pid namespace.
    pub(super) fn by(&self, space: u32) -> By<'_> {
        let Self { thread, users, namespaces } = self;
        By { thread, space, users: *users, namespaces: *namespaces }
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
    /// Makes a process by one that is in the pid namespace of the new one or around it.
    pub(super) fn bear_by(
        &self,
        by: By<'_>,
        place: Place<'_>,
        flags: u64,
        exit_signal: i32,
    ) -> Result<Born, RebuildError> {
        let By { users, namespaces, space: from, thread } = by;
        let pid = place.pid;
        if let Some(shape) = place.founder() {
            // Of one that has ended nothing else is left.
            let owner = match shape.zombie {
                Some(_) => users,
                None => self.nested.pid_owner(place.space),
            };
            if owner != users {
                return self.bear_apart(by, shape, owner, flags, exit_signal);
            }
            let mut chain = self.chain(pid, from)?;
            chain.push(place.space);
            let flags = flags | libc::CLONE_NEWPID as u64;
            let thread = self.clone_numbered(by, &chain, place, flags, exit_signal)?;
            return Ok(Born { thread, users, namespaces });
        }
        let ended = place.space != 0 && self.first_of(place.space).is_none();
        if ended && place.shape.is_some_and(|shape| shape.zombie.is_some()) {
            // Nobody sees its numbers in a pid namespace that has ended.
            let chain = self.chain(pid, from)?;
            let below = place.below.get(..chain.len() - 1).unwrap_or_default();
            let place = Place { space: from, below, ..place };
            let thread = self.clone_numbered(by, &chain, place, flags, exit_signal)?;
            return Ok(Born { thread, users, namespaces });
        }
        let chain = self.chain(pid, place.space)?;
        if place.space != from {
            self.join_pids(thread, pid, place.space)?;
        }
        let born = self.clone_numbered(by, &chain, place, flags, exit_signal)?;
        if place.space != from {
            self.join_pids(thread, pid, from)?;
        }
        Ok(Born { thread: born, users, namespaces })
    }

    /// Makes the first process of a pid namespace that belongs to a user namespace: only one that
    /// is there already can make it, so it is somebody there from its birth.
    fn bear_apart(
        &self,
        by: By<'_>,
        shape: &Shape,
        owner: u32,
        flags: u64,
        exit_signal: i32,
    ) -> Result<Born, RebuildError> {
        let (pid, place) = (shape.pid, Place::of(shape));
        // It goes where none can come back from, and leaves the new one to its own parent.
        let before = self.bear_by(by, Place::any(by.space), flags, exit_signal)?;
        let thread = &before.thread;
        self.go_to_namespaces(thread, pid, by.namespaces, shape.namespaces)?;
        // Its user may not be allowed to enter what it is in. Another one is entered when it is
        // there: this may be gone already, or not have come yet.
        let mut batch = self.gate.batch();
        let directory = batch.text(&shape.below.directory);
        batch.call("chdir", libc::SYS_chdir, &[directory]);
        batch.run(thread)?;
        let users = self.nested.users_of(owner).ok_or(Inconsistency::UnknownNamespace(pid))?;
        self.pass_descriptor(thread, pid, users)?;
        let mut batch = self.gate.batch();
        if by.users == 0 {
            credentials::become_user(&mut batch, &shape.below.identity);
        }
        batch.call("setns", libc::SYS_setns, &[0, libc::CLONE_NEWUSER as u64]);
        batch.call("close", libc::SYS_close, &[0]);
        let failed = |source| RebuildError::Process { pid, what: "make its pid namespace", source };
        batch.run(thread)?.all().map_err(failed)?;
        let namespaces = Some(shape.namespaces);
        let inside = By { thread, space: by.space, users: owner, namespaces };
        let mut chain = self.chain(pid, by.space)?;
        chain.push(place.space);
        let flags = flags | CLONE_PARENT | libc::CLONE_NEWPID as u64;
        let born = self.clone_numbered(inside, &chain, place, flags, 0)?;
        end(thread)?;
        Ok(Born { thread: born, users: owner, namespaces })
    }

    /// The pid namespaces around one, from the VE's own on, and itself.
    pub(super) fn chain(&self, pid: i32, space: u32) -> Result<Vec<u32>, RebuildError> {
        let mut chain = vec![space];
        let mut at = space;
        while at != 0 && chain.len() <= LEVELS_MAX {
            let first = self.first_of(at).ok_or(Inconsistency::UnknownNamespace(pid))?;
            at = self.bone(first.parent)?.space;
            chain.push(at);
        }
        chain.reverse();
        Ok(chain)
    }

    /// Makes a process or thread in the last pid namespace of a chain with all its numbers. A
    /// number that its maker may not choose is the next one there, because nothing else is made
    /// meanwhile.
    pub(super) fn clone_numbered(
        &self,
        by: By<'_>,
        chain: &[u32],
        place: Place<'_>,
        flags: u64,
        exit_signal: i32,
    ) -> Result<Stopped, RebuildError> {
        let (pid, numbers) = (place.pid, place.numbers());
        let what = "give it its number";
        if numbers.is_empty() {
            return self.clone_in(by.thread, pid, &[], flags, exit_signal);
        }
        if numbers.len() != chain.len() || chain.len() > LEVELS_MAX {
            return Err(Inconsistency::UnknownNamespace(pid).into());
        }
        let may = |space: &&u32| self.nested.rules(by.users, self.nested.pid_owner(**space));
        // One that begins now belongs to whoever makes it.
        let own = usize::from(place.founder().is_some());
        let chosen = own + chain.iter().rev().skip(own).take_while(may).count();
        let left = chain.len() - chosen;
        for (&space, &number) in chain.iter().zip(&numbers).take(left) {
            let first = if space == 0 { Some(self.bone(1)?) } else { self.first_of(space) };
            let first = first.ok_or(Inconsistency::UnknownNamespace(pid))?;
            let failed = |source| RebuildError::Process { pid, what, source };
            self.write_last_pid(first, number - 1)?.map_err(failed)?;
        }
        let made = self.clone_in(by.thread, pid, &numbers[left..], flags, exit_signal)?;
        if left > 0 {
            let status = Status::read(made.tid)?;
            let (own, below) = (status.in_ve("NSpid")?, status.below_ve("NSpid")?);
            if own != pid || below != place.below {
                let source = io::ErrorKind::AddrInUse.into();
                return Err(RebuildError::Outside { pid, what, source });
            }
        }
        Ok(made)
    }

    /// The children of a thread are born into a pid namespace from now on.
    pub(super) fn join_pids(
        &self,
        thread: &Stopped,
        pid: i32,
        space: u32,
    ) -> Result<(), RebuildError> {
        let namespace = self.pid_space(pid, space)?;
        self.pass_descriptor(thread, pid, &namespace)?;
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

    /// clone3(2) in a stopped process; the child stops at once. `pid` is what errors call it.
    fn clone_in(
        &self,
        parent: &Stopped,
        pid: i32,
        numbers: &[i32],
        flags: u64,
        exit_signal: i32,
    ) -> Result<Stopped, RebuildError> {
        const ARGUMENTS: usize = 80;
        let failed = |source| RebuildError::Process { pid, what: "make it", source };
        let mut batch = self.gate.batch();
        let count = numbers.len();
        // The innermost first.
        let numbers: Vec<u8> = numbers.iter().rev().flat_map(|it| it.to_le_bytes()).collect();
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
