//! Descriptors, program and directories of the processes.

use std::{
    collections::BTreeMap,
    fs::File,
    os::fd::{AsRawFd, RawFd},
};

use ckpt_format::{
    memory::{Area, Backing, MemoryMap},
    process::{Descriptor, Process, Processes, Ring},
};

use super::{
    Bone, CHANNEL, Inconsistency, RebuildError, Skeleton,
    areas::{Message, send_descriptors},
    calls::Calls,
    directory::is_removed,
};
use crate::{aio, files::Rebuilt, inject::Batch, ipc, procfs};

/// The most descriptors in one message (`SCM_MAX_FD`).
const BATCH: usize = 253;
const PR_SET_MM: u64 = 35;
const PR_SET_MM_MAP: u64 = 14;
impl Skeleton {
    /// Makes the threads, and the processes that are dead but not yet waited for: what is open
    /// below `/proc/PID` can be opened then. They die in [`Self::finalize`].
    pub fn populate(
        &mut self,
        processes: &Processes,
        tables: &BTreeMap<i32, Vec<Descriptor>>,
    ) -> Result<(), RebuildError> {
        self.processes.values_mut().try_for_each(Bone::write_late)?;
        self.mount_late()?;
        self.map_waiting()?;
        for process in &processes.processes {
            if process.living().is_empty() {
                return Err(Inconsistency::NoThreads(process.pid).into());
            }
            // What joins a user namespace must have no other threads yet.
            if process.threads.len() > 1 {
                let table = tables.get(&process.pid).map(Vec::as_slice).unwrap_or_default();
                self.widen_table(self.bone(process.pid)?, table)?;
            }
            if !self.is_user_apart(process.pid)? {
                self.make_threads(process, &processes.filters)?;
            }
        }
        self.bear_zombies()
    }

    /// Makes room for its descriptors while it has one thread. With several ones the kernel would wait
    /// for all processors, see [`crate::files::make_room`].
    fn widen_table(&self, bone: &Bone, table: &[Descriptor]) -> Result<(), RebuildError> {
        /// `NR_OPEN_DEFAULT`
        const FIRST: u64 = 64;
        let last = table.last().map_or(0, |descriptor| descriptor.fd as u64);
        let last = last.max(free_number(table));
        if last < FIRST || bone.common.descriptors {
            return Ok(());
        }
        let mut calls = Calls::new(self.gate, bone);
        calls.batch.step("make room for its descriptors");
        let duplicate = libc::F_DUPFD_CLOEXEC as u64;
        calls.batch.call("fcntl", libc::SYS_fcntl, &[CHANNEL, duplicate, last]);
        // Nothing else is open there.
        calls.batch.call("close", libc::SYS_close, &[last]);
        calls.run().map(drop)
    }

    /// Gives every process all but its registers: program, directories, descriptors, and what
    /// its threads are.
    ///
    /// Descriptor 0 and up stay free until the table comes, which the opening of files needs.
    pub fn install(
        &mut self,
        processes: &Processes,
        tables: &BTreeMap<i32, Vec<Descriptor>>,
        files: &Rebuilt,
    ) -> Result<(), RebuildError> {
        self.end_writing()?;
        for process in &processes.processes {
            let bone = self.bone(process.pid)?;
            if self.is_prepared(bone)? {
                let mut calls = Calls::new(self.gate, bone);
                self.set_program(&mut calls, process)?;
                calls.run()?;
            }
            self.make_rings(bone, &process.rings)?;
            let number = bone.namespaces.unwrap_or_default().ipc;
            let sets = usize::try_from(number).ok().and_then(|it| self.semaphores.get(it));
            let sets = sets.map(Vec::as_slice).unwrap_or_default();
            ipc::restore_undo(&bone.thread, self.gate, sets, &process.semaphore_undo)
                .map_err(bone.failed("set what its end does to semaphores"))?;
        }
        for process in &processes.processes {
            let bone = self.bone(process.pid)?;
            if self.is_prepared(bone)? && !bone.common.directories {
                self.set_directories(bone, process)?;
            }
            // Needs the channel, which goes when the table comes, be it that of another process.
            if self.is_user_apart(process.pid)? {
                self.enter_users(process)?;
                self.make_threads(process, &processes.filters)?;
            }
            self.part_children(process.pid)?;
        }
        self.set_last_pid(self.bone(1)?, processes.last_pid)?;
        for process in &processes.processes {
            // Whoever has no number yet gets none any more.
            self.set_last_pid(self.bone(process.pid)?, process.last_pid)?;
        }
        self.end_leaders(processes)?;
        let mut keys = self.make_keys(processes)?;
        // Init last: it keeps the keys for all others.
        let (first, others) =
            processes.processes.split_first().ok_or(RebuildError::Stream(Inconsistency::NoInit))?;
        for process in others.iter().chain([first]) {
            let bone = self.bone(process.pid)?;
            self.prepare_to_complete(bone, process)?;
            let mut calls = Calls::new(self.gate, bone);
            if !self.is_prepared(bone)? {
                self.set_program(&mut calls, process)?;
                self.add_directories(&mut calls, process)?;
            }
            // What processes have in common they get once, when all have the rest.
            if !bone.common.descriptors {
                let table = tables.get(&process.pid).map(Vec::as_slice).unwrap_or_default();
                self.install_descriptors(&mut calls, table, files)?;
            }
            self.complete(calls, process, keys.as_mut())?;
        }
        keys.map_or(Ok(()), |made| self.finish_keys(&made))
    }

