//! The contents of a file in blocks: what has been sent is known by its hashes, so that only
//! blocks that differ are sent again.

use std::{
    collections::BTreeMap,
    io,
    os::fd::{AsFd, BorrowedFd},
};

use ckpt_format::tree::FILE_DATA_MAX;
use nix::{
    errno::Errno,
    sys::uio::pread,
    unistd::{Whence, lseek},
};

/// How much is compared and sent together, in bytes.
pub(super) const BLOCK_SIZE: usize = 128 << 10;

/// Zeros in a new part of a file are left out in pieces of this size.
const PAGE_SIZE: usize = 4096;

/// 16 bytes of BLAKE3 tell any two blocks of a file apart.
type BlockHash = [u8; 16];

/// What the target has of a file's contents.
#[derive(Debug, Default)]
pub(super) struct Blocks {
    size: u64,
    /// The blocks that are not all zeros.
    hashes: BTreeMap<u64, BlockHash>,
}

/// A change of a file's contents.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Change {
    /// The size is now another one.
    Resize(u64),
    /// These bytes are at this offset.
    Data(u64, Vec<u8>),
    /// Zeros at this offset, so many.
    Hole(u64, u64),
}

/// How a comparison ended.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Read {
    /// All was read.
    Whole,
    /// The file became shorter while it was read.
    Cut,
}

/// Why a file was not sent.
pub(super) enum Failure<E> {
    /// It could not be read.
    Read(io::Error),
    /// The change was not taken.
    Emit(E),
}

impl Blocks {
    /// The size of the file on the target, in bytes.
    pub(super) fn size(&self) -> u64 {
        self.size
    }

    /// Compares a file with what the target has and emits what differs.
    pub(super) fn update<E>(
        &mut self,
        file: BorrowedFd<'_>,
        size: u64,
        emit: &mut dyn FnMut(Change) -> Result<(), E>,
    ) -> Result<Read, Failure<E>> {
        if self.size != size {
            emit(Change::Resize(size)).map_err(Failure::Emit)?;
            self.size = size;
        }
        let block = BLOCK_SIZE as u64;
        let count = size.div_ceil(block);
        self.hashes.split_off(&count);
        let mut extents = Extents { file, start: 0, end: 0 };
        let mut run = Run { start: 0, data: Vec::new(), emit };
        let mut buffer = vec![0u8; BLOCK_SIZE];
        let mut read = Read::Whole;
        let mut index = 0;
        while index < count {
            // Neither holes nor their number may cost anything: go where something is or was.
            let data_start = extents.after(index * block, size).map_err(Failure::Read)?;
            let known = self.hashes.range(index..).next().map(|(index, _)| *index);
            index = known.unwrap_or(count).min(data_start / block);
            if index >= count {
                break;
            }
            let start = index * block;
            let length = block.min(size - start);
            let bytes = &mut buffer[..usize::try_from(length).unwrap_or(BLOCK_SIZE)];
            if data_start >= start + length {
                bytes.fill(0);
            } else if fill(file, start, bytes).map_err(Failure::Read)? < bytes.len() {
                read = Read::Cut;
            }
            self.block(index, start, bytes, &mut run)?;
            index += 1;
        }
        run.flush()?;
        Ok(read)
    }

    fn block<E>(
        &mut self,
        index: u64,
        start: u64,
        bytes: &[u8],
        run: &mut Run<'_, E>,
    ) -> Result<(), Failure<E>> {
        if is_zero(bytes) {
            if self.hashes.remove(&index).is_some() {
                run.flush()?;
                (run.emit)(Change::Hole(start, bytes.len() as u64)).map_err(Failure::Emit)?;
            }
            return Ok(());
        }
        let hash = hash(bytes);
        match self.hashes.insert(index, hash) {
            None => run.pages(start, bytes, false),
            Some(old) if old != hash => run.pages(start, bytes, true),
            Some(_) => Ok(()),
        }
    }
}

