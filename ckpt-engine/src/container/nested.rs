//! Namespaces below the container's own that are not about mounts. Made by its pid 1, which
//! joins each new one only for the moment that it takes to fill it.

use std::{
    fs::File,
    io::{self, Write},
    os::fd::{AsFd, OwnedFd},
};

use ckpt_format::container::{Clocks, Names, Nested, Waiting};
use nix::{
    fcntl::{OFlag, openat},
    sys::stat::Mode,
    unistd::sethostname,
};

use super::{
    bench::Bench,
    late::LateMount,
    mounts::{Failure, at},
    users,
};
use crate::sys::{
    clone::set_domainname,
    namespace::{join, unshare},
    users::Helper,
};

/// The host's `/proc`, also when that is no longer in sight.
#[derive(Debug)]
pub(super) struct Own(OwnedFd);

impl Own {
    /// To be called while the host's `/proc` is in sight.
    pub(super) fn find() -> io::Result<Self> {
        Ok(Self(File::open("/proc")?.into()))
    }

    /// The namespace of this kind that the caller is in now.
    pub(super) fn open(&self, kind: &str) -> io::Result<OwnedFd> {
        self.file(&format!("self/ns/{kind}"), OFlag::O_RDONLY)
    }

    /// The namespace of this kind that a process, as numbered on the host, is in now.
    pub(super) fn open_of(&self, host: i32, kind: &str) -> io::Result<OwnedFd> {
        self.file(&format!("{host}/ns/{kind}"), OFlag::O_RDONLY)
    }

    /// Writes a file of a process, as numbered on the host.
    pub(super) fn write(&self, host: i32, name: &str, text: &str) -> io::Result<()> {
        let mut file = File::from(self.file(&format!("{host}/{name}"), OFlag::O_WRONLY)?);
        // At once: the kernel takes no second part.
        file.write_all(text.as_bytes())
    }

    fn file(&self, path: &str, flags: OFlag) -> io::Result<OwnedFd> {
        Ok(openat(&self.0, path, flags | OFlag::O_CLOEXEC, Mode::empty())?)
    }

    /// A child that does something, and then waits for as long as it is kept.
    pub(super) fn helper(&self, work: impl FnOnce() -> io::Result<()>) -> io::Result<Helper> {
        Helper::start(self.0.as_fd(), work)
    }

    /// A child in a user namespace that does something, and then waits.
    pub(super) fn helper_in(
        &self,
        users: &OwnedFd,
        work: impl FnOnce() -> io::Result<()>,
    ) -> io::Result<Helper> {
        self.helper(|| {
            join(users.as_fd(), libc::CLONE_NEWUSER)?;
            // Its /proc would belong to the host otherwise.
            nix::sys::prctl::set_dumpable(true)?;
            work()
        })
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
    /// Users.
    pub users: Vec<OwnedFd>,
    /// The tops of cgroup namespaces, which are made when all cgroups are there.
    pub cgroups: Vec<String>,
    /// What can be mounted only when all pid namespaces, or all files, are there.
    pub late: Vec<LateMount>,
    /// What will be seen through these.
    pub waiting: Waiting,
    /// Where overlays are made, if there are any.
    pub bench: Option<Bench>,
    /// The user namespaces that pid namespaces belong to, which come with their first processes.
    pub pid_owners: Vec<u32>,
    /// Which user namespace each of `users` is in.
    pub user_parents: Vec<u32>,
    /// How far the clocks of time namespaces, which come with their first processes, are ahead of
    /// those of the container.
    pub times: Vec<Clocks>,
}

impl Handles {
    /// How many there are of each kind, and all of them in this order.
    pub(super) fn counted(&self) -> ([usize; 5], impl Iterator<Item = &OwnedFd>) {
        let all = [&self.mounts, &self.names, &self.ipcs, &self.networks, &self.users];
        (all.map(Vec::len), all.into_iter().flatten())
    }

