//! Which namespaces the processes of a running container are in.

use std::{
    collections::{HashMap, hash_map::Entry},
    ffi::{CStr, CString},
    fs::{self, File},
    io::{self, Read},
    os::{
        fd::{AsFd, AsRawFd, OwnedFd},
        unix::fs::{FileExt, MetadataExt},
    },
};

use ckpt_format::{
    blocker::Blocker,
    container::{Clocks, Mount, Namespaces, Owners, Users},
};
use nix::{
    fcntl::{OFlag, OpenHow, ResolveFlag, openat2},
    sys::{
        stat::{major, minor},
        statfs::{NSFS_MAGIC, fstatfs},
    },
};

use super::{
    capture::clock_offsets,
    mountinfo::Line,
    numbered::{ENDED, PidSpaces},
    read_proc, roots, sysfs,
    table::{Node, Table},
    users::{UserSpaces, inode_of},
};
use crate::{
    ipc, layered,
    procfs::{self, Status},
    sys::{
        namespace,
        program::descriptor::namespace_kind,
        users::{self, locked_mounts},
    },
};

/// The kinds of namespaces that a program in a container may have of its own, in the order of
/// [`Namespaces`].
const KINDS: [&str; 6] = ["mnt", "uts", "ipc", "net", "cgroup", "time"];

/// Where the networks are in [`KINDS`].
const NETWORKS: usize = 3;

/// Where the clocks are in it.
const TIMES: usize = 5;

