//! Threads, each with the seccomp filters that it has.
//!
//! The kernel keeps filters as a tree: a thread inherits those of the one that made it, and later
//! ones hang below. Whether two threads share a filter shows when one of them installs the next for
//! all (`SECCOMP_FILTER_FLAG_TSYNC`). So threads with a common beginning are made from one that has
//! just that beginning.

use ckpt_format::{
    process::Process,
    seccomp::{Filter, INSTRUCTIONS_MAX},
};

use super::{
    Inconsistency, RebuildError, Skeleton,
    birth::{By, Place},
};
use crate::inject::Stopped;

const CLONE_THREAD_FLAGS: u64 = (libc::CLONE_VM
    | libc::CLONE_FS
    | libc::CLONE_FILES
    | libc::CLONE_SIGHAND
    | libc::CLONE_THREAD
    | libc::CLONE_SYSVSEM) as u64;

const SECCOMP_SET_MODE_FILTER: u64 = 1;
const FLAG_LOG: u64 = 2;
/// What filters have switched on to keep speculation out is set apart, thread by thread.
const FLAG_SPEC_ALLOW: u64 = 4;
/// `struct sock_filter`.
const INSTRUCTION: usize = 8;

impl Skeleton {
    /// Makes the threads beside the leader, and gives all of them their filters.
    pub(super) fn make_threads(
        &mut self,
        process: &Process,
        filters: &[Filter],
    ) -> Result<(), RebuildError> {
        let mut made: Vec<Option<Stopped>> = process.threads.iter().map(|_| None).collect();
        let all = (0..process.threads.len()).collect();
        Family { skeleton: self, process, filters, made: &mut made }.grow(0, all, 0)?;
        if let Some(bone) = self.processes.get_mut(&process.pid) {
            bone.others = made.into_iter().flatten().collect();
        }
        self.part_directories(process)
    }

    /// Gives threads directories of their own, before the process itself has any.
    fn part_directories(&self, process: &Process) -> Result<(), RebuildError> {
        let bone = self.bone(process.pid)?;
        for (stopped, thread) in bone.others.iter().zip(process.threads.iter().skip(1)) {
            let Some(own) = &thread.directories else { continue };
            let failed = bone.failed("set the directories of a thread");
            let mut batch = self.gate.batch();
            batch.call("unshare", libc::SYS_unshare, &[libc::CLONE_FS as u64]);
            batch.run(stopped)?.all().map_err(&failed)?;
            // The working directory first: it need not be below the root.
            self.enter_directory(bone, stopped, &own.cwd)?;
            let mut batch = self.gate.batch();
            let root = batch.text(&own.root);
            if own.root != "/" {
                batch.call("chroot", libc::SYS_chroot, &[root]);
            }
            batch.call("umask", libc::SYS_umask, &[own.umask.into()]);
            batch.run(stopped)?.all().map_err(&failed)?;
        }
        Ok(())
    }
}

/// The threads of one process in the making.
struct Family<'a> {
    skeleton: &'a Skeleton,
    process: &'a Process,
    filters: &'a [Filter],
    /// By place in the process's threads; the leader is there from the start.
    made: &'a mut Vec<Option<Stopped>>,
}

impl Family<'_> {
    /// Makes all of `members`, whose first `depth` filters are the same. `carrier` is one of them,
    /// exists already, and has just these filters.
    fn grow(
        &mut self,
        carrier: usize,
        members: Vec<usize>,
        depth: usize,
    ) -> Result<(), RebuildError> {
        let mut branches: Vec<(u32, Vec<usize>)> = Vec::new();
        for member in members {
            match self.process.threads[member].filters.get(depth) {
                None => self.make(carrier, member)?,
                Some(&filter) => match branches.iter_mut().find(|(first, _)| *first == filter) {
                    Some((_, others)) => others.push(member),
                    None => branches.push((filter, vec![member])),
                },
            }
        }
        // The carrier goes on last: it has one filter more then.
        branches.sort_by_key(|(_, members)| members.contains(&carrier));
        for (filter, members) in branches {
            let first = if members.contains(&carrier) { carrier } else { members[0] };
            self.make(carrier, first)?;
            self.install(first, filter)?;
            self.grow(first, members, depth + 1)?;
        }
        Ok(())
    }

    fn thread(&self, place: usize) -> Result<&Stopped, RebuildError> {
        match &self.made[place] {
            Some(thread) => Ok(thread),
            None => Ok(&self.skeleton.bone(self.process.pid)?.thread),
        }
    }

    /// Makes a thread by another one of the process, unless it is there.
    fn make(&mut self, by: usize, place: usize) -> Result<(), RebuildError> {
        if place == 0 || self.made[place].is_some() {
            return Ok(());
        }
        let thread = &self.process.threads[place];
        let (tid, below) = (thread.tid, thread.below.as_slice());
        let bone = self.skeleton.bone(self.process.pid)?;
        let chain = self.skeleton.chain(tid, bone.space)?;
        let numbers = Place { pid: tid, below, ..Place::any(bone.space) };
        let by = By { thread: self.thread(by)?, ..By::of(bone) };
        let made = self.skeleton.clone_numbered(by, &chain, numbers, CLONE_THREAD_FLAGS, 0)?;
        self.made[place] = Some(made);
        Ok(())
    }

    fn install(&self, place: usize, filter: u32) -> Result<(), RebuildError> {
        let pid = self.process.pid;
        let unknown = Inconsistency::UnknownFilter(filter);
        let filter = self.filters.get(filter as usize).ok_or(unknown)?;
        let count = filter.program.len() / INSTRUCTION;
        if count == 0 || count > INSTRUCTIONS_MAX || filter.program.len() % INSTRUCTION != 0 {
            return Err(unknown.into());
        }
        let mut batch = self.skeleton.gate.batch();
        let program = batch.bytes(&filter.program);
        // `struct sock_fprog`.
        let program = batch.bytes(&[(count as u64).to_le_bytes(), program.to_le_bytes()].concat());
        let flags = if filter.logs { FLAG_LOG | FLAG_SPEC_ALLOW } else { FLAG_SPEC_ALLOW };
        let arguments = [SECCOMP_SET_MODE_FILTER, flags, program];
        let call = batch.call("seccomp", libc::SYS_seccomp, &arguments);
        let done = batch.run(self.thread(place)?)?;
        let failed =
            |source| RebuildError::Process { pid, what: "install a seccomp filter", source };
        done.value(call).map(drop).map_err(failed)
    }
}
