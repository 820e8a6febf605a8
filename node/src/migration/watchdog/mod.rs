//! A freeze has a watchdog: a VE that is not sealed never stands still for longer than its daemon
//! lives and works.
//!
//! The watchdog is a process of its own, made before a VE is touched, that sits at the other end
//! of a socket. While the VE stands still it waits for one of four things:
//!
//! | comes | it |
//! |---|---|
//! | the word that the VE goes on | waits for the next freeze |
//! | the wish to seal | says yes, and ends: from here on only the log knows |
//! | the end of the socket: the daemon is dead | puts the VE right, and ends |
//! | nothing for too long: the daemon hangs | says so, puts the VE right, and does so again until the daemon has understood |
//!
//! It is also the VE's [`Surgeon`]: what changes threads of a running VE is done here, so that
//! neither a dead daemon nor a dying one leaves a thread with registers that are not its own. A
//! VE is put right only when nothing is under way, and nothing begins afterwards.
//!
//! It does one thing at a time, so the seal and the thaw exclude each other: a daemon may seal
//! only with the watchdog's yes, and after a yes the watchdog never touches the VE again.
//!
//! It holds a lock beside the VE for as long as it lives. A daemon that comes back waits for the
//! lock before it puts the VE right itself, and so does the next move: a watchdog that is late
//! never thaws what somebody else has frozen.

mod process;

use std::{
    fs::File,
    io::{self, Read, Write},
    os::{
        fd::{AsFd, OwnedFd},
        unix::net::UnixStream,
    },
    path::{Path, PathBuf},
    process::Stdio,
    time::Duration,
};

use ckpt_engine::surgeon::Surgeon;
use nix::{
    fcntl::{Flock, FlockArg},
    sys::socket::{AddressFamily, SockFlag, SockType, socketpair},
};
use serde::{Deserialize, Serialize};
use tokio::process::{Child, Command};

pub(super) use self::process::main;
use super::standing::Standing;

/// The hidden argument with which the daemon's program is a watchdog.
pub const WATCHDOG_ARGUMENT: &str = "freeze-watchdog";

/// How long a watchdog may take until it watches.
const START: Duration = Duration::from_secs(10);
/// How long it may take for its yes to a seal.
const SEAL: Duration = Duration::from_secs(1);
/// The longest message.
const MESSAGE_MAX: usize = 16 << 10;

/// What the daemon tells. One message each.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
enum Order {
    /// Which VE to watch over.
    Guard {
        /// How to let it go on.
        standing: Standing,
        /// The file to lock meanwhile.
        lock: PathBuf,
    },
    /// The VE is about to stand still; if it still does after so long, something is wrong.
    Frozen {
        /// So long.
        patience: Duration,
    },
    /// May the daemon put the VE right, and let it go on?
    Reclaim,
    /// The VE goes on.
    Thawed,
    /// May the VE stand still until the log has spoken?
    Seal,
    /// Nothing has to be put right any more.
    Done,
}

/// What the watchdog answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
enum Answer {
    /// It has the lock and watches.
    Watching,
    /// The VE may be sealed, and is no business of the watchdog's any more.
    Sealed,
    /// The daemon lets the VE go on; the watchdog does not any more.
    Reclaimed,
    /// The freeze took too long: the VE goes on.
    Ended,
}