/// The namespaces of a running container: its own, and those that programs in it have made.
#[derive(Debug, Default)]
pub struct Spaces {
    /// By kind as in [`KINDS`]: the namespaces, the container's own first.
    kinds: [Vec<OwnedFd>; 6],
    /// Their numbers by inode.
    numbers: [HashMap<u64, u32>; 6],
    mounts: Vec<MountTable>,
    users: UserSpaces,
    pids: PidSpaces,
    /// The user namespaces that the pid namespaces of programs belong to.
    pid_owners: Vec<u32>,
    /// By kind, without the container's own: the user namespaces that they belong to.
    owners: [Vec<u32>; 6],
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
            match this.add_process(*pid) {
                Err(error) if index > 0 && is_gone(&error) => (),
                done => done?,
            }
        }
        for pid in pids {
            this.add_held(*pid)?;
        }
        let mut own = None;
        // Those that a mount keeps can have mounts, too.
        while let Some(namespace) = this.kinds[0].get(this.mounts.len()) {
            let table = MountTable::open(namespace)?;
            let bound = table.bound(namespace)?;
            table.note_overlays(namespace, &mut own)?;
            this.mounts.push(table);
            bound.into_iter().try_for_each(|namespace| this.add_found(namespace))?;
        }
        this.find_owners()?;
        Ok(this)
    }

    fn find_owners(&mut self) -> io::Result<()> {
        for (kind, owners) in self.owners.iter_mut().enumerate() {
            for namespace in self.kinds[kind].iter().skip(1) {
                owners.push(self.users.owner(namespace.as_fd())?);
            }
        }
        self.pid_owners = self.pids.owners(&mut self.users)?;
        Ok(())
    }

    /// Those that a process holds open.
    fn add_held(&mut self, pid: i32) -> io::Result<()> {
        let Ok(entries) = fs::read_dir(format!("/proc/{pid}/fd")) else { return Ok(()) };
        for path in entries.flatten().map(|entry| entry.path()) {
            let names_one = fs::read_link(&path).is_ok_and(|link| {
                let link = link.to_string_lossy();
                [&KINDS[..4], &["user"]]
                    .concat()
                    .iter()
                    .any(|kind| link.strip_prefix(kind).is_some_and(|rest| rest.starts_with(":[")))
            });
            // It may be closed by now.
            if names_one && let Ok(opened) = File::open(&path) {
                self.add_found(opened.into())?;
            }
        }
        Ok(())
    }

    /// Adds one that nobody need be in. What is not the container's is left to others to refuse.
    fn add_found(&mut self, namespace: OwnedFd) -> io::Result<()> {
        let kind = match namespace_kind(namespace.as_fd())? {
            libc::CLONE_NEWUSER => {
                return match self.users.is_below(namespace.as_fd())? {
                    true => self.users.add(namespace).map(drop),
                    false => Ok(()),
                };
            }
            libc::CLONE_NEWNS => 0,
            libc::CLONE_NEWUTS => 1,
            libc::CLONE_NEWIPC => 2,
            libc::CLONE_NEWNET => NETWORKS,
            _ => return Ok(()),
        };
        let inode = inode_of(namespace.as_fd())?;
        let belongs = |users: &OwnedFd| self.users.is_below(users.as_fd());
        if self.numbers[kind].contains_key(&inode)
            || !users::owner(namespace.as_fd()).is_ok_and(|it| belongs(&it).unwrap_or(false))
        {
            return Ok(());
        }
        self.insert(kind, inode, namespace)
    }

    fn insert(&mut self, kind: usize, inode: u64, namespace: OwnedFd) -> io::Result<()> {
        let number = u32::try_from(self.kinds[kind].len()).map_err(io::Error::other)?;
        if let Entry::Vacant(place) = self.numbers[kind].entry(inode) {
            place.insert(number);
            self.kinds[kind].push(namespace);
        }
        Ok(())
    }

    /// All that can be told by a number: their kinds and numbers by inode.
    pub fn numbers(&self) -> HashMap<u64, (&'static str, u32)> {
        let named = KINDS[..4].iter().zip(&self.numbers);
        let all = named.flat_map(|(kind, of)| of.iter().map(|(&inode, &it)| (inode, (*kind, it))));
        all.chain(self.users.numbers().map(|(inode, it)| (inode, ("user", it)))).collect()
    }

    fn add_process(&mut self, pid: i32) -> io::Result<()> {
        let users = OwnedFd::from(File::open(format!("/proc/{pid}/ns/user"))?);
        // One of the host is told as foreign, because its pid namespace is, too.
        if !self.users.is_empty() && !self.users.is_below(users.as_fd())? {
            return Ok(());
        }
        self.users.add(users)?;
        self.pids.add_process(pid)?;
        let mut kinds = KINDS.iter().enumerate();
        kinds.try_for_each(|(kind, name)| self.add(kind, &format!("/proc/{pid}/ns/{name}")))?;
        // Nobody need have been born into it yet.
        self.add(TIMES, &format!("/proc/{pid}/ns/time_for_children"))
    }

    fn add(&mut self, kind: usize, path: &str) -> io::Result<()> {
        let inode = fs::metadata(path)?.ino();
        if !self.numbers[kind].contains_key(&inode) {
            let opened = OwnedFd::from(File::open(path)?);
            // It may be another one by now.
            let inode = inode_of(opened.as_fd())?;
            self.insert(kind, inode, opened)?;
        }
        Ok(())
    }

    /// The namespaces of a process; `None` if it is in one that was not there when the
    /// container was captured.
    pub fn number(&self, pid: i32) -> io::Result<Option<Namespaces>> {
        let mut found = [0; 6];
        for ((kind, name), found) in KINDS.iter().enumerate().zip(&mut found) {
            let inode = fs::metadata(format!("/proc/{pid}/ns/{name}"))?.ino();
            match self.numbers[kind].get(&inode) {
                Some(&number) => *found = number,
                None => return Ok(None),
            }
        }
        let [mounts, names, ipc, network, cgroup, time] = found;
        let born = fs::metadata(format!("/proc/{pid}/ns/time_for_children"))?.ino();
        let Some(&time_of_children) = self.numbers[TIMES].get(&born) else { return Ok(None) };
        let users = fs::metadata(format!("/proc/{pid}/ns/user"))?.ino();
        let Some(user) = self.users.number(users) else { return Ok(None) };
        let Some(own) = self.pids.of(pid)? else { return Ok(None) };
        let Some(children) = self.pids.of_children(pid, own)? else { return Ok(None) };
        Ok(Some(Namespaces {
            mounts,
            names,
            ipc,
            network,
            cgroup,
            user,
            pid: own,
            children,
            time,
            time_of_children,
        }))
    }

    /// The number of the pid namespace of a process that may have ended already.
    pub fn pids_of(&self, pid: i32) -> u32 {
        self.pids.of(pid).ok().flatten().unwrap_or(ENDED)
    }

    /// The numbers of pid namespaces by inode.
    pub(super) fn pid_numbers(&self) -> &HashMap<u64, u32> {
        self.pids.numbers()
    }

    /// One descriptor for each mount namespace, the container's own first.
    pub fn mount_namespaces(&self) -> &[OwnedFd] {
        &self.kinds[0]
    }

    /// The network namespaces that programs have made.
    pub fn networks(&self) -> &[OwnedFd] {
        self.kinds[NETWORKS].get(1..).unwrap_or_default()
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

    /// The IPC namespaces, the container's own first.
    pub fn ipc_namespaces(&self) -> &[OwnedFd] {
        &self.kinds[2]
    }

    /// The IPC namespaces that programs have made.
    pub fn ipcs(&self) -> &[OwnedFd] {
        self.kinds[2].get(1..).unwrap_or_default()
    }

    /// The numbers of the IPC namespaces by the device of their message queues; empty if there is
    /// only the container's own.
    pub(super) fn mailboxes(&self) -> io::Result<HashMap<String, u32>> {
        if self.ipcs().is_empty() {
            return Ok(HashMap::new());
        }
        let mut devices = HashMap::new();
        for (number, namespace) in (0..).zip(&self.kinds[2]) {
            if let Some(device) = ipc::device_of(namespace.as_fd())? {
                devices.insert(format!("{}:{}", major(device), minor(device)), number);
            }
        }
        Ok(devices)
    }

    /// The cgroups that the cgroup namespaces of programs have as their tops. `None` for one that
    /// cannot be made again.
    pub(super) fn cgroups(&self, init: i32, pids: &[i32]) -> io::Result<Vec<Option<String>>> {
        let mut members: Vec<Vec<i32>> = vec![Vec::new(); self.kinds[4].len()];
        if members.len() > 1 {
            for &pid in pids {
                let Ok(Some(of)) = self.number(pid) else { continue };
                let place = usize::try_from(of.cgroup).map_err(io::Error::other)?;
                members[place].push(pid);
            }
        }
        let namespaces = self.kinds[4].iter().zip(&members).skip(1);
        let root = |((namespace, members), owner): ((&OwnedFd, &Vec<i32>), &u32)| match owner {
            0 => roots::of(init, members, namespace),
            // Whoever is in there cannot make it in the VE's own user namespace.
            _ => Ok(None),
        };
        namespaces.zip(&self.owners[4]).map(root).collect()
    }

    /// How far the clocks of the time namespaces of programs are ahead of those of the container;
    /// `None` for one that cannot be made again.
    pub(super) fn times(&self, init: i32, pids: &[i32]) -> io::Result<Vec<Option<Clocks>>> {
        let own = clock_offsets(init)?;
        let mut found = vec![None; self.kinds[TIMES].len().saturating_sub(1)];
        let any = !found.is_empty();
        for &pid in pids.iter().filter(|_| any) {
            let Ok(Some(of)) = self.number(pid) else { continue };
            // The kernel shows the clocks of the children.
            let place = usize::try_from(of.time_of_children).map_err(io::Error::other)?;
            if let Some(place) = place.checked_sub(1) {
                found[place] = clock_offsets(pid).ok().map(|clocks| clocks.since(own));
            }
        }
        // Whoever makes it is in the container's own user namespace.
        let owners = self.owners[TIMES].iter();
        Ok(found.into_iter().zip(owners).map(|(it, &owner)| it.filter(|_| owner == 0)).collect())
    }

    /// The user namespaces that programs have made, in a container whose ids start at `base`.
    pub(super) fn users(&self, base: u32) -> io::Result<Vec<Users>> {
        self.users.describe(base)
    }

    /// Which user namespaces the others belong to.
    pub(super) fn owners(&self) -> Owners {
        let [mounts, names, ipcs, networks, _, _] = self.owners.clone();
        Owners { mounts, names, ipcs, networks, pids: self.pid_owners.clone() }
    }

    /// Tells of the mounts of a namespace of a program, which begins with its root, which of
    /// them are locked.
    pub(super) fn lock(&self, place: usize, mounts: &mut [Mount]) -> io::Result<()> {
        let owner = self.owners[0].get(place).copied().unwrap_or(0);
        let (Some(users), 1..) = (self.users.get(owner), owner) else { return Ok(()) };
        let Some((_, mounts)) = mounts.split_first_mut() else { return Ok(()) };
        // What was mounted last can be taken away first.
        let points = mounts.iter().rev().map(|mount| CString::new(mount.point.as_str()));
        let points = points.collect::<Result<Vec<_>, _>>()?;
        let points: Vec<&CStr> = points.iter().map(CString::as_c_str).collect();
        let locked = locked_mounts(users.as_fd(), self.kinds[0][place + 1].as_fd(), &points)?;
        for (mount, locked) in mounts.iter_mut().rev().zip(locked) {
            mount.locked = locked;
        }
        Ok(())
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

    /// The namespaces that mounts of it keep.
    fn bound(&self, namespace: &OwnedFd) -> io::Result<Vec<OwnedFd>> {
        let lines = self.text.lines().filter_map(Line::parse);
        let points: Vec<String> =
            lines.filter(|line| line.kind == "nsfs").map(|line| line.point).collect();
        if points.is_empty() {
            return Ok(Vec::new());
        }
        inside(namespace, |proc| {
            // One that something is mounted over is refused later.
            Ok(points.iter().filter_map(|point| open_bound(proc, point)).collect())
        })
    }

    /// Notes where overlays of programs are, for those who look at maps of files in them. `own` is
    /// the device number of the VE's own files, which the first table tells.
    fn note_overlays(&self, namespace: &OwnedFd, own: &mut Option<String>) -> io::Result<()> {
        let lines: Vec<Line> = self.text.lines().filter_map(Line::parse).collect();
        let top = lines.iter().find(|line| line.point == "/").map(|line| line.device.clone());
        let own = own.get_or_insert(top.unwrap_or_default());
        let overlays = lines.into_iter().filter(|it| it.kind == "overlay" && it.device != *own);
        let overlays = overlays.map(|line| (line.point, line.root)).collect();
        layered::remember(nix::sys::stat::fstat(namespace)?.st_ino, own, overlays);
        Ok(())
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

/// The namespace whose file is mounted at a path of the caller's tree.
fn open_bound(proc: &OwnedFd, path: &str) -> Option<OwnedFd> {
    let place = place(path)?;
    // Nothing else is ever opened.
    if fstatfs(&place).ok()?.filesystem_type() != NSFS_MAGIC {
        return None;
    }
    let how = OpenHow::new().flags(OFlag::O_RDONLY | OFlag::O_CLOEXEC);
    openat2(proc, format!("thread-self/fd/{}", place.as_raw_fd()).as_str(), how).ok()
}

/// What stands at the mount point of a line.
fn node(line: &Line) -> Option<Node> {
    let place = place(&line.point)?;
    let status = nix::sys::stat::fstat(&place).ok()?;
    let file_type = status.st_mode & libc::S_IFMT;
    let loopback = (line.kind == "sysfs").then(|| sysfs::loopback(place.as_fd())).flatten();
    let pids = (line.kind == "proc" && line.root == "/").then(|| pids_shown(&place)).flatten();
    let device = (major(status.st_rdev), minor(status.st_rdev));
    Some(Node { file_type, device, loopback, pids })
}

/// The inode of the pid namespace that a `/proc` shows: that of its first process.
fn pids_shown(proc: &OwnedFd) -> Option<u64> {
    let link = nix::fcntl::readlinkat(proc, "1/ns/pid").ok()?;
    link.to_str()?.strip_prefix("pid:[")?.strip_suffix(']')?.parse().ok()
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
    let mut spaces = PidSpaces::default();
    if spaces.add_process(init).is_err() {
        return Vec::new();
    }
    let mut blockers = Vec::new();
    for &pid in pids {
        let outside = spaces.add_process(pid).is_ok_and(|inside| !inside);
        let object = match parts_clocks(pid) {
            _ if outside => "pid namespace that is not of the VE",
            true => "time namespace for the children of one of several threads",
            false => continue,
        };
        blockers.push(Blocker {
            pid: Status::read(pid).and_then(|status| status.in_ve("NSpid")).unwrap_or(pid),
            command: command(pid),
            fd: None,
            object: object.to_owned(),
            hint: "stop the service, or let it run without isolation of its own".to_owned(),
        });
    }
    blockers
}

/// Whether a process with several threads bears children into another time namespace.
fn parts_clocks(pid: i32) -> bool {
    let threads = procfs::threads(pid).unwrap_or_default();
    let link = |tid: &i32, name: &str| procfs::link(pid, &format!("task/{tid}/ns/{name}")).ok();
    let elsewhere = |tid: &i32| {
        link(tid, "time").is_some_and(|own| link(tid, "time_for_children") != Some(own))
    };
    // The link names its kind.
    threads.len() > 1 && threads.iter().any(elsewhere)
}

fn command(pid: i32) -> String {
    read_proc(&format!("/proc/{pid}/comm")).unwrap_or_default().trim_end().to_owned()
}

/// Nobody is left whose namespaces these were: ended, or about to.
fn is_gone(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ESRCH))
}
