//! The daemon's end of the API socket.

use std::{
    io,
    os::fd::{AsFd, OwnedFd},
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    sync::Arc,
};

use ckpt_engine::sys::ancillary;
use serde::Serialize;
use tokio::{
    io::Interest,
    net::{UnixListener, UnixStream},
    sync::mpsc,
};
use tracing::{debug, warn};

use super::{
    Event, Failure, Progress, Request, cluster, node, template, ve,
    wire::{DESCRIPTORS_MAX, REQUEST_LIMIT},
};
use crate::{
    daemon::Daemon,
    migration::{CheckpointRequest, MigrateRequest},
};

/// Why the API cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// Another daemon answers on the socket.
    #[error("another daemon serves {path}")]
    Taken {
        /// The socket.
        path: PathBuf,
    },
    /// The socket cannot be made.
    #[error("cannot listen on {path}")]
    Listen {
        /// The socket.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

/// Where a request's handler reports to while it works. Cheap to clone; safe to keep after the
/// client has gone.
#[derive(Clone, Debug)]
pub struct Sink {
    events: mpsc::UnboundedSender<(Event, Option<OwnedFd>)>,
}

impl Sink {
    /// Tells how far the work is.
    pub fn progress(&self, step: &str, done: u64, total: Option<u64>, unit: &str) {
        let (step, unit) = (step.to_owned(), unit.to_owned());
        self.send(Event::Progress(Progress { step, done, total, unit }), None);
    }

    /// A line for the user.
    pub fn log(&self, line: impl Into<String>) {
        self.send(Event::Log(line.into()), None);
    }

    /// Hands a terminal's master to the client.
    pub fn terminal(&self, master: OwnedFd) {
        self.send(Event::Terminal, Some(master));
    }

    /// Resolves when the client has gone: the request should be given up.
    pub async fn closed(&self) {
        self.events.closed().await;
    }

    /// True once the client has gone.
    pub fn is_closed(&self) -> bool {
        self.events.is_closed()
    }

    /// A sink for work that nobody waits for.
    pub fn nowhere() -> Self {
        Self { events: mpsc::unbounded_channel().0 }
    }

    fn send(&self, event: Event, descriptor: Option<OwnedFd>) {
        // Nobody listens any more: the handler sees that by `closed`.
        let _ = self.events.send((event, descriptor));
    }
}

/// Answers requests until the process ends.
pub fn serve(daemon: Arc<Daemon>, path: &Path) -> Result<(), ServeError> {
    let listen = |source| ServeError::Listen { path: path.into(), source };
    if std::os::unix::net::UnixStream::connect(path).is_ok() {
        return Err(ServeError::Taken { path: path.into() });
    }
    if let Some(parent) = path.parent() {
        std::fs::create_dir_all(parent).map_err(listen)?;
    }
    match std::fs::remove_file(path) {
        Err(source) if source.kind() != io::ErrorKind::NotFound => return Err(listen(source)),
        _ => (),
    }
    let listener = UnixListener::bind(path).map_err(listen)?;
    std::fs::set_permissions(path, PermissionsExt::from_mode(0o600)).map_err(listen)?;
    tokio::spawn(async move {
        loop {
            match listener.accept().await {
                Ok((stream, _)) => drop(tokio::spawn(converse(daemon.clone(), stream))),
                Err(source) => {
                    // Out of descriptors or memory: let others finish before the next try.
                    warn!(%source, "cannot accept on the API socket");
                    tokio::time::sleep(std::time::Duration::from_millis(100)).await;
                }
            }
        }
    });
    Ok(())
}

async fn converse(daemon: Arc<Daemon>, stream: UnixStream) {
    if !stream.peer_cred().is_ok_and(|peer| peer.uid() == 0) {
        return;
    }
    let (request, descriptors) = match receive(&stream).await {
        Ok(Some(received)) => received,
        Ok(None) => return,
        Err(source) => {
            let failure = Failure::new("bad-request", 20, format!("bad request: {source}"));
            let _ = send(&stream, &Event::Error(failure), None).await;
            return;
        }
    };
    debug!(?request, "request");
    let (events, mut queue) = mpsc::unbounded_channel();
    let sink = Sink { events };
    let work = tokio::spawn(answer(daemon, request, descriptors, sink));
    loop {
        tokio::select! {
            biased;
            next = queue.recv() => match next {
                Some((event, descriptor)) => {
                    if send(&stream, &event, descriptor).await.is_err() {
                        return;
                    }
                }
                None => break,
            },
            () = hang_up(&stream) => {
                // The request is to be given up. A client that only closed its sending end
                // still hears how that went.
                queue.close();
                break;
            }
        }
    }
    let last = work.await.unwrap_or_else(|source| {
        Event::Error(Failure::new("internal", 3, format!("the daemon failed: {source}")))
    });
    let _ = send(&stream, &last, None).await;
}

/// Runs the handler of a request; its outcome is the last event.
async fn answer(
    daemon: Arc<Daemon>,
    request: Request,
    descriptors: Vec<OwnedFd>,
    sink: Sink,
) -> Event {
    let outcome = match request {
        Request::Node(request) => node::handle(&daemon, &request),
        Request::Cluster(request) => cluster::handle(&daemon, request).await,
        Request::Ve(request) => ve::handle(&daemon, request, descriptors, &sink).await,
        Request::Migrate(request) => migrate(&daemon, &request, &sink).await,
        Request::Checkpoint(request) => checkpoint(&daemon, request, &sink).await,
        Request::Template(request) => template::handle(&daemon, request, &sink).await,
    };
    match outcome {
        Ok(value) => Event::Result(value),
        Err(failure) => Event::Error(failure),
    }
}

/// Moves a VE: the [`crate::migration::Report`], or nothing for a mere look.
async fn migrate(
    daemon: &Daemon,
    request: &MigrateRequest,
    sink: &Sink,
) -> Result<serde_json::Value, Failure> {
    to_value(daemon.migrations.migrate(request, sink).await?)
}

/// Writes a VE into a file, or brings it back from there.
async fn checkpoint(
    daemon: &Daemon,
    request: CheckpointRequest,
    sink: &Sink,
) -> Result<serde_json::Value, Failure> {
    match request {
        CheckpointRequest::Dump(request) => {
            to_value(daemon.migrations.checkpoint(&request, sink).await?)
        }
        CheckpointRequest::Restore { ve, file } => {
            to_value(daemon.migrations.restore(&ve, file, sink).await?)
        }
    }
}

/// Turns a handler's result into what the wire carries.
pub(super) fn to_value(value: impl Serialize) -> Result<serde_json::Value, Failure> {
    serde_json::to_value(value)
        .map_err(|source| Failure::new("internal", 3, format!("cannot encode: {source}")))
}

async fn receive(stream: &UnixStream) -> io::Result<Option<(Request, Vec<OwnedFd>)>> {
    let (mut line, mut descriptors) = (Vec::new(), Vec::new());
    while !line.ends_with(b"\n") {
        let mut chunk = [0; 8192];
        let (length, more) = stream
            .async_io(Interest::READABLE, || {
                ancillary::receive(stream.as_fd(), &mut chunk, DESCRIPTORS_MAX)
            })
            .await?;
        if length == 0 {
            return Ok(None);
        }
        descriptors.extend(more);
        line.extend_from_slice(&chunk[..length]);
        if line.len() > REQUEST_LIMIT || descriptors.len() > DESCRIPTORS_MAX {
            return Err(io::ErrorKind::FileTooLarge.into());
        }
    }
    Ok(Some((serde_json::from_slice(&line)?, descriptors)))
}

async fn send(stream: &UnixStream, event: &Event, descriptor: Option<OwnedFd>) -> io::Result<()> {
    let mut line = serde_json::to_vec(event)?;
    line.push(b'\n');
    let mut rest = line.as_slice();
    let mut beside: Vec<_> = descriptor.iter().map(AsFd::as_fd).collect();
    while !rest.is_empty() {
        let sent = stream
            .async_io(Interest::WRITABLE, || ancillary::send(stream.as_fd(), rest, &beside))
            .await?;
        beside.clear();
        rest = &rest[sent..];
    }
    Ok(())
}

/// Resolves when the client closes its end. It has nothing more to say after its request.
async fn hang_up(stream: &UnixStream) {
    let mut byte = [0; 1];
    loop {
        if stream.readable().await.is_err() {
            return;
        }
        match stream.try_read(&mut byte) {
            Ok(0) => return,
            Ok(_) => (),
            Err(source) if source.kind() == io::ErrorKind::WouldBlock => (),
            Err(_) => return,
        }
    }
}
