//! Namespaces below the container's own that are not about mounts. Made by its pid 1, which
//! joins each new one only for the moment that it takes to fill it.

use std::{
    fs::File,
    io,
    os::fd::{AsFd, OwnedFd},
};

use ckpt_format::container::{Names, Nested};
use nix::{
    fcntl::{OFlag, openat},
    sys::stat::Mode,
    unistd::sethostname,
};

use super::mounts::{Failure, at};
use crate::sys::{
    clone::set_domainname,
    namespace::{join, unshare},
};

/// The calling process in the host's `/proc`, also when that is no longer in sight.
#[derive(Debug)]
pub(super) struct Own(OwnedFd);

impl Own {
    /// To be called while the host's `/proc` is in sight.
    pub(super) fn find() -> io::Result<Self> {
        Ok(Self(File::open("/proc/self/ns")?.into()))
    }

    /// The namespace of this kind that the caller is in now.
    pub(super) fn open(&self, kind: &str) -> io::Result<OwnedFd> {
        Ok(openat(&self.0, kind, OFlag::O_RDONLY | OFlag::O_CLOEXEC, Mode::empty())?)
    }
}

/// Namespaces by kind, each in the order of [`Nested`].
#[derive(Debug, Default)]
pub struct Handles {
    /// Mounts.
    pub mounts: Vec<OwnedFd>,
    /// Host and domain names.
    pub names: Vec<OwnedFd>,
    /// IPC.
    pub ipcs: Vec<OwnedFd>,
    /// Networks.
    pub networks: Vec<OwnedFd>,
}

impl Handles {
    /// How many there are of each kind, and all of them in this order.
    pub(super) fn counted(&self) -> ([usize; 4], impl Iterator<Item = &OwnedFd>) {
        let all = [&self.mounts, &self.names, &self.ipcs, &self.networks];
        (all.map(Vec::len), all.into_iter().flatten())
    }

    /// The opposite of [`Self::counted`]. `None` if there are not as many as counted.
    pub(super) fn from_counted(
        counts: [usize; 4],
        mut all: impl Iterator<Item = OwnedFd>,
    ) -> Option<Self> {
        let mut take = |count: usize| {
            let some: Vec<OwnedFd> = all.by_ref().take(count).collect();
            (some.len() == count).then_some(some)
        };
        let [mounts, names, ipcs, networks] = counts.map(&mut take);
        let this = Self { mounts: mounts?, names: names?, ipcs: ipcs?, networks: networks? };
        all.next().is_none().then_some(this)
    }
}

/// Makes all but the mount namespaces.
pub(super) fn make(nested: &Nested, own: &Own) -> Result<Handles, Failure> {
    let named = |names: &Names| set_names(names);
    let nothing = |(): &()| Ok(());
    let ipcs = usize::try_from(nested.ipcs).unwrap_or(usize::MAX);
    let networks = nested.networks.len();
    Ok(Handles {
        mounts: Vec::new(),
        names: kind(own, ("uts", libc::CLONE_NEWUTS), nested.names.iter(), named)?,
        ipcs: kind(own, ("ipc", libc::CLONE_NEWIPC), [(); 1].iter().cycle().take(ipcs), nothing)?,
        networks: kind(
            own,
            ("net", libc::CLONE_NEWNET),
            [(); 1].iter().cycle().take(networks),
            nothing,
        )?,
    })
}

fn kind<'a, T: 'a>(
    own: &Own,
    (name, flag): (&'static str, libc::c_int),
    wanted: impl Iterator<Item = &'a T>,
    fill: impl Fn(&T) -> io::Result<()>,
) -> Result<Vec<OwnedFd>, Failure> {
    let back = own.open(name).map_err(at("keep the namespace", name))?;
    let mut made = Vec::new();
    for wanted in wanted {
        let make = || {
            unshare(flag)?;
            fill(wanted)?;
            own.open(name)
        };
        made.push(make().map_err(at("make a namespace", name))?);
    }
    if !made.is_empty() {
        join(back.as_fd(), flag).map_err(at("return to the namespace", name))?;
    }
    Ok(made)
}

/// Sets the names of the caller's UTS namespace.
pub(super) fn set_names(names: &Names) -> io::Result<()> {
    sethostname(&names.hostname)?;
    if !names.domainname.is_empty() {
        set_domainname(&names.domainname)?;
    }
    Ok(())
}
