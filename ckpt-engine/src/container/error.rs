//! Why a container cannot be made, entered or read.

use std::{io, path::PathBuf};

/// Why a container cannot be made, entered or read.
#[derive(Debug, thiserror::Error)]
pub enum ContainerError {
    /// A step outside the container failed.
    #[error("cannot {step}")]
    Step {
        /// What was to be done.
        step: &'static str,
        /// Why it failed.
        source: io::Error,
    },
    /// A step inside the container failed.
    #[error("cannot {step} inside the container")]
    Inside {
        /// What was to be done.
        step: String,
        /// Why it failed.
        source: io::Error,
    },
    /// A process cannot be put into a cgroup.
    #[error("cannot enter the cgroup {path}")]
    Cgroup {
        /// The cgroup.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A directory of the root's layers cannot be used.
    #[error("cannot use the layer {path}")]
    Layer {
        /// The directory.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The other side of the socket ended early.
    #[error("the process inside ended early")]
    Gone,
    /// The other side of the socket says what it must not say now.
    #[error("the process inside answers out of turn")]
    Foreign,
}

/// For `map_err`: names the step that failed.
pub(super) fn step(step: &'static str) -> impl FnOnce(io::Error) -> ContainerError {
    move |source| ContainerError::Step { step, source }
}
