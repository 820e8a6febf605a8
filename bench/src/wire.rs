//! Bytes over the link between two nodes, in the ways that a move is measured against.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use clap::ValueEnum;
use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::time::TimeValLike;
use serde::{Deserialize, Serialize};
use transport::bare::{Bare, Settings};
use transport::{
    Authority, Endpoint, EndpointConfig, Identity, Link, LinkHandler, NodeId, PeerInfo, Service,
    Timing, Versions,
};

/// The way.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Way {
    /// A bulk stream of our own transport.
    Link,
    /// One stream of the library with our settings.
    Tuned,
    /// One stream of the library as it comes.
    Library,
    /// Plain TCP.
    Tcp,
    /// One byte there and back over TCP, again and again.
    RoundTrip,
}

/// What one end of a transfer found.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct Transferred {
    /// Bytes, or round trips.
    pub count: u64,
    /// From the first until the other end had the last, without the handshake of TCP.
    pub seconds: f64,
    /// Time on processors at this end.
    pub processor_seconds: f64,
}

/// The size of a piece. As large as those of a move.
const PIECE: usize = 1 << 20;
const RECEIVER: NodeId = NodeId(1);
const SENDER: NodeId = NodeId(2);

/// Why nothing was sent.
#[derive(Debug, thiserror::Error)]
pub enum WireError {
    /// A socket or a file.
    #[error(transparent)]
    System(#[from] io::Error),
    /// The certificates.
    #[error(transparent)]
    Identity(#[from] transport::IdentityError),
    /// An endpoint could not be made.
    #[error(transparent)]
    Bind(#[from] transport::BindError),
    /// The link broke.
    #[error(transparent)]
    Link(#[from] transport::LinkError),
    /// The link could not be opened.
    #[error(transparent)]
    Call(#[from] transport::CallError),
}

/// Makes the certificates of both ends.
pub fn issue(folder: &Path) -> Result<(), WireError> {
    let authority = Authority::create("bench")?;
    for (node, name) in [(RECEIVER, "receiver"), (SENDER, "sender")] {
        let place = folder.join(name);
        std::fs::create_dir_all(&place)?;
        Identity::issue(&authority, node)?.save(&place)?;
    }
    Ok(())
}

/// Takes in one transfer. Says `ready` on standard output when it listens.
pub fn receive(way: Way, listen: SocketAddr, folder: &Path) -> Result<Transferred, WireError> {
    match way {
        Way::Tcp | Way::RoundTrip => {
            let listener = TcpListener::bind(listen)?;
            ready()?;
            let (mut stream, _) = listener.accept()?;
            stream.set_nodelay(true)?;
            let begun = Begun::now();
            let count = if way == Way::Tcp { swallow(&mut stream)? } else { echo(&mut stream)? };
            Ok(begun.ends(count))
        }
        Way::Tuned | Way::Library => runtime()?.block_on(async {
            let identity = Identity::load(&folder.join("receiver"), RECEIVER)?;
            let bare = Bare::bind(listen, &identity, settings(way))?;
            ready()?;
            let begun = Begun::now();
            let count = bare.receive().await?;
            Ok(begun.ends(count))
        }),
        Way::Link => runtime()?.block_on(async {
            let endpoint = endpoint(listen, &folder.join("receiver"), RECEIVER)?;
            let (sender, mut counted) = tokio::sync::mpsc::unbounded_channel();
            endpoint.on_link(Service::Test, Arc::new(Counter(sender)));
            ready()?;
            let begun = Begun::now();
            let count = counted.recv().await.unwrap_or(0);
            let transferred = begun.ends(count);
            endpoint.shut_down(Duration::from_secs(1)).await;
            Ok(transferred)
        }),
    }
}

/// Sends one transfer of so many MiB, or makes so many round trips.
pub fn send(way: Way, to: SocketAddr, count: u64, folder: &Path) -> Result<Transferred, WireError> {
    let mut noise = vec![0u8; PIECE];
    rand::Rng::fill(&mut rand::rng(), noise.as_mut_slice());
    let any = SocketAddr::from(([0, 0, 0, 0], 0));
    match way {
        Way::Tcp => {
            let mut stream = TcpStream::connect(to)?;
            let begun = Begun::now();
            for _ in 0..count {
                stream.write_all(&noise)?;
            }
            stream.shutdown(std::net::Shutdown::Write)?;
            // The other end closes when it has everything.
            stream.read_exact(&mut [0])?;
            Ok(begun.ends(count * PIECE as u64))
        }
        Way::RoundTrip => {
            let mut stream = TcpStream::connect(to)?;
            stream.set_nodelay(true)?;
            let begun = Begun::now();
            for _ in 0..count {
                stream.write_all(&[1])?;
                stream.read_exact(&mut [0])?;
            }
            Ok(begun.ends(count))
        }
        Way::Tuned | Way::Library => runtime()?.block_on(async {
            let identity = Identity::load(&folder.join("sender"), SENDER)?;
            let bare = Bare::bind(any, &identity, settings(way))?;
            let begun = Begun::now();
            bare.send(to, Bytes::from(noise), count).await?;
            Ok(begun.ends(count * PIECE as u64))
        }),
        Way::Link => runtime()?.block_on(async {
            let endpoint = endpoint(any, &folder.join("sender"), SENDER)?;
            let link = endpoint.peer(RECEIVER, to).link(Service::Test).await?;
            let piece = Bytes::from(noise);
            let begun = Begun::now();
            let mut stream = link.bulk.open().await?;
            for _ in 0..count {
                stream.send(piece.clone()).await?;
            }
            stream.finish().await?;
            let transferred = begun.ends(count * PIECE as u64);
            endpoint.shut_down(Duration::from_secs(1)).await;
            Ok(transferred)
        }),
    }
}

fn settings(way: Way) -> Settings {
    if way == Way::Tuned { Settings::Ours } else { Settings::Library }
}

/// Tells the one who waits for it.
fn ready() -> io::Result<()> {
    let mut output = io::stdout().lock();
    writeln!(output, "ready")?;
    output.flush()
}

/// As that of the daemon.
fn runtime() -> io::Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_multi_thread().enable_all().build()
}

fn endpoint(listen: SocketAddr, folder: &Path, node: NodeId) -> Result<Endpoint, WireError> {
    Ok(Endpoint::bind(EndpointConfig {
        listen,
        identity: Identity::load(folder, node)?,
        name: node.to_string(),
        versions: Versions::CURRENT,
        timing: Timing::default(),
    })?)
}

/// Reads to the end, and says so by one byte.
fn swallow(stream: &mut TcpStream) -> io::Result<u64> {
    let mut buffer = vec![0; PIECE];
    let mut count = 0;
    loop {
        match stream.read(&mut buffer)? {
            0 => break,
            length => count += length as u64,
        }
    }
    stream.write_all(&[1])?;
    Ok(count)
}

fn echo(stream: &mut TcpStream) -> io::Result<u64> {
    let mut count = 0;
    while stream.read_exact(&mut [0]).is_ok() {
        stream.write_all(&[1])?;
        count += 1;
    }
    Ok(count)
}

/// Counts what comes on the first bulk stream of a link.
struct Counter(tokio::sync::mpsc::UnboundedSender<u64>);

impl LinkHandler for Counter {
    fn serve(&self, _peer: PeerInfo, link: Link) -> futures_util::future::BoxFuture<'static, ()> {
        let counted = self.0.clone();
        Box::pin(async move {
            let Ok(mut stream) = link.bulk.accept().await else { return };
            let mut count = 0;
            while let Ok(Some(bytes)) = stream.recv().await {
                count += bytes.len() as u64;
            }
            // Nobody waits for it any more after an error.
            let _ = counted.send(count);
        })
    }
}

/// The beginning of a transfer.
struct Begun {
    at: Instant,
    used: f64,
}

impl Begun {
    fn now() -> Self {
        Self { at: Instant::now(), used: processor_seconds() }
    }

    fn ends(&self, count: u64) -> Transferred {
        Transferred {
            count,
            seconds: self.at.elapsed().as_secs_f64(),
            processor_seconds: processor_seconds() - self.used,
        }
    }
}

/// What this process has used so far.
fn processor_seconds() -> f64 {
    getrusage(UsageWho::RUSAGE_SELF).map_or(0.0, |usage| {
        let micros = usage.user_time().num_microseconds() + usage.system_time().num_microseconds();
        micros as f64 / 1e6
    })
}