fn hash(bytes: &[u8]) -> BlockHash {
    let mut short = BlockHash::default();
    short.copy_from_slice(&blake3::hash(bytes).as_bytes()[..16]);
    short
}

fn is_zero(bytes: &[u8]) -> bool {
    bytes.chunks(PAGE_SIZE).all(|page| page.iter().fold(0, |all, byte| all | byte) == 0)
}

/// Reads until the buffer is full or the file ends; the rest of the buffer becomes zeros.
fn fill(file: BorrowedFd<'_>, offset: u64, buffer: &mut [u8]) -> io::Result<usize> {
    let mut done = 0;
    while done < buffer.len() {
        let at = i64::try_from(offset + done as u64).map_err(io::Error::other)?;
        match pread(file, &mut buffer[done..], at) {
            Ok(0) => break,
            Ok(read) => done += read,
            Err(Errno::EINTR) => (),
            Err(errno) => return Err(errno.into()),
        }
    }
    buffer[done..].fill(0);
    Ok(done)
}

/// Where a file has data and where it has holes.
struct Extents<'a> {
    file: BorrowedFd<'a>,
    start: u64,
    end: u64,
}

impl Extents<'_> {
    /// The first byte from `offset` on that may not be zero; `size` when there is none.
    fn after(&mut self, offset: u64, size: u64) -> io::Result<u64> {
        if offset >= self.end {
            let at = i64::try_from(offset).map_err(io::Error::other)?;
            match lseek(self.file.as_fd(), at, Whence::SeekData) {
                Ok(start) => {
                    self.start = start.unsigned_abs();
                    self.end = match lseek(self.file.as_fd(), start, Whence::SeekHole) {
                        Ok(end) => end.unsigned_abs(),
                        // The file ended in between.
                        Err(Errno::ENXIO) => self.start + 1,
                        Err(errno) => return Err(errno.into()),
                    };
                }
                Err(Errno::ENXIO) => (self.start, self.end) = (size, u64::MAX),
                Err(errno) => return Err(errno.into()),
            }
        }
        Ok(self.start.max(offset))
    }
}

/// Neighbouring changes are sent together.
struct Run<'a, E> {
    start: u64,
    data: Vec<u8>,
    emit: &'a mut dyn FnMut(Change) -> Result<(), E>,
}

impl<E> Run<'_, E> {
    fn add(&mut self, offset: u64, bytes: &[u8]) -> Result<(), Failure<E>> {
        let end = self.start + self.data.len() as u64;
        if end != offset || self.data.len() + bytes.len() > FILE_DATA_MAX {
            self.flush()?;
            self.start = offset;
        }
        self.data.extend_from_slice(bytes);
        Ok(())
    }

    /// Adds a block without its pages of zeros, which are made holes where the target may have
    /// something else. So a file never needs more space there than here.
    fn pages(&mut self, offset: u64, bytes: &[u8], holes: bool) -> Result<(), Failure<E>> {
        let mut at = offset;
        for group in
            bytes.chunks(PAGE_SIZE).collect::<Vec<_>>().chunk_by(|a, b| is_zero(a) == is_zero(b))
        {
            let length: usize = group.iter().map(|page| page.len()).sum();
            if !is_zero(group[0]) {
                for page in group {
                    self.add(at, page)?;
                    at += page.len() as u64;
                }
                continue;
            }
            if holes {
                self.flush()?;
                (self.emit)(Change::Hole(at, length as u64)).map_err(Failure::Emit)?;
            }
            at += length as u64;
        }
        Ok(())
    }

    fn flush(&mut self) -> Result<(), Failure<E>> {
        if self.data.is_empty() {
            return Ok(());
        }
        let data = std::mem::take(&mut self.data);
        (self.emit)(Change::Data(self.start, data)).map_err(Failure::Emit)
    }
}

#[cfg(test)]
mod tests {
    use std::{convert::Infallible, fs::File, os::unix::fs::FileExt};

    use proptest::prelude::*;

    use super::*;

    const MIB: usize = 1 << 20;

