//! What a VE is filled with: so many processes, threads, areas, descriptors and bytes, and a
//! server that echoes, so that somebody outside can see how they are.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::atomic::Ordering;
use std::time::Duration;

use chaos_tests::client::record::mix;
use ckpt_engine::sys::program::fork::fork;
use ckpt_engine::sys::program::map::{Backing, Map, PAGE_BYTES};
use clap::Args;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};

/// How much of what there is.
#[derive(Clone, Debug, Default, Args)]
pub struct Ballast {
    /// Processes that do nothing.
    #[arg(long, default_value_t = 0)]
    pub processes: usize,
    /// Threads that do nothing.
    #[arg(long, default_value_t = 0)]
    pub threads: usize,
    /// Areas of one page each.
    #[arg(long, default_value_t = 0)]
    pub areas: usize,
    /// Open files.
    #[arg(long, default_value_t = 0)]
    pub files: usize,
    /// Pairs of connected sockets.
    #[arg(long, default_value_t = 0)]
    pub sockets: usize,
    /// MiB that nothing can make smaller.
    #[arg(long, default_value_t = 0)]
    pub random_mib: usize,
    /// Processes that each have all the random MiB beside the first, each made by itself.
    #[arg(long, default_value_t = 0)]
    pub copies: usize,
    /// MiB of pages that are there and hold zeros.
    #[arg(long, default_value_t = 0)]
    pub zero_mib: usize,
    /// The port of the server.
    #[arg(long, default_value_t = PORT)]
    pub port: u16,
    /// Make this file once all of it is there.
    #[arg(long)]
    pub ready: Option<PathBuf>,
}

/// Where the server listens.
pub const PORT: u16 = 7007;

/// What only has to be held.
#[derive(Debug, Default)]
struct Held {
    maps: Vec<Map>,
    files: Vec<File>,
    sockets: Vec<(UnixStream, UnixStream)>,
}

/// Takes on everything and serves until it is ended.
pub fn run(ballast: &Ballast) -> io::Result<()> {
    // First: only a process with one thread can fork.
    for _ in 0..ballast.processes {
        fork(|| {
            loop {
                std::thread::park();
            }
        })?;
    }
    let made = Map::new(1, Backing::Shared)?;
    for _ in 0..ballast.copies {
        fork(|| {
            let Ok(_random) = random(ballast.random_mib) else { return 1 };
            made.word(0).fetch_add(1, Ordering::SeqCst);
            loop {
                std::thread::park();
            }
        })?;
    }
    while made.word(0).load(Ordering::SeqCst) < ballast.copies as u64 {
        std::thread::sleep(Duration::from_millis(5));
    }
    for _ in 0..ballast.threads {
        std::thread::Builder::new().stack_size(64 << 10).spawn(|| {
            loop {
                std::thread::park();
            }
        })?;
    }
    let held = hold(ballast)?;
    let listener = TcpListener::bind((Ipv4Addr::UNSPECIFIED, ballast.port))?;
    ballast.ready.as_ref().map(File::create).transpose()?;
    let ended = serve(&listener);
    drop(held);
    ended
}

fn hold(ballast: &Ballast) -> io::Result<Held> {
    let mut held = Held::default();
    if ballast.areas > 0 {
        // Every second page cannot be touched, so that its neighbours are areas of their own.
        let map = Map::new(ballast.areas * 2, Backing::Private)?;
        for area in 0..ballast.areas {
            map.word(area * 2 * PAGE_BYTES / 8).store(mix(area as u64), Ordering::Relaxed);
            map.set_accessible(area * 2 + 1, 1, false)?;
        }
        held.maps.push(map);
    }
    for _ in 0..ballast.files {
        held.files.push(File::open("/etc/passwd")?);
    }
    for _ in 0..ballast.sockets {
        held.sockets.push(UnixStream::pair()?);
    }
    if ballast.random_mib > 0 {
        held.maps.push(random(ballast.random_mib)?);
    }
    if ballast.zero_mib > 0 {
        let map = Map::new((ballast.zero_mib << 20) / PAGE_BYTES, Backing::Private)?;
        for page in 0..map.words() * 8 / PAGE_BYTES {
            map.word(page * PAGE_BYTES / 8).store(0, Ordering::Relaxed);
        }
        held.maps.push(map);
    }
    Ok(held)
}

/// Memory that nothing can make smaller, the same each time.
fn random(mib: usize) -> io::Result<Map> {
    let map = Map::new((mib << 20) / PAGE_BYTES, Backing::Private)?;
    let mut state = 1;
    for word in 0..map.words() {
        state = mix(state);
        map.word(word).store(state, Ordering::Relaxed);
    }
    Ok(map)
}

/// Echoes what comes on any number of connections.
fn serve(listener: &TcpListener) -> io::Result<()> {
    listener.set_nonblocking(true)?;
    let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
    let watch = |fd: std::os::fd::BorrowedFd<'_>| {
        let key = u64::try_from(fd.as_raw_fd()).unwrap_or(u64::MAX);
        epoll.add(fd, EpollEvent::new(EpollFlags::EPOLLIN, key)).map(|()| key)
    };
    let door = watch(listener.as_fd())?;
    let mut guests: HashMap<u64, TcpStream> = HashMap::new();
    let mut events = vec![EpollEvent::empty(); 256];
    let mut piece = vec![0; 64 << 10];
    loop {
        let count = match epoll.wait(&mut events, EpollTimeout::NONE) {
            Err(nix::errno::Errno::EINTR) => continue,
            count => count?,
        };
        for event in &events[..count] {
            let key = event.data();
            if key == door {
                while let Ok((guest, _)) = listener.accept() {
                    guest.set_nodelay(true)?;
                    guests.insert(watch(guest.as_fd())?, guest);
                }
            } else if let Some(guest) = guests.get_mut(&key) {
                let echoed = match guest.read(&mut piece) {
                    Ok(0) | Err(_) => false,
                    Ok(length) => guest.write_all(&piece[..length]).is_ok(),
                };
                if !echoed {
                    // Its descriptor leaves the epoll with it.
                    guests.remove(&key);
                }
            }
        }
    }
}
