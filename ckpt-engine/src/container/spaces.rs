//! Which namespaces the processes of a running container are in.

use std::{
    collections::HashMap,
    fs::{self, File},
    io::{self, Read},
    os::{
        fd::{AsFd, AsRawFd, OwnedFd},
        unix::fs::{FileExt, MetadataExt},
    },
};

use ckpt_format::{blocker::Blocker, container::Namespaces};
use nix::{
    fcntl::{OFlag, OpenHow, ResolveFlag, openat, openat2},
    sys::stat::{Mode, major, minor},
};

use super::{
    mountinfo::Line,
    read_proc, sysfs,
    table::{Node, Table, inode_of_network},
};
use crate::sys::namespace;

/// The kinds of namespaces that a program in a container may have of its own, in the order of
/// [`Namespaces`].
const KINDS: [&str; 5] = ["mnt", "uts", "ipc", "net", "cgroup"];

/// Where the networks are in [`KINDS`].
const NETWORKS: usize = 3;

/// The kinds that all processes of a container must share.
const COMMON: [&str; 3] = ["user", "pid", "time"];

/// The namespaces of a running container: its own, and those that programs in it have made.
#[derive(Debug, Default)]
pub struct Spaces {
    /// By kind as in [`KINDS`]: the namespaces, the container's own first.
    kinds: [Vec<OwnedFd>; 5],
    /// Their numbers by inode.
    numbers: [HashMap<u64, u32>; 5],
    mounts: Vec<MountTable>,
}

/// An open mount table, with what it said when the container was captured.
#[derive(Debug)]
struct MountTable {
    file: File,
    text: String,
}

impl Spaces {
    /// Looks at all processes. Those that have ended are left out.
    pub fn of(init: i32, pids: &[i32]) -> io::Result<Self> {
        let mut this = Self::default();
        for (index, pid) in std::iter::once(&init).chain(pids).enumerate() {
            for (kind, name) in KINDS.iter().enumerate() {
                match this.add(kind, &format!("/proc/{pid}/ns/{name}")) {
                    Err(error) if index > 0 && is_gone(&error) => break,
                    done => done?,
                }
            }
        }
        for place in 0..this.kinds[0].len() {
            this.mounts.push(MountTable::open(&this.kinds[0][place])?);
        }
        this.add_mounted_networks()?;
        Ok(this)
    }

    /// Network namespaces that nobody is in, but that are mounted somewhere (`ip netns add`).
    fn add_mounted_networks(&mut self) -> io::Result<()> {
        for place in 0..self.mounts.len() {
            let lines: Vec<Line> =
                self.mounts[place].text.lines().filter_map(Line::parse).collect();
            for line in lines.iter().filter(|line| line.kind == "nsfs") {
                let Some(inode) = inode_of_network(&line.root) else { continue };
                if self.numbers[NETWORKS].contains_key(&inode) {
                    continue;
                }
                // What hides one is a blocker of the mount.
                let found = inside(&self.kinds[0][place], |proc| mounted(proc, &line.point, inode));
                if let Some(namespace) = found? {
                    let number = u32::try_from(self.kinds[NETWORKS].len());
                    self.numbers[NETWORKS].insert(inode, number.map_err(io::Error::other)?);
                    self.kinds[NETWORKS].push(namespace);
                }
            }
        }
        Ok(())
    }

    fn add(&mut self, kind: usize, path: &str) -> io::Result<()> {
        let inode = fs::metadata(path)?.ino();
        if !self.numbers[kind].contains_key(&inode) {
            let opened = File::open(path)?;
            // It may be another one by now.
            let inode = opened.metadata()?.ino();
            let number = u32::try_from(self.kinds[kind].len()).map_err(io::Error::other)?;
            if let std::collections::hash_map::Entry::Vacant(place) =
                self.numbers[kind].entry(inode)
            {
                place.insert(number);
                self.kinds[kind].push(opened.into());
            }
        }
        Ok(())
    }

