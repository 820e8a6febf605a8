//! Stops and continues all processes of a cgroup (cgroup v2, `cgroup.freeze`).

use std::{
    fs, io,
    os::fd::AsFd,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use serde::{Deserialize, Serialize};

use crate::errno;

/// How long the state is looked at again and again before notifications are waited for.
const SPIN: Duration = Duration::from_millis(5);

/// How long the kernel may take to stop or continue everything.
const TIMEOUT: Duration = Duration::from_secs(2);

/// The cgroup did not reach the wanted state.
#[derive(Debug, thiserror::Error, Serialize, Deserialize)]
pub enum FreezeError {
    /// Another part of the same work has failed, and says why.
    #[error("the freeze was given up")]
    Abandoned,
    /// One of its files could not be used.
    #[error("cannot use {}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// Why.
        #[serde(with = "errno")]
        source: io::Error,
    },
    /// Some process did not stop in time: it is in an uninterruptible call.
    #[error("not all processes in {} stopped in time", cgroup.display())]
    Timeout {
        /// The cgroup.
        cgroup: PathBuf,
    },
}

/// A frozen cgroup. Dropping it lets the processes go on, so that no error path, panic or
/// cancellation leaves them stopped; see [`Frozen::seal`] for the one exception.
#[derive(Debug)]
pub struct Frozen {
    cgroup: PathBuf,
    thaws: bool,
}

impl Frozen {
    /// Stops everything in `cgroup` and waits until it stands.
    pub fn freeze(cgroup: &Path) -> Result<Self, FreezeError> {
        let frozen = Self { cgroup: cgroup.to_owned(), thaws: true };
        frozen.again()?;
        Ok(frozen)
    }

    /// Takes over a cgroup that was frozen before, say by a daemon that has died.
    pub fn adopt(cgroup: &Path) -> Self {
        Self { cgroup: cgroup.to_owned(), thaws: true }
    }

    /// The cgroup.
    pub fn cgroup(&self) -> &Path {
        &self.cgroup
    }

    /// Lets threads in ptrace stops run our code; everything else stays where it is as long as
    /// *all* threads of the cgroup are in ptrace stops.
    pub fn open_for_injection(&self) -> Result<(), FreezeError> {
        set(&self.cgroup, false)
    }

    /// Ends [`Self::open_for_injection`].
    pub fn again(&self) -> Result<(), FreezeError> {
        set(&self.cgroup, true)?;
        wait(&self.cgroup, true)
    }

    /// Lets everything go on.
    pub fn thaw(mut self) -> Result<(), FreezeError> {
        self.thaws = false;
        set(&self.cgroup, false)
    }

    /// Leaves it to somebody else to let everything go on.
    pub fn leave(mut self) {
        self.thaws = false;
    }

    /// From here on only somebody who knows the owner may let the processes go on: dropping
    /// the value leaves them frozen.
    pub fn seal(mut self) -> Sealed {
        self.thaws = false;
        Sealed { cgroup: self.cgroup.clone() }
    }
}

impl Drop for Frozen {
    fn drop(&mut self) {
        if self.thaws
            && let Err(error) = set(&self.cgroup, false)
        {
            tracing::error!(%error, "cannot let the processes of a VE go on");
        }
    }
}

/// A cgroup that stays frozen until the ownership is known.
#[derive(Debug)]
pub struct Sealed {
    cgroup: PathBuf,
}

impl Sealed {
    /// The VE is ours after all: back to a freeze that ends by itself.
    pub fn unseal(self) -> Frozen {
        Frozen { cgroup: self.cgroup, thaws: true }
    }
}

fn set(cgroup: &Path, frozen: bool) -> Result<(), FreezeError> {
    let path = cgroup.join("cgroup.freeze");
    fs::write(&path, if frozen { "1" } else { "0" })
        .map_err(|source| FreezeError::File { path, source })
}

fn wait(cgroup: &Path, frozen: bool) -> Result<(), FreezeError> {
    let path = cgroup.join("cgroup.events");
    let failed = |source| FreezeError::File { path: path.clone(), source };
    let wanted = if frozen { "frozen 1" } else { "frozen 0" };
    let start = Instant::now();
    let file = fs::File::open(&path).map_err(failed)?;
    loop {
        let events = fs::read_to_string(&path).map_err(failed)?;
        if events.lines().any(|line| line == wanted) {
            return Ok(());
        }
        let Some(left) = TIMEOUT.checked_sub(start.elapsed()) else {
            return Err(FreezeError::Timeout { cgroup: cgroup.to_owned() });
        };
        // It takes tens of microseconds for a few tasks, but the kernel sends at most one
        // notification of a change in 10 ms (CGROUP_FILE_NOTIFY_MIN_INTV).
        if start.elapsed() < SPIN {
            std::thread::yield_now();
            continue;
        }
        let timeout =
            PollTimeout::try_from(left.min(Duration::from_millis(2))).unwrap_or(PollTimeout::ZERO);
        let mut fds = [PollFd::new(file.as_fd(), PollFlags::POLLPRI)];
        poll(&mut fds, timeout).map_err(|error| failed(error.into()))?;
    }
}
