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
}
