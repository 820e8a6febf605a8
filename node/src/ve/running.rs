//! A VE that runs: its pid 1, its cgroups and its interface.

use std::{
    fs, io,
    os::fd::{AsFd, OwnedFd},
    sync::Arc,
};

use ckpt_engine::{container::ended, sys::clone::open_process};
use ckpt_format::network::Mac;
use serde::{Deserialize, Serialize};

use crate::{cgroup::Cgroups, network::Interface};

/// A VE that runs here.
#[derive(Clone, Debug)]
pub struct Running {
    /// Its pid 1, as the host numbers it.
    pub init: i32,
    /// A descriptor for its pid 1.
    pub pidfd: Arc<OwnedFd>,
    /// Its cgroups.
    pub cgroups: Cgroups,
    /// Its interface, if it has one.
    pub interface: Option<Interface>,
    /// When it was started, in seconds since 1970.
    pub started_s: u64,
}

/// What is written down about a running VE, for a daemon that comes later.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Record {
    pub(super) init: i32,
    /// Tells the process from a later one of the same number, together with `boot`.
    pub(super) start_time: u64,
    pub(super) boot: String,
    pub(super) cgroups: Cgroups,
    /// The interface's name on the host, and its hardware address inside.
    pub(super) interface: Option<(String, Mac)>,
    pub(super) started_s: u64,
}

impl Running {
    /// True if there is such a file or directory inside.
    pub(super) fn has(&self, path: &str) -> bool {
        super::start::exists_inside(self.init, path)
    }

    pub(super) fn record(&self) -> io::Result<Record> {
        Ok(Record {
            init: self.init,
            start_time: start_time(self.init)?,
            boot: boot()?,
            cgroups: self.cgroups.clone(),
            interface: self.interface.as_ref().map(|it| (it.host_name.clone(), it.mac)),
            started_s: self.started_s,
        })
    }
}

impl Record {
    /// A descriptor for the process, if it is still the one that was written down.
    pub(super) fn find(&self) -> Option<OwnedFd> {
        if boot().ok()? != self.boot {
            return None;
        }
        let process = open_process(self.init).ok()?;
        // Looked at after the descriptor was opened, so the number cannot change hands between.
        let same = start_time(self.init).ok()? == self.start_time;
        (same && !ended(process.as_fd())).then_some(process)
    }
}

/// When a process started, in ticks since the host did.
fn start_time(pid: i32) -> io::Result<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    // The name in parentheses can hold anything, even parentheses.
    let rest = stat.rsplit_once(')').map_or("", |(_, rest)| rest);
    let field = rest.split_whitespace().nth(19).and_then(|it| it.parse().ok());
    field.ok_or_else(|| io::ErrorKind::InvalidData.into())
}

/// Which life of the host this is.
fn boot() -> io::Result<String> {
    Ok(fs::read_to_string("/proc/sys/kernel/random/boot_id")?.trim().to_owned())
}
