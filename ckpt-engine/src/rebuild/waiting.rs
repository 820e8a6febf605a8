//! Files that are seen only when all files of the VE are there, because an overlay shows them:
//! until then other memory holds the places of their maps, and takes their pages.

use std::{fs::File, io, os::unix::fs::FileExt};

use ckpt_format::memory::{Advice, Area, Backing, SharedKind};

use super::{Bone, RebuildError, Skeleton, areas::Work, pages::SharedTarget};
use crate::sys::pagemap::{self, Query, category};

/// The most bytes copied at once.
const PIECE: usize = 1 << 20;

impl Skeleton {
    /// Whether the file behind an area of a process cannot be seen yet.
    pub(super) fn waits(&self, bone: &Bone, area: &Area) -> bool {
        match &area.backing {
            Backing::File { path, .. } => {
                let namespace = bone.namespaces.map(|namespaces| namespaces.mounts);
                self.nested.waiting.holds(namespace, path)
            }
            Backing::Shared { object } => {
                let shared = self.shared(*object);
                shared.is_ok_and(|shared| self.lost_its_name_late(&shared.object.kind))
            }
            _ => false,
        }
    }

    /// Whether a file without a name belongs to a file system that is not there yet.
    pub(super) fn lost_its_name_late(&self, kind: &SharedKind) -> bool {
        let SharedKind::Deleted { path, .. } = kind else { return false };
        self.nested.waiting.holds(Some(0), &String::from_utf8_lossy(path))
    }

    /// Maps what could not be mapped before. To be called when all that waits is mounted.
    pub(super) fn map_waiting(&mut self) -> Result<(), RebuildError> {
        let mut areas: Vec<(i32, Area)> = Vec::new();
        for bone in self.processes.values() {
            let waiting = bone.areas.iter().filter(|area| self.waits(bone, area));
            areas.extend(waiting.map(|area| (bone.pid, area.clone())));
        }
        let unnamed = self.shared.iter().filter(|(_, it)| self.lost_its_name_late(&it.object.kind));
        let unnamed: Vec<u64> = unnamed.map(|(&id, _)| id).collect();
        self.nested.waiting = Default::default();
        for object in unnamed {
            let failed = |source| RebuildError::Shared { object, source };
            let shared = self.shared(object)?;
            let file = self.make_shared(&shared.object).map_err(failed)?;
            copy(&shared.file, &file).map_err(failed)?;
            let object_kept = shared.object.clone();
            self.shared.insert(object, SharedTarget { file, object: object_kept });
        }
        areas.iter().try_for_each(|(pid, area)| self.map_anew(*pid, area))
    }

    /// Maps an area in place of the memory that has held its place.
    fn map_anew(&self, pid: i32, area: &Area) -> Result<(), RebuildError> {
        let bone = self.bone(pid)?;
        let outside = |source| RebuildError::Outside { pid, what: "map its files", source };
        let pages = if area.shared { Vec::new() } else { bone.pages_of(area).map_err(outside)? };
        let mut work = Work::new(self, bone);
        work.unmap(area.start, area.end);
        work.map(area, area.start, area.end)?;
        work.advise(area.advice, Advice::default(), area.start, area.end);
        work.flush()?;
        for (start, bytes) in pages {
            bone.memory.write_all_at(&bytes, start).map_err(outside)?;
        }
        Ok(())
    }
}

impl Bone {
    /// All that has been written into the memory that holds the place of an area.
    fn pages_of(&self, area: &Area) -> io::Result<Vec<(u64, Vec<u8>)>> {
        let pagemap = File::open(format!("/proc/{}/pagemap", self.thread.tid))?;
        let query = Query {
            any_of: category::PRESENT | category::SWAPPED,
            inverted: category::ZERO,
            ..Query::default()
        };
        let mut runs = Vec::new();
        pagemap::scan(&pagemap, area.start, area.end, query, |start, end| runs.push((start, end)))?;
        let read = |(start, end): (u64, u64)| {
            let mut bytes = vec![0; usize::try_from(end - start).map_err(io::Error::other)?];
            self.memory.read_exact_at(&mut bytes, start)?;
            Ok((start, bytes))
        };
        runs.into_iter().map(read).collect()
    }
}

/// Copies what a file holds into another one of the same size.
fn copy(from: &File, to: &File) -> io::Result<()> {
    let mut buffer = vec![0; PIECE];
    let mut offset = 0;
    loop {
        let count = from.read_at(&mut buffer, offset)?;
        if count == 0 {
            return Ok(());
        }
        let bytes = &buffer[..count];
        if bytes.iter().any(|&byte| byte != 0) {
            to.write_all_at(bytes, offset)?;
        }
        offset += count as u64;
    }
}