    /// The namespaces of a process; `None` if it is in one that was not there when the
    /// container was captured.
    pub fn number(&self, pid: i32) -> io::Result<Option<Namespaces>> {
        let mut found = [0; 5];
        for ((kind, name), found) in KINDS.iter().enumerate().zip(&mut found) {
            let inode = fs::metadata(format!("/proc/{pid}/ns/{name}"))?.ino();
            match self.numbers[kind].get(&inode) {
                Some(&number) => *found = number,
                None => return Ok(None),
            }
        }
        let [mounts, names, ipc, network, cgroup] = found;
        Ok(Some(Namespaces { mounts, names, ipc, network, cgroup }))
    }

    /// One descriptor for each mount namespace, the container's own first.
    pub fn mount_namespaces(&self) -> &[OwnedFd] {
        &self.kinds[0]
    }

    /// The network namespaces that programs have made.
    pub fn networks(&self) -> &[OwnedFd] {
        self.kinds[NETWORKS].get(1..).unwrap_or_default()
    }

    /// The numbers of all network namespaces by inode.
    pub(super) fn network_numbers(&self) -> &HashMap<u64, u32> {
        &self.numbers[NETWORKS]
    }

    /// The numbers of all network namespaces by what `/sys` shows of them; empty if there is
    /// only the container's own.
    pub(super) fn loopbacks(&self) -> io::Result<HashMap<u64, u32>> {
        match self.networks() {
            [] => Ok(HashMap::new()),
            _ => (0..)
                .zip(&self.kinds[NETWORKS])
                .map(|(number, namespace)| Ok((sysfs::loopback_of(namespace)?, number)))
                .collect(),
        }
    }

    /// The UTS namespaces that programs have made.
    pub(super) fn names(&self) -> &[OwnedFd] {
        self.kinds[1].get(1..).unwrap_or_default()
    }

    /// How many IPC namespaces programs have made.
    pub(super) fn ipcs(&self) -> usize {
        self.kinds[2].len().saturating_sub(1)
    }

    /// How many cgroup namespaces programs have made.
    pub(super) fn cgroups(&self) -> usize {
        self.kinds[4].len().saturating_sub(1)
    }

    /// The mount namespaces, the container's own first.
    pub(super) fn tables(&self) -> io::Result<Vec<Table>> {
        self.kinds[0].iter().zip(&self.mounts).map(|(fd, table)| table.read(fd)).collect()
    }

    /// The mount namespace of each mount by its number in mountinfo. `None` once a mount was
    /// added, changed or removed since the container was captured.
    pub fn mounts(&self) -> io::Result<Option<HashMap<u64, u32>>> {
        let mut all = HashMap::new();
        for (number, table) in self.mounts.iter().enumerate() {
            if !table.is_unchanged()? {
                return Ok(None);
            }
            let number = u32::try_from(number).map_err(io::Error::other)?;
            let ids = table.text.lines().filter_map(|line| line.split(' ').next()?.parse().ok());
            all.extend(ids.map(|id: u64| (id, number)));
        }
        Ok(Some(all))
    }
}

impl MountTable {
    fn open(namespace: &OwnedFd) -> io::Result<Self> {
        let mut file = inside(namespace, |proc| {
            let how = OpenHow::new().flags(OFlag::O_RDONLY | OFlag::O_CLOEXEC);
            Ok(File::from(openat2(proc, "thread-self/mountinfo", how)?))
        })?;
        let mut text = String::new();
        file.read_to_string(&mut text)?;
        Ok(Self { file, text })
    }

    fn is_unchanged(&self) -> io::Result<bool> {
        let mut known = self.text.as_bytes();
        let mut buffer = [0; 4096];
        let mut offset = 0;
        loop {
            let count = self.file.read_at(&mut buffer, offset)?;
            if count == 0 {
                return Ok(known.is_empty());
            }
            match known.strip_prefix(&buffer[..count]) {
                Some(rest) => known = rest,
                None => return Ok(false),
            }
            offset += count as u64;
        }
    }

