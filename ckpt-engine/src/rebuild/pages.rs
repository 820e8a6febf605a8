//! Applies the records of the memory stream: layouts, pages, and pages that are gone.

use std::{
    fs::{File, Permissions},
    io,
    os::{
        fd::{AsFd, AsRawFd},
        unix::fs::{FileExt, PermissionsExt},
    },
};

use ckpt_format::{
    memory::{PAGE, Run, SharedKind, SharedObject, Space},
    stream::Record,
};
use nix::{
    fcntl::{FallocateFlags, fallocate},
    unistd::{Gid, Uid, fchown},
};

use super::{
    Bone, GATE, Inconsistency, RebuildError, Skeleton,
    areas::{Message, send_descriptors},
};
use crate::{
    inject::{Batch, Gate},
    ipc, procfs,
    sys::{
        task,
        vm::{self, SharedMapping},
    },
    unnamed::{self, Blank},
};

/// The most pages of one process that may be kept for later.
const LATE_MAX: usize = 4096;
/// The most runs dropped in one stop.
const DROPS_MAX: usize = 1024;

/// A shared object on the target.
#[derive(Debug)]
pub(super) struct SharedTarget {
    pub(super) file: File,
    pub(super) object: SharedObject,
}

impl Skeleton {
    /// Applies one record. An error leaves a skeleton that can only be thrown away.
    pub fn apply(&mut self, record: Record) -> Result<(), RebuildError> {
        match record {
            Record::Layout(layout) => {
                self.update_shared(layout.shared)?;
                self.update_tree(layout.processes)
            }
            Record::Areas { pid, areas, complete } => {
                let bone = self.bone_mut(pid)?;
                bone.coming.extend(areas);
                match complete {
                    true => {
                        let (areas, life) = (std::mem::take(&mut bone.coming), bone.next_life);
                        self.reshape(pid, life, areas)
                    }
                    false => Ok(()),
                }
            }
            Record::Pages { space, runs, data } => self.write(space, &runs, &data),
            Record::Same { space, runs, origins, key, hashes } => {
                let data = self.contents(&origins, &key, &hashes)?;
                self.write(space, &runs, &data)
            }
            Record::Drop { space, runs } => self.discard(space, &runs),
            Record::Guards { pid, runs } => {
                if runs.iter().any(overlaps_gate) {
                    return Err(Inconsistency::AreaOutside(pid).into());
                }
                self.bone_mut(pid)?.guards = runs;
                Ok(())
            }
        }
    }

    /// The shared objects by id, for descriptors that refer to memfds.
    pub fn shared_objects(&self) -> impl Iterator<Item = (u64, &File)> {
        self.shared.iter().map(|(&id, shared)| (id, &shared.file))
    }

    fn update_shared(&mut self, objects: Vec<SharedObject>) -> Result<(), RebuildError> {
        self.shared.retain(|id, _| objects.iter().any(|object| object.id == *id));
        for object in objects {
            let id = object.id;
            let failed = |source| RebuildError::Shared { object: id, source };
            match self.shared.get_mut(&id) {
                None => {
                    let file = self.make_shared(&object).map_err(failed)?;
                    self.shared.insert(id, SharedTarget { file, object });
                }
                Some(shared) if shared.object.size != object.size => {
                    shared.file.set_len(object.size).map_err(failed)?;
                    shared.object = object;
                }
                Some(shared) => shared.object = object,
            }
        }
        Ok(())
    }

    fn write(&mut self, space: Space, runs: &[Run], data: &[u8]) -> Result<(), RebuildError> {
        let total: u64 = runs.iter().map(|run| run.pages.saturating_mul(PAGE)).sum();
        if total != data.len() as u64 {
            return Err(Inconsistency::PageCount.into());
        }
        match space {
            Space::Process(pid) => {
                if runs.iter().any(overlaps_gate) {
                    return Err(Inconsistency::AreaOutside(pid).into());
                }
                self.bone_mut(pid)?.write(runs, data)
            }
            Space::Shared(object) => {
                let shared = self.shared(object)?;
                for (run, bytes) in with_contents(runs, data) {
                    let end = shared.object.size.saturating_sub(run.start);
                    let bytes = &bytes[..bytes.len().min(end as usize)];
                    match shared.object.kind.huge_page() {
                        None => shared.file.write_all_at(bytes, run.start),
                        Some(_) if bytes.is_empty() => Ok(()),
                        Some(page) => vm::write_huge(&shared.file, page, run.start, bytes),
                    }
                    .map_err(|source| RebuildError::Shared { object, source })?;
                }
                Ok(())
            }
        }
    }