    /// Makes its AIO contexts.
    fn make_rings(&self, bone: &Bone, rings: &[Ring]) -> Result<(), RebuildError> {
        if rings.is_empty() {
            return Ok(());
        }
        let is_there = |ring: &Ring| {
            let its = |area: &&Area| area.start == ring.start && area.backing == Backing::Ring;
            let area = bone.areas.iter().find(its);
            area.is_some_and(|area| aio::fits(ring, area.len()))
        };
        if !rings.iter().all(is_there) {
            return Err(Inconsistency::AreaOutside(bone.pid).into());
        }
        let failed = bone.failed("make its AIO contexts");
        let outside =
            |source| RebuildError::Outside { pid: bone.pid, what: "make its AIO contexts", source };
        let null = File::open("/dev/null").map_err(outside)?;
        send_descriptors(&self.channel, &[null.as_raw_fd()]).map_err(outside)?;
        let mut batch = self.gate.batch();
        let message = Message::add(&mut batch, 1);
        message.receive(&mut batch, CHANNEL);
        batch.run(&bone.thread)?.all().map_err(&failed)?;
        aio::rebuild(&bone.thread, self.gate, &bone.memory, rings, 0).map_err(&failed)?;
        let mut batch = self.gate.batch();
        batch.call("close", libc::SYS_close, &[0]);
        batch.run(&bone.thread)?.all().map_err(&failed)
    }

    /// What a process must be given before others get the rest: because it is somebody else then,
    /// or has in common with others what they change.
    fn is_prepared(&self, bone: &Bone) -> Result<bool, RebuildError> {
        let shares = bone.common.descriptors || bone.common.directories;
        Ok(shares || self.is_user_apart(bone.pid)?)
    }

    fn set_program(&self, calls: &mut Calls<'_>, process: &Process) -> Result<(), RebuildError> {
        let batch = &mut calls.batch;
        batch.step("set its program");
        let open = match process.exe_object {
            Some(object) => self.pass_object(batch, object)?,
            None => {
                let path = batch.text(&process.exe);
                let flags = (libc::O_RDONLY | libc::O_CLOEXEC) as u64;
                let at = libc::AT_FDCWD as u64;
                batch.call("openat", libc::SYS_openat, &[at, path, flags])
            }
        };
        let auxv = batch.bytes(&process.memory.auxv);
        let map = batch.bytes(&memory_map(&process.memory, auxv, 0));
        let size = MEMORY_MAP_SIZE as u64;
        batch.call("prctl", libc::SYS_prctl, &[PR_SET_MM, PR_SET_MM_MAP, map, size, 0]);
        batch.call("close", libc::SYS_close, &[0]);
        calls.program = Some((open, process.exe.clone()));
        Ok(())
    }

    fn set_directories(&self, bone: &Bone, process: &Process) -> Result<(), RebuildError> {
        let is_there = || procfs::link(bone.thread.tid, "cwd").is_ok_and(|it| it == process.cwd);
        if bone.users != 0 && process.root == "/" && is_there() {
            return Ok(());
        }
        self.enter_directory(bone, &bone.thread, &process.cwd)?;
        let mut calls = Calls::new(self.gate, bone);
        change_root(&mut calls.batch, process);
        calls.run().map(drop)
    }

    /// The same together with other calls, unless the working directory takes more than one.
    fn add_directories(
        &self,
        calls: &mut Calls<'_>,
        process: &Process,
    ) -> Result<(), RebuildError> {
        if is_removed(&process.cwd) {
            calls.run()?;
            return self.set_directories(calls.bone, process);
        }
        // The working directory first: it need not be below the root.
        calls.batch.step("enter its working directory");
        let path = calls.batch.text(&process.cwd);
        calls.batch.call("chdir", libc::SYS_chdir, &[path]);
        change_root(&mut calls.batch, process);
        Ok(())
    }

