//! The process that holds the missing pages of one VE: how it is started and found again.

use std::{
    fs::File,
    io,
    os::{
        fd::{AsFd, AsRawFd, OwnedFd},
        unix::net::{UnixListener, UnixStream},
    },
    path::{Path, PathBuf},
    process::{ExitCode, Stdio},
};

use ckpt_engine::{
    lazy::{self, Client},
    sys::missing,
};
use tokio::process::{Child, Command};

use super::Answer;

/// The hidden argument with which the daemon's program is a keeper.
pub const KEEPER_ARGUMENT: &str = "page-keeper";

const SOCKET: &str = "keeper.sock";
/// What the kernel's killer should rather end than a keeper.
const LAST_TO_BE_KILLED: &str = "-999";

/// A VE whose missing pages a keeper has.
#[derive(Debug)]
pub(in crate::migration) struct Kept {
    pub(in crate::migration) client: Client,
    /// Copies of the userfaultfds, so that nothing reads as zeros should the keeper die.
    pub(in crate::migration) faults: Vec<OwnedFd>,
    /// How much is missing.
    pub(in crate::migration) bytes: u64,
}

/// A keeper that was started.
#[derive(Debug)]
pub(in crate::migration) struct Keeper {
    pub(in crate::migration) client: Client,
    /// Collected by the runtime after it has ended.
    _process: Child,
}

impl Keeper {
    /// Starts a keeper for the VE that is kept in `directory` and whose pid 1 the host numbers
    /// `init`. Call inside a runtime.
    pub(in crate::migration) fn start(directory: &Path, init: i32) -> io::Result<Self> {
        let place = File::open(directory)?;
        match std::fs::remove_file(directory.join(SOCKET)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let listener = UnixListener::bind(short(&place))?;
        let process = Command::new("/proc/self/exe")
            .arg(KEEPER_ARGUMENT)
            .arg(init.to_string())
            .stdin(Stdio::from(OwnedFd::from(listener)))
            .stdout(Stdio::null())
            // Not the terminal's: what stops the daemon must not stop it.
            .process_group(0)
            .current_dir("/")
            .spawn()?;
        Ok(Self { client: connect(directory)?, _process: process })
    }
}

/// Connects to the keeper of a VE.
pub(in crate::migration) fn connect(directory: &Path) -> io::Result<Client> {
    let place = File::open(directory)?;
    Ok(Client::new(UnixStream::connect(short(&place))?))
}

/// Removes what a keeper that has ended leaves.
pub(in crate::migration) fn remove(directory: &Path) {
    let path = directory.join(SOCKET);
    if let Err(error) = std::fs::remove_file(&path)
        && error.kind() != io::ErrorKind::NotFound
    {
        tracing::warn!(path = %path.display(), %error, "cannot remove the socket of a keeper");
    }
}

/// The path of a socket is short, that of a VE need not be.
fn short(place: &File) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}/{SOCKET}", place.as_raw_fd()))
}

/// Whether this host could have missing pages.
pub(super) fn ability() -> Answer {
    match missing::open_device() {
        Ok(_) => Answer::Able,
        Err(error) => Answer::Unable { cause: format!("cannot open {}: {error}", missing::DEVICE) },
    }
}

/// The whole life of a keeper.
pub(in crate::migration) fn main() -> ExitCode {
    match keep() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!(%error, "the keeper of a VE's memory cannot work");
            ExitCode::FAILURE
        }
    }
}

fn keep() -> io::Result<()> {
    let init = std::env::args().nth(2).and_then(|text| text.parse().ok());
    let init = init.ok_or(io::ErrorKind::InvalidInput)?;
    if let Err(error) = std::fs::write("/proc/self/oom_score_adj", LAST_TO_BE_KILLED) {
        tracing::debug!(%error, "a keeper is not protected from the kernel's killer");
    }
    let listener: UnixListener = io::stdin().as_fd().try_clone_to_owned()?.into();
    lazy::serve(&listener, init)
}
