//! What every workload is given: a folder of its own, a way to count its checks, and the word
//! that it should stop.

use std::fs::{self, File};
use std::io::{self, Write};
use std::net::SocketAddr;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use ckpt_engine::sys::program::map::{Backing, Map};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::outcome::Failure;

/// Counters that the workload shares with its children and threads.
#[derive(Clone, Debug)]
pub struct Progress(Arc<Map>);

const CHECKS: usize = 0;
const PLANTED: usize = 1;

impl Progress {
    fn new(planted: bool) -> io::Result<Self> {
        let map = Map::new(1, Backing::Shared)?;
        map.word(PLANTED).store(u64::from(planted), Ordering::SeqCst);
        Ok(Self(Arc::new(map)))
    }

    /// Counts one check that came out right.
    pub fn count(&self) {
        self.0.word(CHECKS).fetch_add(1, Ordering::Relaxed);
    }

    /// Checks made so far.
    pub fn checks(&self) -> u64 {
        self.0.word(CHECKS).load(Ordering::Relaxed)
    }

    /// True once, in a run that must fail: the caller then damages what it holds, so that its own
    /// check has to notice. Not before some checks were made.
    pub fn plant(&self) -> bool {
        self.checks() >= 10 && self.0.word(PLANTED).swap(0, Ordering::SeqCst) == 1
    }
}

/// What a workload runs with.
#[derive(Debug)]
pub struct Context {
    /// A folder of its own, empty at the start.
    pub folder: PathBuf,
    /// The companion on another host, for workloads that need it.
    pub peer: Option<SocketAddr>,
    /// Its counters.
    pub progress: Progress,
    /// Whether handlers of its own may interrupt it. Otherwise nothing may.
    pub has_handlers: bool,
    status: File,
    written: Instant,
}

impl Context {
    /// A context with this folder, which is made.
    pub fn new(folder: &Path, peer: Option<SocketAddr>, planted: bool) -> io::Result<Self> {
        fs::create_dir_all(folder)?;
        let status = File::create(folder.join("status"))?;
        let progress = Progress::new(planted)?;
        Ok(Self {
            folder: folder.to_path_buf(),
            peer,
            progress,
            has_handlers: false,
            status,
            written: Instant::now(),
        })
    }

    /// Waits a little and counts a round of checks. False when the workload should stop.
    pub fn step(&mut self, pause: Duration) -> Result<bool, Failure> {
        self.progress.count();
        if self.written.elapsed() > Duration::from_millis(200) {
            self.write_status()?;
        }
        match stdin_ended(pause) {
            Err(nix::Error::EINTR) if self.has_handlers => Ok(true),
            ended => Ok(!ended?),
        }
    }

    /// The path of a file in the workload's folder.
    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }

    fn write_status(&mut self) -> Result<(), Failure> {
        writeln!(self.status, "{}", self.progress.checks())?;
        self.written = Instant::now();
        Ok(())
    }
}

/// Waits for the end of standard input, which tells workloads and their children to stop.
pub fn stdin_ended(pause: Duration) -> nix::Result<bool> {
    let stdin = io::stdin();
    let mut fds = [PollFd::new(stdin.as_fd(), PollFlags::POLLIN)];
    // Rounded up, so that a wait of less than a millisecond is no busy loop.
    let timeout = PollTimeout::try_from(pause + Duration::from_micros(999))
        .map_err(|_| nix::Error::EINVAL)?;
    Ok(poll(&mut fds, timeout)? > 0)
}
