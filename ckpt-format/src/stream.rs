//! What flows from the engine on the source to the engine on the target.

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use crate::{
    memory::{Area, Run, Space},
    process::Layout,
};

/// The most page data in one record, in bytes. A larger one is refused.
pub const PAGE_DATA_MAX: usize = 1 << 20;

/// The most areas in one record.
pub const AREAS_MAX: usize = 4096;

/// One step of building the memory of a VE. The order matters and is kept.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Record {
    /// The processes as they are now.
    Layout(Layout),
    /// The areas of a process of the last layout, when they are others than before.
    Areas {
        /// The process.
        pid: i32,
        /// The next of its areas in ascending order.
        areas: Vec<Area>,
        /// Whether these are the last.
        complete: bool,
    },
    /// Contents of pages, in the order of `runs`.
    Pages {
        /// Whose pages.
        space: Space,
        /// Which pages.
        runs: Vec<Run>,
        /// Their contents, as long as all runs together.
        data: Bytes,
    },
    /// These pages hold zeros, or what their file holds: whatever was sent for them is void.
    Drop {
        /// Whose pages.
        space: Space,
        /// Which pages.
        runs: Vec<Run>,
    },
    /// The guard regions (`MADV_GUARD_INSTALL`) of a process, all of them: what was said before
    /// is void.
    Guards {
        /// The process.
        pid: i32,
        /// Which pages.
        runs: Vec<Run>,
    },
    /// Pages whose contents the target has at other places already. What stands there before this
    /// record counts, also where the record itself writes.
    Same {
        /// Whose pages.
        space: Space,
        /// Which pages.
        runs: Vec<Run>,
        /// Where their contents are, in the order of `runs`.
        origins: Vec<Origin>,
        /// The key of `hashes`.
        key: PageKey,
        /// What the contents are, page by page.
        hashes: Vec<PageHash>,
    },
}

/// Private pages of a process that have contents which others are to have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Origin {
    /// The process.
    pub pid: i32,
    /// Which pages.
    pub run: Run,
}

/// Chosen at random for each move, and never seen by the VE: so no program in it can look for two
/// pages with the same hash.
pub type PageKey = [u8; 32];

/// Half of the keyed BLAKE3 hash of a page.
pub type PageHash = [u8; 16];

/// The hash of the contents of a page.
pub fn page_hash(key: &PageKey, page: &[u8]) -> PageHash {
    let hash = blake3::keyed_hash(key, page);
    hash.as_bytes().first_chunk().copied().unwrap_or_default()
}