    /// Passes the open files through the channel and puts each where it belongs.
    ///
    /// Received descriptors take the lowest free numbers 0, 1, 2 …, never above where they
    /// belong; moving them in descending order therefore never hits one that still waits.
    fn install_descriptors(
        &self,
        calls: &mut Calls<'_>,
        table: &[Descriptor],
        files: &Rebuilt,
    ) -> Result<(), RebuildError> {
        let channel = free_number(table);
        calls.batch.step("install its descriptors");
        calls.batch.call("dup2", libc::SYS_dup2, &[CHANNEL, channel]);
        calls.batch.call("close", libc::SYS_close, &[CHANNEL]);
        // For nearly every table all of it is done in one stop.
        for (index, part) in table.chunks(BATCH).enumerate() {
            if calls.coming.is_some() {
                calls.run()?;
            }
            self.pass(calls, channel, index * BATCH, part, files)?;
        }
        for (index, descriptor) in table.iter().enumerate().rev() {
            move_descriptor(&mut calls.batch, index as u64, *descriptor);
            if calls.batch.is_nearly_full() {
                calls.run()?;
            }
        }
        calls.batch.call("close", libc::SYS_close, &[channel]);
        if table.len() > BATCH {
            calls.run()?;
        }
        Ok(())
    }

    /// Sends descriptors, which are to be received as those from `first` on.
    fn pass(
        &self,
        calls: &mut Calls<'_>,
        channel: u64,
        first: usize,
        part: &[Descriptor],
        files: &Rebuilt,
    ) -> Result<(), RebuildError> {
        let fds = part
            .iter()
            .map(|descriptor| {
                let id = descriptor.file;
                let fd = files.descriptor(id).ok_or(Inconsistency::UnknownFile(id.0))?;
                Ok::<RawFd, Inconsistency>(fd.as_raw_fd())
            })
            .collect::<Result<Vec<RawFd>, _>>()?;
        send_descriptors(&self.channel, &fds).map_err(|source| calls.lost(source))?;
        let message = Message::add(&mut calls.batch, fds.len());
        message.receive(&mut calls.batch, channel);
        calls.coming = Some((message.numbers, first, fds.len()));
        Ok(())
    }
}

/// Where the channel is out of the way: behind what is received, at a number that nobody wants. Not
/// behind all of them, where the limit of the VE may be.
fn free_number(table: &[Descriptor]) -> u64 {
    let first = (table.len() as u64).max(CHANNEL + 1);
    table.iter().fold(first, |free, wanted| free + u64::from(wanted.fd as u64 == free))
}

fn change_root(batch: &mut Batch, process: &Process) {
    if process.root != "/" {
        batch.step("set its root");
        // One that was removed is where it is already.
        let is_here = is_removed(&process.root) && process.root == process.cwd;
        let root = batch.text(if is_here { "." } else { &process.root });
        batch.call("chroot", libc::SYS_chroot, &[root]);
    }
}

fn move_descriptor(batch: &mut Batch, from: u64, descriptor: Descriptor) {
    let to = descriptor.fd as u64;
    if from != to {
        let flags = if descriptor.close_on_exec { libc::O_CLOEXEC as u64 } else { 0 };
        batch.call("dup3", libc::SYS_dup3, &[from, to, flags]);
        batch.call("close", libc::SYS_close, &[from]);
    } else if descriptor.close_on_exec {
        let arguments = [to, libc::F_SETFD as u64, libc::FD_CLOEXEC as u64];
        batch.call("fcntl", libc::SYS_fcntl, &arguments);
    }
}

const MEMORY_MAP_SIZE: usize = 104;

/// `struct prctl_mm_map` (include/uapi/linux/prctl.h).
fn memory_map(memory: &MemoryMap, auxv: u64, exe: u32) -> Vec<u8> {
    let fields = [
        memory.start_code,
        memory.end_code,
        memory.start_data,
        memory.end_data,
        memory.start_brk,
        memory.brk,
        memory.start_stack,
        memory.arg_start,
        memory.arg_end,
        memory.env_start,
        memory.env_end,
        auxv,
        memory.auxv.len() as u64 | u64::from(exe) << 32,
    ];
    fields.iter().flat_map(|field| field.to_le_bytes()).collect()
}

#[cfg(test)]
mod tests {
    use ckpt_format::files::FileId;

    use super::*;

    #[test]
    fn the_memory_map_has_the_size_that_the_kernel_knows() {
        assert_eq!(memory_map(&MemoryMap::default(), 0, 0).len(), MEMORY_MAP_SIZE);
    }

    #[test]
    fn the_channel_is_where_nobody_belongs() {
        let table = |numbers: &[i32]| -> Vec<Descriptor> {
            let descriptor = |&fd| Descriptor { fd, file: FileId(0), close_on_exec: false };
            numbers.iter().map(descriptor).collect()
        };
        assert_eq!(free_number(&table(&[])), 4);
        assert_eq!(free_number(&table(&[0, 1, 2])), 4);
        assert_eq!(free_number(&table(&[0, 1, 2, 4, 5, 19_999])), 6);
        assert_eq!(free_number(&table(&[5, 6, 7, 8, 9, 10])), 11);
    }
}
