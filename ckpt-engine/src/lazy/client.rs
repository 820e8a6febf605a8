//! The daemon's end of the socket to a keeper.

use std::{
    io,
    os::{
        fd::{AsFd, OwnedFd},
        unix::net::UnixStream,
    },
};

use bytes::Bytes;
use ckpt_format::memory::Run;

use super::{FromKeeper, ToKeeper};
use crate::message::{receive, send};

/// Tells a keeper. All calls block.
#[derive(Debug)]
pub struct Client(UnixStream);

/// Hears a keeper.
#[derive(Debug)]
pub struct Receiver(UnixStream);

impl Client {
    /// With the keeper at the other end of this socket.
    pub fn new(socket: UnixStream) -> Self {
        Self(socket)
    }

    /// What the keeper says, to be read beside what it is told.
    pub fn receiver(&self) -> io::Result<Receiver> {
        self.0.try_clone().map(Receiver)
    }

    /// Ends the conversation, also for a receiver that waits.
    pub fn close(&self) -> io::Result<()> {
        self.0.shutdown(std::net::Shutdown::Both)
    }

    /// Hands over a process that misses pages, and waits until the keeper has taken it.
    pub fn add(&mut self, pid: i32, runs: Vec<Run>, faults: &OwnedFd) -> io::Result<()> {
        send(&mut self.0, &ToKeeper::Add { pid, runs }, Some(faults.as_fd()))?;
        loop {
            match receive::<FromKeeper>(&mut self.0)? {
                Some((FromKeeper::Added, _)) => return Ok(()),
                Some((FromKeeper::Left { .. }, _)) => {}
                Some(_) => return Err(io::ErrorKind::InvalidData.into()),
                None => return Err(io::ErrorKind::UnexpectedEof.into()),
            }
        }
    }

    /// The source listens now: the keeper asks for everything that is missing.
    pub fn begin(&mut self) -> io::Result<()> {
        send(&mut self.0, &ToKeeper::Begin, None)
    }

    /// Pages have come; without data they are zeros.
    pub fn pages(&mut self, pid: i32, runs: Vec<Run>, data: Bytes) -> io::Result<()> {
        send(&mut self.0, &ToKeeper::Pages { pid, runs, data }, None)
    }

    /// All copies of the userfaultfds here are closed; the keeper may end.
    pub fn bye(&mut self) -> io::Result<()> {
        send(&mut self.0, &ToKeeper::Bye, None)
    }
}

impl Receiver {
    /// The next word of the keeper, with the userfaultfd that may come beside it; none when it has
    /// ended.
    pub fn hear(&mut self) -> io::Result<Option<(FromKeeper, Option<OwnedFd>)>> {
        match receive(&mut self.0) {
            Ok(message) => Ok(message),
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => Ok(None),
            Err(error) => Err(error),
        }
    }
}