    fn read(&self, namespace: &OwnedFd) -> io::Result<Table> {
        let lines: Vec<Line> = self.text.lines().filter_map(Line::parse).collect();
        let nodes = inside(namespace, |_| Ok(lines.iter().map(node).collect()));
        Ok(Table { nodes: nodes?, lines })
    }
}

/// What stands at a path of the caller's tree, without anything on the way that leads elsewhere.
fn place(path: &str) -> Option<OwnedFd> {
    let how = OpenHow::new()
        .flags(OFlag::O_PATH | OFlag::O_CLOEXEC)
        .resolve(ResolveFlag::RESOLVE_NO_SYMLINKS | ResolveFlag::RESOLVE_NO_MAGICLINKS);
    openat2(nix::fcntl::AT_FDCWD, path, how).ok()
}

/// The network namespace that is mounted at a path of the caller's tree, if it is this one.
fn mounted(proc: &OwnedFd, path: &str, inode: u64) -> io::Result<Option<OwnedFd>> {
    let Some(place) = place(path) else { return Ok(None) };
    if nix::sys::stat::fstat(&place)?.st_ino != inode
        || nix::sys::statfs::fstatfs(&place)?.filesystem_type() != nix::sys::statfs::NSFS_MAGIC
    {
        return Ok(None);
    }
    let number = place.as_raw_fd();
    let path = format!("thread-self/fd/{number}");
    Ok(Some(openat(proc, path.as_str(), OFlag::O_RDONLY | OFlag::O_CLOEXEC, Mode::empty())?))
}

/// What stands at the mount point of a line.
fn node(line: &Line) -> Option<Node> {
    let place = place(&line.point)?;
    let status = nix::sys::stat::fstat(&place).ok()?;
    let file_type = status.st_mode & libc::S_IFMT;
    let loopback = (line.kind == "sysfs").then(|| sysfs::loopback(place.as_fd())).flatten();
    Some(Node { file_type, device: (major(status.st_rdev), minor(status.st_rdev)), loopback })
}

/// Runs `work` in a mount namespace, with the host's `/proc` in its hand.
fn inside<T: Send>(
    namespace: &OwnedFd,
    work: impl FnOnce(&OwnedFd) -> io::Result<T> + Send,
) -> io::Result<T> {
    let proc = OwnedFd::from(File::open("/proc")?);
    namespace::in_mounts_of(namespace, || work(&proc))
}

/// The processes of a container that are in namespaces of their own which cannot be made again
/// elsewhere.
pub fn foreign_namespaces(init: i32, pids: &[i32]) -> Vec<Blocker> {
    let of = |pid: i32, kind: &str| fs::read_link(format!("/proc/{pid}/ns/{kind}"));
    let Ok(own) = COMMON.iter().map(|kind| of(init, kind)).collect::<io::Result<Vec<_>>>() else {
        return Vec::new();
    };
    let mut blockers = Vec::new();
    for &pid in pids {
        let differs = |(kind, own): &(&&str, _)| of(pid, kind).is_ok_and(|it| it != *own);
        let kinds: Vec<&str> =
            COMMON.iter().zip(own.iter().cloned()).filter(differs).map(|(kind, _)| *kind).collect();
        if !kinds.is_empty() {
            blockers.push(Blocker {
                pid: inner_pid(pid).unwrap_or(pid),
                command: command(pid),
                fd: None,
                object: format!("{} namespace of its own", kinds.join(", ")),
                hint: "stop the service, or let it run without isolation of its own".to_owned(),
            });
        }
    }
    blockers
}

/// A process's number in its own pid namespace.
fn inner_pid(pid: i32) -> Option<i32> {
    let status = read_proc(&format!("/proc/{pid}/status")).ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("NSpid:"))?;
    line.split_whitespace().last()?.parse().ok()
}

fn command(pid: i32) -> String {
    read_proc(&format!("/proc/{pid}/comm")).unwrap_or_default().trim_end().to_owned()
}

/// Nobody is left whose namespaces these were: ended, or about to.
fn is_gone(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ESRCH))
}
