//! Descriptors, program and directories of the processes.

use std::{
    collections::BTreeMap,
    fs::File,
    io,
    os::fd::{AsRawFd, RawFd},
};

use ckpt_format::{
    memory::{Area, Backing, MemoryMap},
    process::{Descriptor, Process, Processes, Ring},
};

use super::{
    Bone, CHANNEL, Inconsistency, RebuildError, Skeleton,
    areas::{Message, send_descriptors},
};
use crate::{
    aio,
    files::Rebuilt,
    inject::{Batch, Gate},
    ipc, procfs,
};

/// The most descriptors in one message (`SCM_MAX_FD`).
const BATCH: usize = 253;
const PR_SET_MM: u64 = 35;
const PR_SET_MM_MAP: u64 = 14;
impl Skeleton {
    /// Makes the threads, and the processes that are dead but not yet waited for: what is open
    /// below `/proc/PID` can be opened then. They die in [`Self::finalize`].
    pub fn populate(&mut self, processes: &Processes) -> Result<(), RebuildError> {
        self.processes.values_mut().try_for_each(Bone::write_late)?;
        self.mount_late()?;
        self.map_waiting()?;
        for process in &processes.processes {
            if process.threads.is_empty() {
                return Err(Inconsistency::NoThreads(process.pid).into());
            }
            // What joins a user namespace must have no other threads yet.
            if !self.is_user_apart(process.pid)? {
                self.make_threads(process, &processes.filters)?;
            }
        }
        self.bear_zombies()
    }

    /// Gives every process its program, directories and descriptors.
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
            self.set_program(process)?;
            let bone = self.bone(process.pid)?;
            self.make_rings(bone, &process.rings)?;
            let number = bone.namespaces.unwrap_or_default().ipc;
            let sets = usize::try_from(number).ok().and_then(|it| self.semaphores.get(it));
            let sets = sets.map(Vec::as_slice).unwrap_or_default();
            ipc::restore_undo(&bone.thread, self.gate, sets, &process.semaphore_undo)
                .map_err(bone.failed("set what its end does to semaphores"))?;
        }
        for process in &processes.processes {
            let bone = self.bone(process.pid)?;
            if !bone.common.directories {
                self.set_directories(bone, process)?;
            }
            // Needs the channel, which goes when the table comes, be it that of another process.
            if self.is_user_apart(process.pid)? {
                self.enter_users(process)?;
                self.make_threads(process, &processes.filters)?;
            }
            self.part_children(process.pid)?;
        }
        for process in &processes.processes {
            // Whoever has no number yet gets none any more.
            self.set_last_pid(self.bone(process.pid)?, process.last_pid)?;
        }
        // What processes have in common they get once, when all have the rest.
        for process in &processes.processes {
            if !self.bone(process.pid)?.common.descriptors {
                let table = tables.get(&process.pid).map(Vec::as_slice).unwrap_or_default();
                self.install_descriptors(process.pid, table, files)?;
            }
        }
        Ok(())
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

    fn set_program(&self, process: &Process) -> Result<(), RebuildError> {
        let bone = self.bone(process.pid)?;
        let mut batch = self.gate.batch();
        let open = match process.exe_object {
            Some(object) => self.pass_object(&mut batch, object)?,
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
        let done = batch.run(&bone.thread)?;
        done.value(open).map_err(|source| RebuildError::Open {
            pid: process.pid,
            path: process.exe.clone(),
            source,
        })?;
        done.all().map_err(bone.failed("set its program"))
    }

    fn set_directories(&self, bone: &Bone, process: &Process) -> Result<(), RebuildError> {
        let is_there = || procfs::link(bone.thread.tid, "cwd").is_ok_and(|it| it == process.cwd);
        if bone.users != 0 && process.root == "/" && is_there() {
            return Ok(());
        }
        if process.root != "/" {
            let mut batch = self.gate.batch();
            let root = batch.text(&process.root);
            batch.call("chroot", libc::SYS_chroot, &[root]);
            batch.run(&bone.thread)?.all().map_err(bone.failed("set its root"))?;
        }
        self.enter_directory(bone, strip_root(&process.cwd, &process.root))
    }

    /// Passes the open files through the channel and puts each where it belongs.
    ///
    /// Received descriptors take the lowest free numbers 0, 1, 2 …, never above where they
    /// belong; moving them in descending order therefore never hits one that still waits.
    fn install_descriptors(
        &self,
        pid: i32,
        table: &[Descriptor],
        files: &Rebuilt,
    ) -> Result<(), RebuildError> {
        let bone = self.bone(pid)?;
        let highest = table.last().map_or(0, |last| last.fd as u64);
        let channel = highest.max(table.len() as u64).max(CHANNEL) + 1;
        // For nearly every table all of it is done in one stop.
        let mut arrival = Arrival { bone, batch: self.gate.batch(), coming: None };
        arrival.batch.call("dup2", libc::SYS_dup2, &[CHANNEL, channel]);
        arrival.batch.call("close", libc::SYS_close, &[CHANNEL]);
        for (index, part) in table.chunks(BATCH).enumerate() {
            if arrival.coming.is_some() {
                arrival.run(self.gate)?;
            }
            self.pass(&mut arrival, channel, index * BATCH, part, files)?;
        }
        for (index, descriptor) in table.iter().enumerate().rev() {
            move_descriptor(&mut arrival.batch, index as u64, *descriptor);
            if arrival.batch.is_nearly_full() {
                arrival.run(self.gate)?;
            }
        }
        arrival.batch.call("close", libc::SYS_close, &[channel]);
        arrival.run(self.gate)
    }

    /// Sends descriptors, which are to be received as those from `first` on.
    fn pass(
        &self,
        arrival: &mut Arrival<'_>,
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
        send_descriptors(&self.channel, &fds).map_err(|source| arrival.failed(source))?;
        let message = Message::add(&mut arrival.batch, fds.len());
        message.receive(&mut arrival.batch, channel);
        arrival.coming = Some((message.numbers, first, fds.len()));
        Ok(())
    }
}

