//! Why a round could not be done.

use std::{io, path::PathBuf};

use crate::{inject::InjectError, procfs::ProcError};

/// Why a round could not be done.
#[derive(Debug, thiserror::Error)]
pub enum TrackError {
    /// The VE's processes could not be listed.
    #[error("cannot list the processes in {}", cgroup.display())]
    List {
        /// The VE's cgroup.
        cgroup: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The VE has no init any more.
    #[error("the VE has ended")]
    Ended,
    /// A file of `/proc` was not readable.
    #[error(transparent)]
    Proc(#[from] ProcError),
    /// A process could not be told to start tracking.
    #[error("cannot track process {pid}")]
    Arm {
        /// The process, as numbered in the VE.
        pid: i32,
        /// Why.
        source: InjectError,
    },
    /// The memory of a process could not be scanned or read.
    #[error("cannot read the memory of process {pid}")]
    Memory {
        /// The process, as numbered in the VE.
        pid: i32,
        /// Why.
        source: io::Error,
    },
    /// The process has the memory of its parent, which waits for it: it is about to execute a
    /// program.
    #[error("process {pid} is about to execute a program")]
    Borrowed {
        /// The process, as numbered in the VE.
        pid: i32,
    },
    /// A shared object could not be read.
    #[error("cannot read shared memory object {object}")]
    Shared {
        /// The object.
        object: u64,
        /// Why.
        source: io::Error,
    },
    /// The process has made a namespace since the VE was looked at.
    #[error("process {pid} has made a namespace of its own just now")]
    Unshared {
        /// The process, as numbered in the VE.
        pid: i32,
    },
    /// The process has got memory that cannot be moved since the VE was looked at.
    #[error("process {pid} has {what} now")]
    Unsupported {
        /// The process, as numbered in the VE.
        pid: i32,
        /// What it has.
        what: &'static str,
    },
    /// A process has left the IPC namespace in which it has attached a segment.
    #[error("System V segment {number} is attached outside of its IPC namespace; end that program")]
    Elsewhere {
        /// The number of the segment.
        number: u64,
    },
    /// Nobody takes the records any more.
    #[error("the receiver of the memory stream is gone")]
    Sink,
}

impl TrackError {
    /// True for what a running VE may cause at any moment by ending or executing a program.
    pub(super) fn is_transient(&self) -> bool {
        match self {
            Self::Proc(error) => error.is_gone(),
            Self::Memory { source, .. } => source.raw_os_error() == Some(libc::ESRCH),
            _ => false,
        }
    }
}