/// Why the watchdog cannot be relied on.
#[derive(Debug, thiserror::Error)]
pub(super) enum WatchdogError {
    /// It could not be started.
    #[error("cannot start the watchdog of a freeze")]
    Start(#[source] io::Error),
    /// It does not answer.
    #[error("the watchdog of a freeze does not answer")]
    Silent(#[source] io::Error),
    /// It has thawed the VE.
    #[error("the VE stood still for too long, so its watchdog has let it go on")]
    Ended,
}

/// The daemon's end. Dropped while the VE stands still, it has the watchdog put the VE right.
#[derive(Debug)]
pub(super) struct Watchdog {
    socket: UnixStream,
    surgeon: Surgeon,
    frozen: bool,
    /// Collected by the runtime after it has ended.
    _process: Child,
}

impl Watchdog {
    /// Starts a watchdog and waits until it watches. Call inside a runtime.
    pub(super) fn start(standing: Standing, directory: &Path) -> Result<Self, WatchdogError> {
        let start = WatchdogError::Start;
        let (ours, theirs) =
            socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)
                .map_err(|errno| start(errno.into()))?;
        let (surgeon, table) = UnixStream::pair().map_err(start)?;
        let process = Command::new("/proc/self/exe")
            .arg(WATCHDOG_ARGUMENT)
            .stdin(Stdio::from(theirs))
            .stdout(Stdio::from(OwnedFd::from(table)))
            // Not the terminal's: what stops the daemon must not stop it.
            .process_group(0)
            .current_dir("/")
            .spawn()
            .map_err(start)?;
        let socket = UnixStream::from(ours);
        // It may have to wait for the last one, which has a VE to put right.
        socket.set_read_timeout(Some(START)).map_err(start)?;
        let surgeon = Surgeon::new(surgeon).map_err(start)?;
        let watchdog = Self { socket, surgeon, frozen: false, _process: process };
        watchdog.tell(&Order::Guard { standing, lock: lock_path(directory) })?;
        match receive::<Answer>(&watchdog.socket).map_err(WatchdogError::Silent)? {
            Some(Answer::Watching) => {}
            _ => return Err(WatchdogError::Silent(io::ErrorKind::UnexpectedEof.into())),
        }
        watchdog.socket.set_read_timeout(Some(SEAL)).map_err(start)?;
        Ok(watchdog)
    }

    /// Who reaches into the VE's processes.
    pub(super) fn surgeon(&self) -> &Surgeon {
        &self.surgeon
    }

    /// To be said before the VE is frozen.
    pub(super) fn frozen(&mut self, patience: Duration) -> Result<(), WatchdogError> {
        self.tell(&Order::Frozen { patience })?;
        self.frozen = true;
        Ok(())
    }

    /// To be said when the VE goes on.
    pub(super) fn thawed(&mut self) -> Result<(), WatchdogError> {
        self.tell(&Order::Thawed)?;
        self.frozen = false;
        Ok(())
    }

    /// Asks for the right to seal. With an error the VE must go on.
    pub(super) fn seal(&mut self) -> Result<(), WatchdogError> {
        // One that has ended the freeze may be gone; its last word is there all the same.
        let told = self.tell(&Order::Seal);
        match receive::<Answer>(&self.socket).map_err(WatchdogError::Silent)? {
            Some(Answer::Sealed) => {
                self.frozen = false;
                Ok(())
            }
            Some(Answer::Ended) => Err(WatchdogError::Ended),
            Some(Answer::Watching | Answer::Reclaimed) | None => {
                told?;
                Err(WatchdogError::Silent(io::ErrorKind::UnexpectedEof.into()))
            }
        }
    }

    /// True if it is still the daemon's to put the VE right. What the watchdog has let go on must
    /// not be touched: connections have moved on since.
    pub(super) fn reclaim(&mut self) -> bool {
        if !self.frozen || self.tell(&Order::Reclaim).is_err() {
            return true;
        }
        !matches!(receive::<Answer>(&self.socket), Ok(Some(Answer::Ended)))
    }

    fn tell(&self, order: &Order) -> Result<(), WatchdogError> {
        send(&self.socket, order).map_err(WatchdogError::Silent)
    }
}

impl Drop for Watchdog {
    fn drop(&mut self) {
        if !self.frozen {
            // One that is gone already has nothing to do either.
            let _ = self.tell(&Order::Done);
        }
    }
}

/// Waits until no watchdog of a dead daemon is at work on a VE.
pub(super) fn wait_for_last(directory: &Path) -> io::Result<()> {
    lock(&lock_path(directory)).map(drop)
}

fn lock_path(directory: &Path) -> PathBuf {
    directory.join("watchdog.lock")
}

fn lock(path: &Path) -> io::Result<Flock<File>> {
    let file = File::options().create(true).write(true).truncate(false).open(path)?;
    Flock::lock(file, FlockArg::LockExclusive).map_err(|(_, errno)| errno.into())
}

fn send<T: Serialize>(mut socket: &UnixStream, message: &T) -> io::Result<()> {
    socket.write_all(&serde_json::to_vec(message)?)
}

/// The next message; none when the other end is closed.
fn receive<T: for<'a> Deserialize<'a>>(mut socket: &UnixStream) -> io::Result<Option<T>> {
    let mut buffer = vec![0; MESSAGE_MAX];
    match socket.read(&mut buffer)? {
        0 => Ok(None),
        length => Ok(Some(serde_json::from_slice(&buffer[..length])?)),
    }
}

/// The sockets that a watchdog was started with: the daemon's orders, and those to the surgeon.
fn inherited() -> io::Result<(UnixStream, UnixStream)> {
    let orders: OwnedFd = io::stdin().as_fd().try_clone_to_owned()?;
    let operations: OwnedFd = io::stdout().as_fd().try_clone_to_owned()?;
    Ok((orders.into(), operations.into()))
}
