//! What the daemon and a process that it started inside a container say to each other.

use std::{
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

use ckpt_format::{
    codec,
    container::{Clocks, Container as Plan},
};
use serde::{Deserialize, Serialize, de::DeserializeOwned};

use super::{
    bench::Job,
    error::{ContainerError, step},
};
use crate::sys::ancillary;

/// The most descriptors beside one message; the kernel's own limit is 253.
pub(super) const DESCRIPTORS_MAX: usize = 250;

/// The longest message, in bytes: a plan with some hundred mounts fits easily.
const MESSAGE_MAX: usize = 160 << 10;

/// From the daemon.
#[derive(Debug, Serialize, Deserialize)]
pub(super) enum Order {
    /// Make a container; its channel comes beside it.
    Create { plan: Box<Plan>, links: Vec<(String, String)>, clock_offsets: Option<Clocks> },
    /// The ids are mapped; the root comes beside it, and the device nodes that are not the host's.
    Mapped,
    /// Become this program, as the container's init.
    Init { arguments: Vec<String>, environment: Vec<(String, String)> },
    /// Make an overlay. A mount namespace of the container comes beside it.
    Overlay(Box<Job>),
    /// Join a container, whose pid 1 comes beside it, and run a program there on the three
    /// descriptors that follow.
    Enter {
        arguments: Vec<String>,
        environment: Vec<(String, String)>,
        directory: String,
        terminal: bool,
    },
}

/// To the daemon.
#[derive(Debug, Serialize, Deserialize)]
pub(super) enum Reply {
    /// The seed has its own user namespace now, without a map.
    Unshared,
    /// The process that matters exists; its pidfd comes beside it.
    Born { pid: i32 },
    /// pid 1 has made everything, and these come beside this: part of what [`Self::Ready`] counts.
    /// Or the seed has made an overlay.
    Descriptors,
    /// pid 1 has made everything. It has sent so many trees before, and so many namespaces of
    /// each kind, in this order, and what mounts that have to wait need.
    Ready { trees: usize, nested: [usize; 5], late: usize },
    /// Nothing of what pid 1 has inherited is open in it any more. Comes by the channel.
    Alone,
    /// It did not work.
    Failed { step: String, errno: i32 },
}

impl Reply {
    pub(super) fn failed(step: impl Into<String>, source: &io::Error) -> Self {
        Self::Failed { step: step.into(), errno: source.raw_os_error().unwrap_or(libc::EINVAL) }
    }

    /// What a reply means where another was due.
    pub(super) fn into_error(self, _due: &'static str) -> ContainerError {
        match self {
            Self::Failed { step, errno } => {
                ContainerError::Inside { step, source: io::Error::from_raw_os_error(errno) }
            }
            _ => ContainerError::Foreign,
        }
    }
}

/// A socket that keeps the bounds of messages (`SOCK_SEQPACKET`).
#[derive(Debug)]
pub(super) struct Socket(OwnedFd);

impl Socket {
    pub(super) fn new(socket: OwnedFd) -> Self {
        Self(socket)
    }

    pub(super) fn send(
        &self,
        message: &impl Serialize,
        descriptors: &[BorrowedFd<'_>],
    ) -> Result<(), ContainerError> {
        let bytes = codec::encode(message);
        match ancillary::send(self.0.as_fd(), &bytes, descriptors) {
            Ok(_) => Ok(()),
            Err(source) if source.kind() == io::ErrorKind::BrokenPipe => Err(ContainerError::Gone),
            Err(source) => Err(step("send to the container")(source)),
        }
    }

    pub(super) fn receive<T: DeserializeOwned>(&self) -> Result<(T, Vec<OwnedFd>), ContainerError> {
        let mut buffer = vec![0; MESSAGE_MAX];
        let (length, descriptors) = loop {
            match ancillary::receive(self.0.as_fd(), &mut buffer, DESCRIPTORS_MAX) {
                Err(source) if source.kind() == io::ErrorKind::Interrupted => (),
                Err(source) if source.kind() == io::ErrorKind::ConnectionReset => {
                    return Err(ContainerError::Gone);
                }
                other => break other.map_err(step("hear from the container"))?,
            }
        };
        if length == 0 {
            return Err(ContainerError::Gone);
        }
        let message = codec::decode(&buffer[..length]).map_err(|_| ContainerError::Foreign)?;
        Ok((message, descriptors))
    }
}