    fn discard(&mut self, space: Space, runs: &[Run]) -> Result<(), RebuildError> {
        match space {
            Space::Shared(object) => {
                let shared = self.shared(object)?;
                for run in runs {
                    let flags =
                        FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
                    let len = (run.pages * PAGE) as i64;
                    fallocate(shared.file.as_fd(), flags, run.start as i64, len)
                        .map_err(|error| RebuildError::Shared { object, source: error.into() })?;
                }
                Ok(())
            }
            Space::Process(pid) => {
                let bone = self.bone_mut(pid)?;
                runs.iter().for_each(|run| bone.forget_late(run));
                let bone = self.bone(pid)?;
                runs.chunks(DROPS_MAX).try_for_each(|runs| self.drop_private(bone, runs))
            }
        }
    }

    fn drop_private(&self, bone: &Bone, runs: &[Run]) -> Result<(), RebuildError> {
        let pid = bone.pid;
        let mut batch = self.gate.batch();
        for run in runs {
            if overlaps_gate(run) {
                return Err(Inconsistency::AreaOutside(pid).into());
            }
            let arguments = [run.start, run.pages * PAGE, libc::MADV_DONTNEED as u64];
            batch.call("madvise", libc::SYS_madvise, &arguments);
        }
        let done = batch.run(&bone.thread)?;
        for (index, run) in runs.iter().enumerate() {
            if done.result(index).is_err() {
                // Locked memory cannot be given back: it gets its zeros instead.
                let zeros = vec![0; PAGE as usize];
                for page in 0..run.pages {
                    bone.memory.write_all_at(&zeros, run.start + page * PAGE).map_err(
                        |source| RebuildError::Outside { pid, what: "drop its pages", source },
                    )?;
                }
            }
        }
        Ok(())
    }

    pub(super) fn shared(&self, object: u64) -> Result<&SharedTarget, RebuildError> {
        self.shared.get(&object).ok_or(RebuildError::Stream(Inconsistency::UnknownObject(object)))
    }

    /// Makes an empty object of the right kind and size, owned by the right user of the VE.
    pub(super) fn make_shared(&self, object: &SharedObject) -> io::Result<File> {
        let init = || unnamed::process(self.init().map_err(io::Error::other)?);
        match &object.kind {
            SharedKind::Segment(segment) => {
                let unknown = || io::Error::from(io::ErrorKind::NotFound);
                match self.nested.ipc(segment.namespace) {
                    Some(namespace) => ipc::make_segment(namespace, segment, self.id_base),
                    None if segment.namespace == 0 => {
                        ipc::make_segment(&init()?, segment, self.id_base)
                    }
                    None => Err(unknown()),
                }
            }
            // Something else holds its contents until its file system is there.
            kind if self.lost_its_name_late(kind) => {
                let file = File::from(task::memfd("waiting")?);
                file.set_len(object.size)?;
                Ok(file)
            }
            SharedKind::Deleted { path, mode, uid, gid, linkable } => {
                let (mode, uid, gid, linkable) = (*mode, *uid, *gid, *linkable);
                let blank = Blank { path, mode, uid, gid, linkable };
                let file = blank.make(&init()?, self.id_base)?;
                file.set_len(object.size)?;
                Ok(file)
            }
            _ => make_own(object, self.id_base),
        }
    }

    /// Lets a process receive a shared object for reading, as descriptor 0.
    pub(super) fn pass_object(
        &self,
        batch: &mut Batch,
        object: u64,
    ) -> Result<usize, RebuildError> {
        let failed = |source| RebuildError::Shared { object, source };
        let file = unnamed::reopen_to_read(&self.shared(object)?.file).map_err(failed)?;
        self.pass_file(batch, object, &file)
    }

    /// Lets a process receive a shared object for reading and writing, as descriptor 0.
    pub(super) fn pass_object_to_write(
        &self,
        batch: &mut Batch,
        object: u64,
    ) -> Result<usize, RebuildError> {
        self.pass_file(batch, object, &self.shared(object)?.file)
    }

    fn pass_file(
        &self,
        batch: &mut Batch,
        object: u64,
        file: &File,
    ) -> Result<usize, RebuildError> {
        // The channel is a queue: what is sent now is received by the calls of this batch.
        send_descriptors(&self.channel, &[file.as_raw_fd()])
            .map_err(|source| RebuildError::Shared { object, source })?;
        let message = Message::add(batch, 1);
        Ok(message.receive(batch, super::CHANNEL))
    }

    /// Nothing is written into files without a name any more: a program that is one could not be
    /// run while somebody writes it.
    pub(super) fn end_writing(&mut self) -> Result<(), RebuildError> {
        for (&object, shared) in &mut self.shared {
            if matches!(shared.object.kind, SharedKind::Deleted { .. }) {
                shared.file = unnamed::reopen_to_read(&shared.file)
                    .map_err(|source| RebuildError::Shared { object, source })?;
            }
        }
        Ok(())
    }

