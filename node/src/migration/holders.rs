//! Who may hold files in a VE.

use std::{
    collections::HashMap,
    os::fd::{AsFd, OwnedFd},
    path::Path,
};

use ckpt_engine::{
    files::{self, Holder},
    procfs,
    sys::{descriptor, task},
};
use ckpt_format::blocker::Blocker;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::blackout::CopyError;

/// The processes of a VE with descriptors for them.
#[derive(Default)]
pub(super) struct Holders(Vec<Entry>);

struct Entry {
    /// A thread of it that lives, by its number on the host: the first one, as long as that does.
    host: i32,
    /// The first one.
    named: i32,
    inner: i32,
    command: String,
    pidfd: OwnedFd,
    /// Whether the descriptor tells of the end of that thread, and not only of all of them: since
    /// Linux 6.9.
    of_thread: bool,
}

impl Holders {
    /// All that live in a cgroup now.
    pub(super) fn of(cgroup: &Path) -> Result<Self, CopyError> {
        Self::default().again(cgroup)
    }

    /// All that live in it now, without another look at those that did before.
    pub(super) fn again(self, cgroup: &Path) -> Result<Self, CopyError> {
        let list = |source| CopyError::Process { pid: 0, source };
        let mut before: HashMap<i32, _> = self.0.into_iter().map(|it| (it.named, it)).collect();
        let mut all = Vec::new();
        for named in procfs::cgroup_processes(cgroup).map_err(list)? {
            // A number can be another process's by now.
            if let Some(known) = before.remove(&named).filter(Entry::lives) {
                all.push(known);
                continue;
            }
            let Ok(status) = procfs::Status::read(named) else { continue };
            let (Ok(inner), Ok(name)) = (status.in_ve("NSpid"), status.text("Name")) else {
                continue;
            };
            let mut host = named;
            if status.text("State").is_ok_and(|state| state.starts_with('Z')) {
                match procfs::stand_in(named) {
                    Some(tid) => host = tid,
                    None => continue,
                }
            }
            let thread = descriptor::open_process(host, true);
            let of_thread = thread.is_ok();
            let pidfd = match thread.or_else(|_| task::pidfd_open(host)) {
                Ok(pidfd) => pidfd,
                // It ended after the list was read.
                Err(error) if error.raw_os_error() == Some(libc::ESRCH) => continue,
                Err(source) => return Err(CopyError::Process { pid: host, source }),
            };
            let command = name.to_owned();
            all.push(Entry { host, named, inner, command, pidfd, of_thread });
        }
        Ok(Self(all))
    }

    /// Their numbers on the host.
    pub(super) fn hosts(&self) -> impl Iterator<Item = i32> {
        self.0.iter().map(|it| it.host)
    }

    /// As those whose files are looked at.
    pub(super) fn source(&self, init: i32, id_base: u32) -> files::Source<'_> {
        let processes = self
            .0
            .iter()
            .map(|it| Holder {
                host_pid: it.host,
                named: it.named,
                pid: it.inner,
                command: it.command.clone(),
                pidfd: it.pidfd.as_fd(),
            })
            .collect();
        files::Source {
            processes,
            stopped_ns: None,
            init,
            id_base,
            mounts: None,
            namespaces: HashMap::new(),
            networks: Vec::new(),
            ipcs: Vec::new(),
        }
    }
}

/// What is said of processes that the host has put into the VE (`vzctl exec`), and that cannot move.
pub(super) fn strangers(hosts: &[i32]) -> Vec<Blocker> {
    let inner = |host| procfs::Status::read(host).and_then(|status| status.in_ve("NSpid"));
    let name = |host| procfs::read_text(host, "comm").unwrap_or_default().trim().to_owned();
    let stranger = |&host: &i32| Blocker {
        pid: inner(host).unwrap_or(0),
        command: name(host),
        fd: None,
        object: "process put into the VE by the host".to_owned(),
        hint: "wait for vzctl exec or enter to end".to_owned(),
    };
    hosts.iter().map(stranger).collect()
}

impl Entry {
    /// Whether its thread has not ended yet (`pidfd_open(2)`).
    fn lives(&self) -> bool {
        let mut ended = [PollFd::new(self.pidfd.as_fd(), PollFlags::POLLIN)];
        let is_there = || procfs::Stat::read(self.host).is_ok_and(|stat| stat.state != 'Z');
        poll(&mut ended, PollTimeout::ZERO) == Ok(0) && (self.of_thread || is_there())
    }
}
