//! The client's end of the API socket. Blocking, because the vz programs do one thing.

use std::{
    io::{self, BufRead},
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::net::UnixStream,
    },
    path::{Path, PathBuf},
};

use ckpt_engine::sys::ancillary;
use serde::de::DeserializeOwned;

use super::{Event, Failure, Request, wire::DESCRIPTORS_MAX};

/// A connection for one request.
#[derive(Debug)]
pub struct Client {
    stream: UnixStream,
}

impl Client {
    /// The socket that the vz programs use when told nothing else: `$VZD_SOCKET`, or the
    /// daemon's default.
    pub fn default_socket() -> PathBuf {
        std::env::var_os("VZD_SOCKET").map_or_else(|| "/run/vz/vzd.sock".into(), PathBuf::from)
    }

    /// Connects to a daemon.
    pub fn connect(socket: &Path) -> Result<Self, Failure> {
        let stream = UnixStream::connect(socket).map_err(|source| {
            let message = format!("cannot reach the daemon at {}: {source}", socket.display());
            Failure::new("daemon-unreachable", 3, message).with_hint(match source.kind() {
                io::ErrorKind::PermissionDenied => "only root may use it",
                _ => "is vzd running?",
            })
        })?;
        Ok(Self { stream })
    }

    /// A handle that asks for the request to be given up. Its end is still waited for.
    pub fn canceller(&self) -> io::Result<Canceller> {
        Ok(Canceller(self.stream.try_clone()?))
    }

    /// Sends a request and waits for its end. Every event before the end goes to `on_event`,
    /// with the descriptor that came beside it.
    pub fn call<T: DeserializeOwned>(
        self,
        request: &Request,
        descriptors: &[BorrowedFd<'_>],
        on_event: &mut dyn FnMut(Event, Option<OwnedFd>),
    ) -> Result<T, Failure> {
        let mut line = serde_json::to_vec(request).expect("a request is plain data");
        line.push(b'\n');
        let lost = |source: io::Error| {
            Failure::new("daemon-lost", 3, format!("lost the daemon: {source}"))
                .with_hint("ask for the state before trying again")
        };
        ancillary::send_all(self.stream.as_fd(), &line, descriptors).map_err(lost)?;
        let mut reader =
            Reader { stream: self.stream, buffer: Vec::new(), descriptors: Vec::new() };
        loop {
            let Some(line) = reader.line().map_err(lost)? else {
                return Err(lost(io::ErrorKind::UnexpectedEof.into()));
            };
            let foreign = |_| Failure::new("daemon-foreign", 3, "the daemon speaks otherwise");
            match serde_json::from_slice(&line).map_err(foreign)? {
                Event::Result(value) => return serde_json::from_value(value).map_err(foreign),
                Event::Error(failure) => return Err(failure),
                Event::Terminal => on_event(Event::Terminal, reader.descriptors.pop()),
                event => on_event(event, None),
            }
        }
    }

    /// [`Client::call`] for a request that sends no descriptors and whose events do not matter.
    pub fn ask<T: DeserializeOwned>(self, request: &Request) -> Result<T, Failure> {
        self.call(request, &[], &mut |_, _| ())
    }
}

/// Gives a request up that another thread waits for.
#[derive(Debug)]
pub struct Canceller(UnixStream);

impl Canceller {
    /// Tells the daemon.
    pub fn cancel(&self) -> io::Result<()> {
        self.0.shutdown(std::net::Shutdown::Write)
    }
}

struct Reader {
    stream: UnixStream,
    buffer: Vec<u8>,
    descriptors: Vec<OwnedFd>,
}

impl Reader {
    fn line(&mut self) -> io::Result<Option<Vec<u8>>> {
        loop {
            let mut line = Vec::new();
            let used = self.buffer.as_slice().read_until(b'\n', &mut line)?;
            if line.ends_with(b"\n") {
                self.buffer.drain(..used);
                return Ok(Some(line));
            }
            let mut chunk = [0; 8192];
            let (length, descriptors) =
                ancillary::receive(self.stream.as_fd(), &mut chunk, DESCRIPTORS_MAX)?;
            self.descriptors.extend(descriptors);
            match length {
                0 => return Ok(None),
                _ => self.buffer.extend_from_slice(&chunk[..length]),
            }
        }
    }
}
