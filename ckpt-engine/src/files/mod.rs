//! Open files: found, captured and rebuilt from outside the processes that hold them.
//!
//! Capture works on *frozen* processes, on descriptors fetched from them: a fetched descriptor
//! is the same open file description, so what is read is read from the original, and nothing in
//! it is changed except what [`Undo`] puts back. Rebuilding makes descriptors in the daemon; the
//! caller installs them in the new processes and then lets [`Rebuilt::finish`] do what only a
//! task of the VE can do. [`Rebuilt::release`] lets the network connections go on.
//!
//! One file per kernel object. What is not known here is a [`Blocker`], found by [`check`]
//! without touching the running VE.
//!
//! | object | kept | lost |
//! |---|---|---|
//! | regular file, directory, device | path, offset, flags, locks | |
//! | deleted file or directory | contents, one file stays one | |
//! | deleted symbolic link or socket node (`O_PATH`) | all | the socket that was bound to it |
//! | pipe, FIFO | data, packets, size | |
//! | eventfd, signalfd, timerfd | all | |
//! | epoll | all, closed and reused numbers too | order of the ready list |
//! | memfd | all | |
//! | pidfd | of living, dead and collected processes | |
//! | namespace | those that a process is in | |
//! | message queue (POSIX) | all | the value of a notification |
//! | inotify | watches with their numbers | queued events |
//! | fanotify | marks | queued events |
//! | unix socket | data, descriptors and credentials in flight, names, waiting clients | |
//! | TCP | unread, unacknowledged and unsent data, options, connections not yet accepted | |
//! | UDP, UDP-Lite | addresses, queue, groups | |
//! | raw, ping and packet sockets | addresses, options, groups | queue |
//! | netlink | groups, port, questions without an answer | news |
//! | tun and tap | the queues of a link, frames that wait | filters are refused |
//! | pseudo terminal | settings, data in both directions, session | |

use std::{collections::HashMap, os::fd::BorrowedFd};

#[cfg(doc)]
use ckpt_format::blocker::Blocker;

mod address;
mod anonymous;
mod capture;
mod corked;
mod deleted;
mod epoll;
mod event;
mod fanotify;
mod find;
mod frames;
mod gone;
mod info;
mod inotify;
mod interpreters;
mod lock;
mod mailbox;
mod memfd;
mod multicast;
mod nameless;
mod netlink;
mod nsfs;
mod options;
mod packet;
mod path;
mod pieces;
mod pipe;
mod places;
mod process;
mod rebuild;
mod remote;
mod room;
mod search;
mod socket;
mod spent;
mod table;
mod tables;
mod tcp;
mod terminal;
#[cfg(test)]
mod testing;
#[cfg(test)]
mod tests;
#[cfg(test)]
mod tests_datagrams;
#[cfg(test)]
mod tests_names;
#[cfg(test)]
mod tests_network;
mod timer;
mod tun;
mod udp;
mod unix;
mod waiting_error;
mod watched;

pub use capture::{Captured, Undo, capture, check, mend};
pub use rebuild::{RebuildError, Rebuilt, Released, Target, open_inside, rebuild};
pub use remote::{Argument, Remote};
pub use room::make_room;
pub use socket::unsent;
pub use tcp::{Early, Resting};

/// The processes whose files are looked at.
#[derive(Debug)]
pub struct Source<'a> {
    /// All processes of the VE; zombies may be left out.
    pub processes: Vec<Holder<'a>>,
    /// Since when none of them runs, as CLOCK_MONOTONIC of the host, so that what is open stays so
    /// while it is looked at. None for a VE that runs.
    pub stopped_ns: Option<i64>,
    /// The VE's init, as the host numbers processes: whose namespaces are the VE's.
    pub init: i32,
    /// The host's number of the VE's user and group 0.
    pub id_base: u32,
    /// The mount namespace of each mount of the VE, see
    /// [`Spaces::mounts`](crate::container::Spaces::mounts); `None` is those of init alone.
    pub mounts: Option<HashMap<u64, u32>>,
    /// The namespaces that programs have made, see
    /// [`Spaces::numbers`](crate::container::Spaces::numbers).
    pub namespaces: HashMap<u64, (&'static str, u32)>,
    /// The network namespaces that programs have made, see
    /// [`Spaces::networks`](crate::container::Spaces::networks).
    pub networks: Vec<BorrowedFd<'a>>,
    /// The IPC namespaces that programs have made, see
    /// [`Spaces::ipcs`](crate::container::Spaces::ipcs).
    pub ipcs: Vec<BorrowedFd<'a>>,
}

/// One process that may hold files.
#[derive(Clone, Debug)]
pub struct Holder<'a> {
    /// Its number on the host, or that of a thread if the first one has ended.
    pub host_pid: i32,
    /// By which number the kernel names it to others: that of its first thread.
    pub named: i32,
    /// Its number inside the VE.
    pub pid: i32,
    /// Its command name, for messages.
    pub command: String,
    /// A pidfd of it.
    pub pidfd: BorrowedFd<'a>,
}

impl Source<'_> {
    /// The number inside the VE of a user or group; 65534 (nobody) for one that is outside it.
    fn inside(&self, id: u32) -> u32 {
        id.checked_sub(self.id_base).unwrap_or(65534)
    }

    /// In how many pid namespaces around that of the VE our `/proc` shows processes.
    fn depth(&self) -> std::io::Result<usize> {
        let status = crate::procfs::Status::read(self.init).map_err(std::io::Error::other)?;
        let seen = status.numbers("NSpid", 10).map_err(std::io::Error::other)?;
        Ok(seen.len().saturating_sub(1))
    }

    /// The number inside the VE of a thread, process or group that gets signals, by the kind of
    /// owner (`F_OWNER_*`) and its number on the host; none for one that is gone.
    fn owner_inside(&self, kind: i32, host: i32) -> std::io::Result<Option<i32>> {
        const THREAD: i32 = 0;
        const GROUP: i32 = 2;
        let depth = self.depth()?;
        let numbers = |host: i32, line: &'static str| {
            let status = crate::procfs::Status::read(host).ok()?;
            status.numbers(line, 10).ok()
        };
        let at_depth = |numbers: Vec<u64>| i32::try_from(*numbers.get(depth)?).ok();
        Ok(match kind {
            THREAD => numbers(host, "NSpid").and_then(at_depth),
            GROUP => self.processes.iter().find_map(|holder| {
                let numbers = numbers(holder.host_pid, "NSpgid")?;
                (numbers.first() == Some(&host.unsigned_abs().into())).then(|| at_depth(numbers))?
            }),
            _ => self.pid_inside(host),
        })
    }

    /// The number inside the VE of a process, by its number on the host.
    fn pid_inside(&self, host_pid: i32) -> Option<i32> {
        self.processes.iter().find(|holder| holder.named == host_pid).map(|holder| holder.pid)
    }
}
