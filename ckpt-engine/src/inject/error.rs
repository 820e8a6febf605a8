//! What can go wrong with calls in another process.

use std::{borrow::Cow, io};

use serde::{Deserialize, Serialize};

use crate::errno;

/// A thread could not be stopped, or did not do what was asked of it.
#[derive(Debug, thiserror::Error, Serialize, Deserialize)]
pub enum InjectError {
    /// The thread ended meanwhile.
    #[error("thread {tid} has ended")]
    Ended {
        /// The thread, as numbered on the host.
        tid: i32,
    },
    /// The thread did not come to a stop in time: it is in an uninterruptible call.
    #[error("thread {tid} is in an uninterruptible call")]
    Busy {
        /// The thread, as numbered on the host.
        tid: i32,
    },
    /// A debugger, or another engine, holds it.
    #[error("thread {tid} cannot be traced")]
    Attach {
        /// The thread, as numbered on the host.
        tid: i32,
        /// Why.
        #[serde(with = "errno")]
        source: io::Error,
    },
    /// A request of ptrace(2) failed.
    #[error("cannot control thread {tid}")]
    Control {
        /// The thread, as numbered on the host.
        tid: i32,
        /// Why.
        #[serde(with = "errno")]
        source: io::Error,
    },
    /// The thread stopped for another reason than the end of our code.
    #[error("thread {tid} stopped unexpectedly with signal {signal}, event {event}")]
    Unexpected {
        /// The thread, as numbered on the host.
        tid: i32,
        /// The signal of the stop.
        signal: i32,
        /// The ptrace event of the stop.
        event: i32,
    },
    /// The kernel offers no vdso with a `syscall` instruction.
    #[error("no vdso to make system calls through")]
    NoVdso,
    /// A call made in the thread failed.
    #[error("{call} failed in process {tid}")]
    Call {
        /// The name of the system call.
        call: Cow<'static, str>,
        /// The thread, as numbered on the host.
        tid: i32,
        /// The error it got.
        #[serde(with = "errno")]
        source: io::Error,
    },
    /// The process that reaches into the VE's is gone, or does not answer.
    #[error("lost the process that looks into the VE")]
    Surgeon {
        /// Why.
        #[serde(with = "errno")]
        source: io::Error,
    },
}

impl InjectError {
    /// Whether this says nothing but that the process is about to change, as by execve(2): its new
    /// program has its vdso, and so our calls, at another place.
    pub(crate) fn is_of_one_that_changes(&self) -> bool {
        matches!(
            self,
            Self::Ended { .. } | Self::Busy { .. } | Self::Unexpected { .. } | Self::NoVdso
        )
    }

    pub(super) fn control(tid: i32) -> impl FnOnce(io::Error) -> Self {
        move |source| match source.raw_os_error() {
            Some(libc::ESRCH) => Self::Ended { tid },
            _ => Self::Control { tid, source },
        }
    }
}
