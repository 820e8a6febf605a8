//! What can go wrong with a checkpoint file.

use std::{io, path::PathBuf};

use ckpt_format::image::ImageError;

use crate::api::{Failure, chain};

/// Why a checkpoint file could not be written or used.
#[derive(Debug, thiserror::Error)]
pub enum ImageFileError {
    /// The kernel refused something.
    #[error("cannot {act} {}", path.display())]
    File {
        /// What was tried.
        act: &'static str,
        /// On which file.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// It holds something else than a whole checkpoint.
    #[error("{}", path.display())]
    Contents {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        source: ImageError,
    },
    /// The path is that of no file.
    #[error("{} is no path of a file", path.display())]
    Path {
        /// The path.
        path: PathBuf,
    },
    /// The writer has failed before and told why then.
    #[error("the checkpoint has already failed to be written")]
    Stopped,
}

impl ImageFileError {
    /// The stable word for it.
    pub(crate) fn code(&self) -> &'static str {
        match self {
            Self::File { source, .. } if is_full(source) => "no-space",
            Self::File { .. } | Self::Stopped => "system",
            Self::Contents { source: ImageError::Foreign, .. } => "no-checkpoint",
            Self::Contents { source: ImageError::Newer { .. }, .. } => "newer-checkpoint",
            Self::Contents { .. } => "damaged-checkpoint",
            Self::Path { .. } => "bad-value",
        }
    }

    fn hint(&self) -> Option<&'static str> {
        Some(match self {
            Self::File { source, .. } if is_full(source) => {
                "make room there, or give another place with --dumpfile"
            }
            Self::Contents { source: ImageError::Newer { .. }, .. } => {
                "restore it with the version that wrote it, or a later one"
            }
            Self::Contents {
                source: ImageError::Damaged { .. } | ImageError::Short { .. },
                ..
            } => "nothing can be restored from it; take it from a backup",
            _ => return None,
        })
    }
}

/// Whether there is no room.
fn is_full(source: &io::Error) -> bool {
    matches!(source.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
}

impl From<ImageFileError> for Failure {
    /// As `vzckpt` tells it.
    fn from(error: ImageFileError) -> Self {
        let exit = match &error {
            ImageFileError::Contents { .. } => 17,
            ImageFileError::Path { .. } => 21,
            ImageFileError::File { source, .. } if is_full(source) => 46,
            ImageFileError::File { .. } | ImageFileError::Stopped => 3,
        };
        let failure = Self::new(error.code(), exit, chain(&error));
        match error.hint() {
            Some(hint) => failure.with_hint(hint),
            None => failure,
        }
    }
}
