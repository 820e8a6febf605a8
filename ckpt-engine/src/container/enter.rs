//! Runs a program in a container that is already there.

use std::{
    fs::File,
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::PathBuf,
    process::Command,
};

use nix::fcntl::{OFlag, OpenHow, ResolveFlag, openat2};

use super::{
    ContainerError, Reaped,
    error::step,
    order::{Order, Reply},
    place, spawn_seed,
};
use crate::sys::{clone, namespace::as_user};

/// Which container to enter.
#[derive(Clone, Debug)]
pub struct Entry<'a> {
    /// A descriptor for its pid 1.
    pub init: BorrowedFd<'a>,
    /// The cgroup directories that the program goes into.
    pub cgroups: &'a [PathBuf],
}

/// What to run there.
#[derive(Clone, Debug)]
pub struct Program {
    /// The program, looked up in the `PATH` of `environment`, and its arguments.
    pub arguments: Vec<String>,
    /// All of its environment.
    pub environment: Vec<(String, String)>,
    /// Where it starts.
    pub directory: String,
    /// Its standard input is a terminal and becomes its controlling one.
    pub terminal: bool,
}

/// A program that runs in a container: a child of the caller, leader of a session.
#[derive(Debug)]
pub struct Entered {
    /// Its number as the caller sees it.
    pub pid: i32,
    /// A descriptor for it.
    pub pidfd: OwnedFd,
}

/// Starts a program in a container on the given standard streams. `seed` is as for
/// [`super::Container::create`]. Returns once the program runs.
pub fn enter(
    entry: &Entry<'_>,
    program: &Program,
    streams: [BorrowedFd<'_>; 3],
    seed: Command,
) -> Result<Entered, ContainerError> {
    let (socket, child) = spawn_seed(seed)?;
    let mut child = Reaped(child);
    place(child.0.id().cast_signed(), entry.cgroups)?;
    let order = Order::Enter {
        arguments: program.arguments.clone(),
        environment: program.environment.clone(),
        directory: program.directory.clone(),
        terminal: program.terminal,
    };
    let [input, output, errors] = streams;
    socket.send(&order, &[entry.init, input, output, errors])?;
    let (born, mut early) = super::receive_born(&socket)?;
    let entered = match born {
        (Reply::Born { pid }, mut descriptors) => {
            Entered { pid, pidfd: descriptors.pop().ok_or(ContainerError::Foreign)? }
        }
        (other, _) => return Err(other.into_error("born")),
    };
    child.0.wait().map_err(step("wait for the seed"))?;
    match early.pop_front().map_or_else(|| socket.receive::<Reply>(), Ok) {
        // The exec itself closes the socket.
        Err(ContainerError::Gone) => Ok(entered),
        Err(other) => Err(other),
        Ok((other, _)) => {
            super::reap(entered.pidfd.as_fd());
            Err(other.into_error("run"))
        }
    }
}

/// A new terminal of the container whose pid 1 has this number: master and other end.
pub fn open_terminal(init: i32, id_base: u32) -> Result<(OwnedFd, OwnedFd), ContainerError> {
    let open = || -> io::Result<(OwnedFd, OwnedFd)> {
        let root = File::open(format!("/proc/{init}/root"))?;
        // The tree belongs to the VE: no link in it may lead out.
        let how = OpenHow::new()
            .flags(OFlag::O_RDWR | OFlag::O_NOCTTY | OFlag::O_CLOEXEC | OFlag::O_NONBLOCK)
            .resolve(ResolveFlag::RESOLVE_IN_ROOT | ResolveFlag::RESOLVE_NO_MAGICLINKS);
        let master = openat2(&root, "dev/pts/ptmx", how)?;
        let peer = clone::open_terminal_peer(master.as_fd())?;
        nix::fcntl::fcntl(&master, nix::fcntl::FcntlArg::F_SETFL(OFlag::O_RDWR))?;
        Ok((master, peer))
    };
    as_user(id_base, open).map_err(step("open a terminal"))
}
