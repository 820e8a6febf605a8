//! Who may hold files in a VE.

use std::{
    collections::HashMap,
    os::fd::{AsFd, OwnedFd},
    path::Path,
};

use ckpt_engine::{
    files::{self, Holder},
    procfs,
    sys::task,
};
use ckpt_format::blocker::Blocker;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::blackout::CopyError;

/// The processes of a VE with descriptors for them.
#[derive(Default)]
pub(super) struct Holders(Vec<(i32, i32, String, OwnedFd)>);

impl Holders {
    /// All that live in a cgroup now.
    pub(super) fn of(cgroup: &Path) -> Result<Self, CopyError> {
        Self::default().again(cgroup)
    }

    /// All that live in it now, without another look at those that did before.
    pub(super) fn again(self, cgroup: &Path) -> Result<Self, CopyError> {
        let list = |source| CopyError::Process { pid: 0, source };
        let mut before: HashMap<i32, _> = self.0.into_iter().map(|it| (it.0, it)).collect();
        let mut all = Vec::new();
        for host in procfs::cgroup_processes(cgroup).map_err(list)? {
            // A number can be another process's by now.
            if let Some(known) = before.remove(&host).filter(|(.., pidfd)| lives(pidfd)) {
                all.push(known);
                continue;
            }
            let Ok(status) = procfs::Status::read(host) else { continue };
            let (Ok(inner), Ok(name)) = (status.in_ve("NSpid"), status.text("Name")) else {
                continue;
            };
            if status.text("State").is_ok_and(|state| state.starts_with('Z')) {
                continue;
            }
            let pidfd = match task::pidfd_open(host) {
                Ok(pidfd) => pidfd,
                // It ended after the list was read.
                Err(error) if error.raw_os_error() == Some(libc::ESRCH) => continue,
                Err(source) => return Err(CopyError::Process { pid: host, source }),
            };
            all.push((host, inner, name.to_owned(), pidfd));
        }
        Ok(Self(all))
    }

    /// Their numbers on the host.
    pub(super) fn hosts(&self) -> impl Iterator<Item = i32> {
        self.0.iter().map(|(host, ..)| *host)
    }

    /// As those whose files are looked at.
    pub(super) fn source(&self, init: i32, id_base: u32) -> files::Source<'_> {
        let processes = self
            .0
            .iter()
            .map(|(host, inner, command, pidfd)| Holder {
                host_pid: *host,
                pid: *inner,
                command: command.clone(),
                pidfd: pidfd.as_fd(),
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

/// Whether a process has not ended yet (`pidfd_open(2)`).
fn lives(pidfd: &OwnedFd) -> bool {
    let mut ended = [PollFd::new(pidfd.as_fd(), PollFlags::POLLIN)];
    poll(&mut ended, PollTimeout::ZERO) == Ok(0)
}
