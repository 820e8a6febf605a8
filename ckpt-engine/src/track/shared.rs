//! Shared anonymous memory and memfds, compared by content.
//!
//! Any process with a mapping or a descriptor can write them, also by write(2) and through
//! mappings that were made and removed between two rounds, so no tracking of page tables is
//! proof that a part is clean. Blocks are hashed, and sent when their hash has changed.

use std::{collections::HashMap, fs::File, io, os::linux::fs::MetadataExt, os::unix::fs::FileExt};

use ckpt_format::memory::{PAGE, Run, SharedObject, Space};
use nix::unistd::{Whence, lseek};

use super::{Output, Sink, TrackError};
use crate::areas::open_shared;

/// The unit of comparison, in bytes.
const BLOCK: u64 = 64 << 10;

/// A shared object under tracking.
#[derive(Debug)]
pub(super) struct TrackedObject {
    file: File,
    object: SharedObject,
    /// The hash of each block that the target has; a block of zeros has none.
    hashes: HashMap<u64, blake3::Hash>,
}

impl TrackedObject {
    pub(super) fn open(
        host: i32,
        range: (u64, u64),
        id: u64,
        id_base: u32,
        ipc: u32,
    ) -> io::Result<Self> {
        let (file, object) = open_shared(host, range, id, id_base, ipc)?;
        Ok(Self::new(file, object))
    }

    /// For an object that is open already.
    pub(super) fn new(file: File, object: SharedObject) -> Self {
        Self { file, object, hashes: HashMap::new() }
    }

    /// The object with its present size.
    pub(super) fn describe(&mut self) -> Result<SharedObject, TrackError> {
        let object = self.object.id;
        let metadata =
            self.file.metadata().map_err(|source| TrackError::Shared { object, source })?;
        self.object.size = metadata.st_size();
        Ok(self.object.clone())
    }

    /// Sends the blocks whose content has changed.
    pub(super) fn send_changes<S: Sink>(
        &mut self,
        output: &mut Output<'_, S>,
    ) -> Result<(), TrackError> {
        let id = self.object.id;
        let failed = |source| TrackError::Shared { object: id, source };
        let space = Space::Shared(id);
        let mut seen = HashMap::new();
        let mut next = 0;
        while let Some((start, end)) = self.next_data(next).map_err(failed)? {
            for at in (start / BLOCK * BLOCK..end).step_by(BLOCK as usize) {
                if seen.contains_key(&at) {
                    continue;
                }
                let len = BLOCK.min(self.object.size.next_multiple_of(PAGE) - at);
                let mut data = vec![0u8; len as usize];
                self.read(at, &mut data).map_err(failed)?;
                let hash = blake3::hash(&data);
                if self.hashes.get(&at) != Some(&hash) {
                    let run = Run { start: at, pages: len / PAGE };
                    output.pages(space, &[run], data, |_| true)?;
                }
                seen.insert(at, hash);
            }
            next = end;
        }
        let vanished = self.hashes.keys().filter(|at| !seen.contains_key(at));
        let runs = vanished.map(|&start| Run { start, pages: BLOCK / PAGE }).collect();
        output.drop_runs(space, runs)?;
        self.hashes = seen;
        Ok(())
    }

    /// The next stretch that is not a hole.
    fn next_data(&self, from: u64) -> io::Result<Option<(u64, u64)>> {
        if from >= self.object.size {
            return Ok(None);
        }
        let start = match lseek(&self.file, from as i64, Whence::SeekData) {
            Err(nix::errno::Errno::ENXIO) => return Ok(None),
            other => other?,
        };
        let end = lseek(&self.file, start, Whence::SeekHole)?;
        Ok(Some((start as u64, (end as u64).min(self.object.size))))
    }

    /// Reads what there is; the rest of the last page stays zero.
    fn read(&self, offset: u64, mut data: &mut [u8]) -> io::Result<()> {
        let mut at = offset;
        while !data.is_empty() {
            match self.file.read_at(data, at)? {
                0 => break,
                count => {
                    data = &mut data[count..];
                    at += count as u64;
                }
            }
        }
        Ok(())
    }
}