    /// Puts the seals on the memfds: the last thing, as nobody can write them afterwards.
    pub(super) fn seal_shared(&self) -> Result<(), RebuildError> {
        for (&object, shared) in &self.shared {
            if let SharedKind::Memfd { seals, .. } = shared.object.kind {
                let seals = nix::fcntl::SealFlag::from_bits_retain(seals as i32);
                let arguments = nix::fcntl::FcntlArg::F_ADD_SEALS(seals);
                nix::fcntl::fcntl(&shared.file, arguments)
                    .map_err(|error| RebuildError::Shared { object, source: error.into() })?;
            }
        }
        Ok(())
    }
}

impl Bone {
    /// Writes pages: all at once where the process itself could, which costs least.
    fn write(&mut self, runs: &[Run], data: &[u8]) -> Result<(), RebuildError> {
        let places: Vec<(u64, usize)> =
            runs.iter().map(|run| (run.start, (run.pages * PAGE) as usize)).collect();
        let mut written = vm::write_process(self.thread.tid, data, &places).unwrap_or(0);
        for (run, bytes) in with_contents(runs, data) {
            match written.checked_sub(bytes.len()) {
                Some(rest) => {
                    written = rest;
                    self.forget_late(run);
                }
                None => {
                    written = 0;
                    self.write_run(run, bytes)?;
                }
            }
        }
        Ok(())
    }

    /// Writes pages whatever their protection, and keeps those for later that cannot be written
    /// yet. A running VE changes its files and its memory at once, and we see the one before the
    /// other.
    fn write_run(&mut self, run: &Run, bytes: &[u8]) -> Result<(), RebuildError> {
        self.forget_late(run);
        if self.memory.write_all_at(bytes, run.start).is_ok() {
            return Ok(());
        }
        for (page, bytes) in bytes.chunks_exact(PAGE as usize).enumerate() {
            let address = run.start + page as u64 * PAGE;
            if let Err(source) = self.memory.write_all_at(bytes, address) {
                if self.late.len() >= LATE_MAX {
                    let (pid, what) = (self.pid, "write its pages");
                    return Err(RebuildError::Outside { pid, what, source });
                }
                self.late.insert(address, bytes.to_vec());
            }
        }
        Ok(())
    }

    fn forget_late(&mut self, run: &Run) {
        if !self.late.is_empty() {
            let end = run.start.saturating_add(run.pages * PAGE);
            self.late.retain(|&address, _| !(run.start..end).contains(&address));
        }
    }

    /// Writes what could not be written before. The files are complete now, and so is the layout:
    /// what lies in none of its areas has gone.
    pub(super) fn write_late(&mut self) -> Result<(), RebuildError> {
        for (address, bytes) in std::mem::take(&mut self.late) {
            if self.areas.iter().any(|area| (area.start..area.end).contains(&address)) {
                self.memory.write_all_at(&bytes, address).map_err(|source| {
                    RebuildError::Outside { pid: self.pid, what: "write its pages", source }
                })?;
            }
        }
        Ok(())
    }
}

/// Each run with its part of the data, which is as long as all of them together.
fn with_contents<'a>(runs: &'a [Run], data: &'a [u8]) -> impl Iterator<Item = (&'a Run, &'a [u8])> {
    let mut rest = data;
    runs.iter().map(move |run| {
        let (bytes, tail) = rest.split_at(rest.len().min((run.pages * PAGE) as usize));
        rest = tail;
        (run, bytes)
    })
}

pub(super) fn overlaps_gate(run: &Run) -> bool {
    run.start < GATE + Gate::SIZE && run.start.saturating_add(run.pages * PAGE) > GATE
}

/// Makes an empty object that belongs to nobody else, of the right size and owner.
fn make_own(object: &SharedObject, id_base: u32) -> io::Result<File> {
    if object.kind.huge_page().is_some_and(|page| !page.is_power_of_two() || page <= PAGE) {
        return Err(io::ErrorKind::InvalidData.into());
    }
    match &object.kind {
        SharedKind::Memfd { name, mode, uid, gid, huge, .. } => {
            let file = File::from(match *huge {
                0 => task::memfd(name)?,
                page => task::memfd_of_huge_pages(name, page)?,
            });
            file.set_len(object.size)?;
            file.set_permissions(Permissions::from_mode(*mode))?;
            let uid = Uid::from_raw(id_base.wrapping_add(*uid));
            let gid = Gid::from_raw(id_base.wrapping_add(*gid));
            fchown(&file, Some(uid), Some(gid))?;
            Ok(file)
        }
        kind => {
            let (len, page) = ((object.size as usize).max(1), kind.huge_page());
            let mapping = match page {
                Some(page) => SharedMapping::of_huge_pages(len, page)?,
                None => SharedMapping::anonymous(len)?,
            };
            let (start, end) = mapping.range();
            let pid = std::process::id() as i32;
            let end = end.next_multiple_of(page.unwrap_or(PAGE));
            let path = procfs::path(pid, &format!("map_files/{start:x}-{end:x}"));
            File::options().read(true).write(true).open(path)
        }
    }
}
