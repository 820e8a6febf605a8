//! Post-copy on the target: a VE runs while pages of it are still on the source.
//!
//! A thread that touches a missing page waits in the kernel (userfaultfd) until the page is put in
//! place. Who does that, and knows what is missing, is a *keeper*: a process of its own, because
//! when the last copy of a userfaultfd is closed the missing pages read as zeros, and a daemon may
//! die at any moment. A daemon talks to the keeper through a [`Client`] and carries pages from the
//! source to it; while there is none, threads wait. [`serve`] is the keeper's whole life.
//!
//! The keeper follows what programs do with memory that is still to come: fork(2) (the child
//! misses the same pages), mremap(2), munmap(2), madvise(2). A page of such memory that never had
//! contents on the source gets zeros at once. What it cannot follow is a guard
//! (`MADV_GUARD_INSTALL`) that a program puts over missing pages and takes away before they came:
//! the kernel does not tell of it, and the old contents come back in place of zeros.

mod client;
mod keeper;
mod pieces;
mod serve;
#[cfg(test)]
mod tests;

use bytes::Bytes;
use ckpt_format::memory::Run;
use serde::{Deserialize, Serialize};

pub use self::{
    client::{Client, Receiver},
    serve::serve,
};

/// The most page data in one message, in bytes.
pub const DATA_MAX: u64 = 256 << 10;

/// From the daemon to the keeper.
#[derive(Clone, Debug, Serialize, Deserialize)]
enum ToKeeper {
    /// A process misses these pages, to be fetched in this order. Its userfaultfd comes beside it.
    Add { pid: i32, runs: Vec<Run> },
    /// Begin to ask for pages, or begin anew: what was asked for before and has not come is lost.
    Begin,
    /// Pages of the process that had this number on the source. Without data they are zeros.
    Pages { pid: i32, runs: Vec<Run>, data: Bytes },
    /// The daemon has closed its userfaultfds.
    Bye,
}

/// From the keeper to the daemon.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum FromKeeper {
    /// The process was taken over.
    Added,
    /// These pages of the process that had this number on the source, as soon as possible.
    Want {
        /// The process.
        pid: i32,
        /// Which pages.
        run: Run,
        /// Somebody waits for them.
        urgent: bool,
    },
    /// An address space misses pages. Its userfaultfd comes beside the word, to be held as well, so
    /// that nothing reads as zeros should the keeper die.
    Held {
        /// Which one.
        id: u64,
    },
    /// That one is gone: its userfaultfd can be closed.
    Gone {
        /// Which one.
        id: u64,
    },
    /// How much is still to come, and how often somebody had to wait so far.
    Left {
        /// In bytes.
        bytes: u64,
        /// Waits.
        faults: u64,
    },
    /// Everything is in place. The keeper ends when the daemon has closed its userfaultfds.
    Complete {
        /// How often somebody had to wait.
        faults: u64,
    },
}
