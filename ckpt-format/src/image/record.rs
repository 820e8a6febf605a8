//! The record stream of a checkpoint: in which order the VE is built.

use serde::{Deserialize, Serialize};

use super::ImageError;
use crate::{
    memory::{PAGE, Run, Space},
    state::State,
    stream::{self, PAGE_DATA_MAX},
    tree::{FILE_DATA_MAX, FileRecord, Step, Timestamp},
};

/// One step. They must be taken in order.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum Record {
    /// The processes and their areas as they are from here on, and whatever else there is to say
    /// of memory but its contents.
    Memory(stream::Record),
    /// Contents of pages, in the order of `runs`.
    Pages {
        /// Whose pages.
        space: Space,
        /// Which pages.
        runs: Vec<Run>,
        /// Their contents, as long as all runs together.
        data: Vec<Piece>,
    },
    /// A change of a file tree, other than contents.
    File(FileRecord),
    /// Contents of a file.
    FileData {
        /// Which tree.
        tree: u32,
        /// The file.
        #[serde(with = "serde_bytes")]
        path: Vec<u8>,
        /// Where the part begins, in bytes.
        offset: u64,
        /// What it holds.
        data: Vec<Piece>,
    },
    /// A file of the VE's own as it was at the freeze. They come in the order of their paths.
    Own(OwnFile),
    /// Everything else. There is one.
    State(Box<State>),
    /// Nothing follows.
    End,
}

/// A piece of contents: the number of its data chunk, the place in it, and the length in bytes.
/// Chunks are numbered from 1 in the order of the table; number 0 stands for zeros. The chunk comes
/// before the one with the end of the record.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Piece(pub u64, pub u32, pub u32);

/// A file of the VE's own, as far as a change of it would show.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct OwnFile {
    /// Its path from the top, without a leading `/`.
    #[serde(with = "serde_bytes")]
    pub path: Vec<u8>,
    /// Type and permissions.
    pub mode: u32,
    /// The user.
    pub uid: u32,
    /// The group.
    pub gid: u32,
    /// The number of a device.
    pub device: u64,
    /// For a regular file or a symbolic link: its size, when its contents were changed last, and
    /// when anything of it was. What else there is changes when the VE is restored.
    pub contents: Option<Contents>,
}

/// What shows a change of a file's contents.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Contents {
    /// Its size in bytes.
    pub size: u64,
    /// When its contents were changed last.
    pub modified: Timestamp,
    /// When anything of it was changed last.
    pub changed: Timestamp,
}

impl Record {
    /// Checks what can be told from the record alone. `before` is the number of the chunk in which
    /// it ends.
    pub fn check(&self, before: u64) -> Result<(), ImageError> {
        let refuse = |what: &str| Err(ImageError::damaged(format!("a record with {what}")));
        let (data, expected, limit) = match self {
            Self::Pages { runs, data, .. } => match pages_of(runs) {
                Some(pages) => (data, Some(pages), PAGE_DATA_MAX),
                None => return refuse("impossible pages"),
            },
            Self::Memory(stream::Record::Drop { runs, .. }) if pages_of(runs).is_none() => {
                return refuse("impossible pages");
            }
            Self::Memory(stream::Record::Pages { .. } | stream::Record::Same { .. })
            | Self::File(FileRecord { step: Step::Data { .. }, .. }) => {
                return refuse("contents in place of a reference");
            }
            Self::FileData { data, offset, .. } => {
                if offset.checked_add(FILE_DATA_MAX as u64).is_none() {
                    return refuse("an impossible place in a file");
                }
                (data, None, FILE_DATA_MAX)
            }
            _ => return Ok(()),
        };
        let mut length = 0u64;
        for &Piece(chunk, _, bytes) in data {
            if chunk >= before || bytes == 0 {
                return refuse("a reference to a chunk that is not there yet");
            }
            length += u64::from(bytes);
        }
        if length > limit as u64 || expected.is_some_and(|expected| length != expected) {
            return refuse("contents of another length than announced");
        }
        Ok(())
    }
}

/// How many bytes runs cover; `None` if a run cannot be.
fn pages_of(runs: &[Run]) -> Option<u64> {
    runs.iter().try_fold(0u64, |sum, run| {
        let bytes = run.pages.checked_mul(PAGE)?;
        run.start.checked_add(bytes)?;
        (run.pages > 0 && run.start % PAGE == 0).then_some(())?;
        sum.checked_add(bytes)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pages(runs: Vec<Run>, data: Vec<Piece>) -> Record {
        Record::Pages { space: Space::Process(1), runs, data }
    }

    #[test]
    fn references_are_checked() {
        let run = |start, pages| Run { start, pages };
        let good = pages(vec![run(4096, 2)], vec![Piece(1, 0, 4096), Piece(0, 0, 4096)]);
        assert!(good.check(2).is_ok());
        assert!(good.check(1).is_err());
        for bad in [
            pages(vec![run(4096, 2)], vec![Piece(1, 0, 4096)]),
            pages(vec![run(4095, 1)], vec![Piece(1, 0, 4096)]),
            pages(vec![run(4096, u64::MAX / 4096)], vec![Piece(1, 0, 4096)]),
            pages(vec![run(4096, 0)], vec![Piece(1, 0, 0)]),
            pages(vec![run(0, 257)], vec![Piece(0, 0, 257 * 4096)]),
        ] {
            assert!(bad.check(9).is_err(), "{bad:?}");
        }
    }
}