/// Descriptors on their way into a process.
struct Arrival<'a> {
    bone: &'a Bone,
    batch: Batch,
    /// Where the numbers of those that come will stand, the first of them, and how many there are.
    coming: Option<(u64, usize, usize)>,
}

impl Arrival<'_> {
    fn failed(&self, source: io::Error) -> RebuildError {
        RebuildError::Outside { pid: self.bone.pid, what: "pass its descriptors", source }
    }

    /// Makes the calls up to here.
    fn run(&mut self, gate: Gate) -> Result<(), RebuildError> {
        let batch = std::mem::replace(&mut self.batch, gate.batch());
        let done = batch.run(&self.bone.thread)?;
        done.all().map_err(self.bone.failed("install its descriptors"))?;
        let Some((numbers, first, count)) = self.coming.take() else { return Ok(()) };
        let received = |index: usize| done.word(numbers + 4 * index as u64) as usize;
        match (0..count).all(|index| received(index) == first + index) {
            true => Ok(()),
            false => Err(self.failed(io::ErrorKind::InvalidData.into())),
        }
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

/// A path as seen after chroot(2) to `root`.
fn strip_root<'a>(path: &'a str, root: &str) -> &'a str {
    match path.strip_prefix(root) {
        Some(rest) if root != "/" && rest.starts_with('/') => rest,
        Some("") => "/",
        _ => path,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_working_directory_is_told_as_seen_from_its_root() {
        assert_eq!(strip_root("/srv/jail/tmp", "/srv/jail"), "/tmp");
        assert_eq!(strip_root("/srv/jail", "/srv/jail"), "/");
        assert_eq!(strip_root("/tmp", "/"), "/tmp");
        assert_eq!(strip_root("/srv/jailed", "/srv/jail"), "/srv/jailed");
    }

    #[test]
    fn the_memory_map_has_the_size_that_the_kernel_knows() {
        assert_eq!(memory_map(&MemoryMap::default(), 0, 0).len(), MEMORY_MAP_SIZE);
    }
}