    fn update(blocks: &mut Blocks, file: &File) -> Vec<Change> {
        let mut changes = Vec::new();
        let size = file.metadata().unwrap().len();
        let emit = &mut |change| {
            changes.push(change);
            Ok::<(), Infallible>(())
        };
        assert!(matches!(blocks.update(file.as_fd(), size, emit), Ok(Read::Whole)));
        changes
    }

    fn apply(copy: &File, changes: &[Change]) {
        for change in changes {
            match change {
                Change::Resize(size) => copy.set_len(*size).unwrap(),
                Change::Data(offset, data) => copy.write_all_at(data, *offset).unwrap(),
                Change::Hole(offset, length) => {
                    let zeros = vec![0; usize::try_from(*length).unwrap()];
                    copy.write_all_at(&zeros, *offset).unwrap();
                }
            }
        }
    }

    fn data(changes: &[Change]) -> usize {
        let length = |change: &Change| match change {
            Change::Data(_, data) => data.len(),
            _ => 0,
        };
        changes.iter().map(length).sum()
    }

    #[test]
    fn only_changed_blocks_of_a_big_file_are_sent_again() {
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(&vec![7; 64 * MIB], 0).unwrap();
        let mut blocks = Blocks::default();
        assert_eq!(data(&update(&mut blocks, &file)), 64 * MIB);
        assert_eq!(update(&mut blocks, &file), []);
        for offset in [0, 5 * MIB as u64 + 17, 64 * MIB as u64 - 1] {
            file.write_all_at(b"x", offset).unwrap();
        }
        assert_eq!(data(&update(&mut blocks, &file)), 3 * BLOCK_SIZE);
    }

    #[test]
    fn holes_are_not_sent_and_made_again() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(1 << 40).unwrap();
        file.write_all_at(b"x", 5000).unwrap();
        let mut blocks = Blocks::default();
        let changes = update(&mut blocks, &file);
        assert_eq!(changes[0], Change::Resize(1 << 40));
        assert_eq!(data(&changes), PAGE_SIZE);
        file.write_all_at(b"\0", 5000).unwrap();
        assert_eq!(update(&mut blocks, &file), [Change::Hole(0, BLOCK_SIZE as u64)]);
    }

    #[test]
    fn records_stay_small() {
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(&vec![1; 3 * MIB + 5], 0).unwrap();
        for change in update(&mut Blocks::default(), &file) {
            assert!(data(&[change]) <= FILE_DATA_MAX);
        }
    }

    #[derive(Clone, Debug)]
    enum Act {
        Write(u64, u8, usize),
        Resize(u64),
        Round,
    }

    fn act() -> impl Strategy<Value = Act> {
        let size = 3 * BLOCK_SIZE as u64;
        prop_oneof![
            (0..size, 0..3u8, 1..200_000usize).prop_map(|(at, byte, n)| Act::Write(at, byte, n)),
            (0..size).prop_map(Act::Resize),
            Just(Act::Round),
        ]
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn the_copy_is_equal_after_any_changes(acts in prop::collection::vec(act(), 1..30)) {
            let (file, copy) = (tempfile::tempfile().unwrap(), tempfile::tempfile().unwrap());
            let mut blocks = Blocks::default();
            for act in acts.into_iter().chain([Act::Round]) {
                match act {
                    Act::Write(at, byte, n) => file.write_all_at(&vec![byte; n], at).unwrap(),
                    Act::Resize(size) => file.set_len(size).unwrap(),
                    Act::Round => {
                        apply(&copy, &update(&mut blocks, &file));
                        let size = usize::try_from(file.metadata().unwrap().len()).unwrap();
                        prop_assert_eq!(copy.metadata().unwrap().len(), size as u64);
                        let (mut left, mut right) = (vec![0; size], vec![0; size]);
                        file.read_exact_at(&mut left, 0).unwrap();
                        copy.read_exact_at(&mut right, 0).unwrap();
                        prop_assert!(left == right);
                    }
                }
            }
        }
    }
}