    /// The opposite of [`Self::counted`]. `None` if there are not as many as counted.
    pub(super) fn from_counted(
        counts: [usize; 5],
        mut all: impl Iterator<Item = OwnedFd>,
    ) -> Option<Self> {
        let mut take = |count: usize| {
            let some: Vec<OwnedFd> = all.by_ref().take(count).collect();
            (some.len() == count).then_some(some)
        };
        let [mounts, names, ipcs, networks, users] = counts.map(&mut take);
        let this = Self {
            mounts: mounts?,
            names: names?,
            ipcs: ipcs?,
            networks: networks?,
            users: users?,
            ..Self::default()
        };
        all.next().is_none().then_some(this)
    }
}

impl Handles {
    /// One that the file of a mount is of, of other kinds than networks.
    pub(super) fn find(&self, own: &Own, kind: &str, number: u32) -> io::Result<OwnedFd> {
        let of = match kind {
            "uts" => &self.names,
            "ipc" => &self.ipcs,
            "user" => &self.users,
            _ => return Err(io::ErrorKind::InvalidInput.into()),
        };
        match usize::try_from(number).map_err(io::Error::other)?.checked_sub(1) {
            None => own.open(kind),
            Some(place) => of.get(place).ok_or(io::ErrorKind::InvalidInput)?.try_clone(),
        }
    }
}

/// Makes all but the mount namespaces.
pub(super) fn make(nested: &Nested, own: &Own) -> Result<Handles, Failure> {
    let users = users::make(&nested.users, own).map_err(at("make a namespace", "user"))?;
    let factory = Factory { own, users: &users };
    let owners = &nested.owners;
    let nothing = |_| Ok(());
    let names = |number: usize| set_names(&nested.names[number]);
    let ipcs = usize::try_from(nested.ipcs).unwrap_or(usize::MAX);
    let (uts, ipc, net) = (libc::CLONE_NEWUTS, libc::CLONE_NEWIPC, libc::CLONE_NEWNET);
    let names = factory.make(("uts", uts), nested.names.len(), &owners.names, names)?;
    let ipcs = factory.make(("ipc", ipc), ipcs, &owners.ipcs, nothing)?;
    let networks = factory.make(("net", net), nested.networks.len(), &owners.networks, nothing)?;
    Ok(Handles { names, ipcs, networks, users, ..Handles::default() })
}

/// The user namespace that the one with this place in [`Nested`] belongs to; `None` is the
/// container's own.
pub(super) fn owner<'a>(
    owners: &[u32],
    place: usize,
    users: &'a [OwnedFd],
) -> io::Result<Option<&'a OwnedFd>> {
    let number = owners.get(place).copied().unwrap_or(0);
    let Some(number) = usize::try_from(number).map_err(io::Error::other)?.checked_sub(1) else {
        return Ok(None);
    };
    users.get(number).map(Some).ok_or_else(|| io::ErrorKind::InvalidData.into())
}

/// What makes namespaces.
struct Factory<'a> {
    own: &'a Own,
    users: &'a [OwnedFd],
}

impl Factory<'_> {
    fn make(
        &self,
        (name, flag): (&'static str, libc::c_int),
        count: usize,
        owners: &[u32],
        fill: impl Fn(usize) -> io::Result<()>,
    ) -> Result<Vec<OwnedFd>, Failure> {
        let own = self.own;
        let back = own.open(name).map_err(at("keep the namespace", name))?;
        let mut made = Vec::new();
        for number in 0..count {
            let leave = || {
                unshare(flag)?;
                fill(number)
            };
            let make = || match owner(owners, number, self.users)? {
                Some(users) => own.open_of(own.helper_in(users, leave)?.host, name),
                None => {
                    leave()?;
                    own.open(name)
                }
            };
            made.push(make().map_err(at("make a namespace", name))?);
        }
        if !made.is_empty() {
            join(back.as_fd(), flag).map_err(at("return to the namespace", name))?;
        }
        Ok(made)
    }
}

/// Sets the names of the caller's UTS namespace.
pub(super) fn set_names(names: &Names) -> io::Result<()> {
    sethostname(&names.hostname)?;
    if !names.domainname.is_empty() {
        set_domainname(&names.domainname)?;
    }
    Ok(())
}
