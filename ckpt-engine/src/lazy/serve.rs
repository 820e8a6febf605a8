//! The life of a keeper: waits for faults, for the daemon, and for the end of the VE.

use std::{
    io,
    os::{
        fd::AsFd,
        unix::net::{UnixListener, UnixStream},
    },
    time::{Duration, Instant},
};

use nix::{
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::socket::{getsockopt, sockopt::PeerCredentials},
};

use super::{FromKeeper, ToKeeper, keeper::Keeper};
use crate::{
    message::{receive, send},
    sys::{missing::Missing, task},
};

/// Between two looks for address spaces that have ended, and two words about what is left.
const LOOK: Duration = Duration::from_millis(200);
/// Between two attempts at what the kernel refused for the moment.
const AGAIN: Duration = Duration::from_millis(1);
/// How long a daemon may take to take or to end a word.
const WORD: Duration = Duration::from_secs(10);

/// How it ends.
enum End {
    /// The VE has all its memory, or has ended itself.
    Done,
}

/// Keeps the missing pages of the VE whose pid 1 the host numbers `init`, until all of them have
/// come or the VE has ended. Daemons connect to `listener`, one after the other.
pub fn serve(listener: &UnixListener, init: i32) -> io::Result<()> {
    let ended = match task::pidfd_open(init) {
        Ok(ended) => ended,
        // It has ended already.
        Err(error) if error.raw_os_error() == Some(libc::ESRCH) => return Ok(()),
        Err(error) => return Err(error),
    };
    // Each child that a program makes meanwhile takes a descriptor.
    if let Err(error) = task::raise_descriptor_limit() {
        tracing::debug!(%error, "cannot raise the limit of descriptors");
    }
    let mut desk = Desk::default();
    let mut looked = Instant::now();
    loop {
        let timeout = if desk.keeper.is_late() { AGAIN } else { LOOK };
        let timeout = PollTimeout::try_from(timeout).unwrap_or(PollTimeout::NONE);
        let mut fds = vec![
            PollFd::new(ended.as_fd(), PollFlags::POLLIN),
            PollFd::new(listener.as_fd(), PollFlags::POLLIN),
        ];
        fds.extend(desk.daemon.iter().map(|it| PollFd::new(it.as_fd(), PollFlags::POLLIN)));
        let before = fds.len();
        fds.extend(desk.keeper.sources().map(|source| PollFd::new(source, PollFlags::POLLIN)));
        match poll(&mut fds, timeout) {
            Ok(_) | Err(nix::errno::Errno::EINTR) => {}
            Err(error) => return Err(error.into()),
        }
        let ready: Vec<bool> =
            fds.iter().map(|fd| fd.revents().is_some_and(|it| !it.is_empty())).collect();
        drop(fds);
        if ready[0] {
            return Ok(());
        }
        // What has happened to memory first: it says where pages go.
        for (index, _) in ready[before..].iter().enumerate().filter(|(_, ready)| **ready) {
            desk.keeper.follow(index);
        }
        desk.keeper.settle();
        if before > 2 && ready[2] && matches!(desk.hear(), Some(End::Done)) {
            return Ok(());
        }
        if ready[1] {
            desk.accept(listener)?;
        }
        if looked.elapsed() >= LOOK {
            desk.keeper.sweep();
            let left = desk.keeper.left();
            desk.say(&left);
            looked = Instant::now();
        }
        desk.speak();
        if desk.is_needless() {
            return Ok(());
        }
    }
}

/// The keeper and the daemon that it talks to, if there is one.
#[derive(Default)]
struct Desk {
    keeper: Keeper,
    daemon: Option<UnixStream>,
    told_complete: bool,
    /// Whether a process was ever handed over: before that nothing is complete.
    given: bool,
    /// Whether there ever was a daemon.
    met: bool,
}

impl Desk {
    fn accept(&mut self, listener: &UnixListener) -> io::Result<()> {
        let (socket, _) = listener.accept()?;
        let from = getsockopt(&socket, PeerCredentials)?;
        if from.uid() != 0 {
            tracing::warn!(uid = from.uid(), "a stranger wants to serve a VE's memory");
            return Ok(());
        }
        socket.set_write_timeout(Some(WORD))?;
        socket.set_read_timeout(Some(WORD))?;
        // Whoever comes later has taken the place of one that died.
        self.lose();
        self.daemon = Some(socket);
        self.met = true;
        let left = self.keeper.left();
        self.say(&left);
        Ok(())
    }

    /// The first daemon has gone and has left nothing: nothing was missing.
    fn is_needless(&self) -> bool {
        self.met && !self.given && self.daemon.is_none()
    }

    fn lose(&mut self) {
        self.daemon = None;
        self.told_complete = false;
        self.keeper.pause();
    }

    fn say(&mut self, word: &FromKeeper) {
        let Some(daemon) = &mut self.daemon else { return };
        let beside = match word {
            FromKeeper::Held { id } => match self.keeper.descriptor(*id) {
                Some(descriptor) => Some(descriptor),
                None => return,
            },
            _ => None,
        };
        if let Err(error) = send(daemon, word, beside) {
            tracing::info!(%error, "the daemon has gone; a VE waits for the next one");
            self.lose();
        }
    }

    fn speak(&mut self) {
        for word in self.keeper.words() {
            self.say(&word);
        }
        if self.given && self.keeper.is_complete() && self.daemon.is_some() && !self.told_complete {
            self.told_complete = true;
            let faults = self.keeper.faults();
            self.say(&FromKeeper::Complete { faults });
        }
    }

    /// One message of the daemon.
    fn hear(&mut self) -> Option<End> {
        let message = match self.daemon.as_mut().map(receive::<ToKeeper>)? {
            Ok(Some(message)) => message,
            Ok(None) | Err(_) => {
                self.lose();
                return None;
            }
        };
        match message {
            (ToKeeper::Add { pid, runs }, Some(faults)) => {
                self.keeper.add(pid, &runs, Missing::received(faults));
                self.given = true;
                self.say(&FromKeeper::Added);
            }
            (ToKeeper::Add { .. }, None) => self.lose(),
            (ToKeeper::Begin, _) => self.keeper.begin(),
            (ToKeeper::Pages { pid, runs, data }, _) => self.keeper.arrived(pid, &runs, &data),
            (ToKeeper::Bye, _) if self.keeper.is_complete() => return Some(End::Done),
            (ToKeeper::Bye, _) => {}
        }
        None
    }
}
