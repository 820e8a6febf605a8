//! What can go wrong with the files of a VE.

use std::io;

use nix::errno::Errno;

/// Why the files of a VE could not be read, or made.
#[derive(Debug, thiserror::Error)]
pub enum TreeError {
    /// The kernel refused something.
    #[error("cannot {action} {path}")]
    File {
        /// What was tried.
        action: &'static str,
        /// On which file of the VE.
        path: String,
        /// What the kernel said.
        source: io::Error,
    },
    /// There is no room for the VE's files here.
    #[error("no space left for {path}")]
    Full {
        /// The file that was being written.
        path: String,
        /// What the kernel said.
        source: io::Error,
    },
    /// A record asks for something that no source sends.
    #[error("refused a record about {path}: {reason}")]
    Refused {
        /// The file it is about.
        path: String,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// The VE has a file that cannot be made elsewhere.
    #[error("{path} is {what}")]
    Unsupported {
        /// The file.
        path: String,
        /// What about it.
        what: &'static str,
    },
    /// A file changed although the VE stands still.
    #[error("{path} changed while the VE was frozen")]
    Unsteady {
        /// The file.
        path: String,
    },
    /// Files in memory cannot be reached: the mounts around them have just changed.
    #[error("the files in memory at {point} cannot be reached")]
    Hidden {
        /// Where it is mounted, or would be.
        point: String,
    },
    /// Whoever takes the records takes no more.
    #[error("the records are no longer wanted")]
    Closed,
    /// The applier has failed before and told why then.
    #[error("the files have already failed to be made")]
    Stopped,
}

/// Whoever takes the records takes no more.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the records are no longer wanted")]
pub struct SinkClosed;

impl From<SinkClosed> for TreeError {
    fn from(_: SinkClosed) -> Self {
        Self::Closed
    }
}

/// Says what was tried on which file when the kernel refused it.
pub(super) fn at<E: Into<io::Error>>(
    action: &'static str,
    path: &[u8],
) -> impl FnOnce(E) -> TreeError {
    let path = show(path);
    move |source| {
        let source = source.into();
        match source.raw_os_error() {
            Some(libc::ENOSPC | libc::EDQUOT) => TreeError::Full { path, source },
            _ => TreeError::File { action, path, source },
        }
    }
}

/// A path as messages show it.
pub(super) fn show(path: &[u8]) -> String {
    /// Enough to find the file.
    const LENGTH_MAX: usize = 512;
    let shown = &path[..path.len().min(LENGTH_MAX)];
    let rest = if shown.len() < path.len() { "…" } else { "" };
    format!("/{}{rest}", shown.escape_ascii())
}

/// Whether a failed call means that the file has gone, or has become something else.
pub(super) fn has_gone(errno: Errno) -> bool {
    matches!(
        errno,
        Errno::ENOENT | Errno::ENOTDIR | Errno::ELOOP | Errno::ESTALE | Errno::ENXIO | Errno::EXDEV
    )
}
