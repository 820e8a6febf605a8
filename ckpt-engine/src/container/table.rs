//! From the mount tables of a container's namespaces to a plan of how to make them again.

use std::collections::HashMap;

use ckpt_format::{
    blocker::Blocker,
    container::{Filesystem, FilesystemKind, HOST_DEVICES, Mount, MountOption, Overlay},
};

use super::{ID_COUNT, devices, layers, mountinfo::Line};
use crate::sys::mount::attribute;

/// One mount namespace as found.
#[derive(Debug)]
pub(super) struct Table {
    /// Its mounts.
    pub(super) lines: Vec<Line>,
    /// What stands at the mount point of each now: type and device number.
    pub(super) nodes: Vec<Option<Node>>,
}

/// What a path leads to.
#[derive(Clone, Copy, Debug)]
pub(super) struct Node {
    pub(super) file_type: u32,
    /// Major and minor number of a device.
    pub(super) device: (u64, u64),
    /// Of a `/sys`: the inode of the loopback device that it shows, see
    /// [`sysfs::loopback`](super::sysfs::loopback).
    pub(super) loopback: Option<u64>,
    /// Of a whole `/proc`: the inode of the pid namespace that it shows.
    pub(super) pids: Option<u64>,
}

/// Makes plans of tables, the container's own first.
#[derive(Debug)]
pub(super) struct Reader {
    base: u32,
    /// Namespaces by inode: kind and number.
    namespaces: HashMap<u64, (&'static str, u32)>,
    /// The widest part of the cgroup tree that is mounted: what the VE sees as its top.
    cgroup_top: String,
    pub(super) filesystems: Vec<Filesystem>,
    /// Places in `filesystems` by device number.
    pub(super) known: HashMap<String, u32>,
    /// The device number of the VE's own files.
    root: Option<String>,
    pub(super) blockers: Vec<Blocker>,
    /// The numbers of network namespaces by the inode of the loopback device.
    pub(super) loopbacks: HashMap<u64, u32>,
    /// The numbers of pid namespaces by the device number of each `/proc`; `None` for those of
    /// namespaces that have ended.
    pub(super) procs: HashMap<String, Option<u32>>,
    /// The numbers of IPC namespaces by the device number of their message queues; empty if there
    /// is only one.
    pub(super) mailboxes: HashMap<String, u32>,
    /// No table but the container's own was read yet.
    reads_own: bool,
}

impl Reader {
    /// For a container whose ids start at `base`, with namespaces by inode: kind and number.
    pub(super) fn new(
        base: u32,
        own: &Table,
        namespaces: HashMap<u64, (&'static str, u32)>,
    ) -> Self {
        let roots = own.lines.iter().filter(|it| it.kind == "cgroup2").map(|it| it.root.as_str());
        Self {
            base,
            namespaces,
            cgroup_top: roots.min_by_key(|root| root.len()).unwrap_or("/").to_owned(),
            filesystems: Vec::new(),
            known: HashMap::new(),
            root: None,
            blockers: Vec::new(),
            loopbacks: HashMap::new(),
            procs: HashMap::new(),
            mailboxes: HashMap::new(),
            reads_own: true,
        }
    }

    /// Finds out which `/proc` is of which pid namespace, given those by inode. With only one
    /// there is nothing to be told apart.
    pub(super) fn look_into_procs(&mut self, tables: &[Table], pids: &HashMap<u64, u32>) {
        if pids.len() < 2 {
            return;
        }
        for table in tables {
            for (line, node) in table.lines.iter().zip(&table.nodes) {
                // What is covered shows nothing, and is mostly shown elsewhere.
                let Some(node) = node.filter(|_| line.kind == "proc" && line.root == "/") else {
                    continue;
                };
                let number = node.pids.and_then(|inode| pids.get(&inode).copied());
                let known = self.procs.entry(line.device.clone()).or_default();
                *known = known.or(number);
            }
        }
    }

    /// The mounts of a namespace in an order in which they can be attached.
    pub(super) fn read(&mut self, table: &Table) -> Vec<Mount> {
        let mut places = HashMap::new();
        let mut mounts = Vec::new();
        for index in attach_order(&table.lines) {
            let line = &table.lines[index];
            let node = table.nodes[index];
            let parent = places.get(&line.parent).copied().unwrap_or(0);
            match self.mount(line, node, parent) {
                Ok(mount) => {
                    places.insert(line.id, u32::try_from(mounts.len()).unwrap_or(0));
                    mounts.push(mount);
                }
                Err(object) => self.block(line, &object),
            }
        }
        self.reads_own = false;
        mounts
    }

    fn mount(&mut self, line: &Line, node: Option<Node>, parent: u32) -> Result<Mount, String> {
        if line.root.ends_with("//deleted") {
            return Err("a mount of a deleted file".to_owned());
        }
        let file_type = node.map_or(libc::S_IFDIR, |node| node.file_type);
        let device = host_device(line, node.filter(|_| file_type == libc::S_IFCHR))?;
        let (kind, root) = match device {
            Some(name) => (FilesystemKind::Device { name: name.to_owned() }, "/".to_owned()),
            None => match self.kind(line)? {
                FilesystemKind::Cgroup => (FilesystemKind::Cgroup, self.cgroup_root(line)),
                kind @ (FilesystemKind::Network | FilesystemKind::Namespace { .. }) => {
                    (kind, "/".to_owned())
                }
                kind => (kind, line.root.clone()),
            },
        };
        let network = self.network(line, node, &kind)?;
        let pids = self.pids(line, &kind)?;
        let ipc = self.ipc(line, &kind)?;
        let filesystem = self
            .filesystem(line, kind, (network, pids, ipc))
            .ok_or_else(|| "an id outside of those of the VE in its options".to_owned())?;
        Ok(Mount {
            point: line.point.clone(),
            parent,
            filesystem,
            root,
            file_type,
            attributes: attributes(&line.options),
            peers: line.shared,
            master: line.master,
            unbindable: line.unbindable,
            locked: false,
        })
    }

    fn is_own(&self, line: &Line) -> bool {
        self.known.contains_key(&line.device) || (self.reads_own && line.root == "/")
    }

    fn kind(&mut self, line: &Line) -> Result<FilesystemKind, String> {
        let root = self.root.get_or_insert_with(|| line.device.clone());
        match line.kind.as_str() {
            "overlay" if *root == line.device => Ok(FilesystemKind::Root),
            "overlay" => match layers::options(&line.super_options) {
                Ok(_) => Ok(FilesystemKind::Overlay(Overlay::default())),
                Err(object) => Err(object.to_owned()),
            },
            "tmpfs" => Ok(FilesystemKind::Tmpfs),
            "ramfs" => Ok(FilesystemKind::Ramfs),
            "proc" => Ok(FilesystemKind::Proc),
            "sysfs" => Ok(FilesystemKind::Sysfs),
            "devpts" => Ok(FilesystemKind::Devpts),
            "mqueue" => Ok(FilesystemKind::Mqueue),
            "cgroup2" => Ok(FilesystemKind::Cgroup),
            // Of the VE's own user namespace: its first process sees it, whole.
            "binfmt_misc" if self.is_own(line) => Ok(FilesystemKind::BinaryFormats),
            "nsfs" if inode_of_network(&line.root).is_some() => Ok(FilesystemKind::Network),
            "nsfs" => self.namespace(line),
            other => Err(format!("file system of type {other}")),
        }
    }

    /// The namespace whose file is mounted. None that has mounts itself: whether it can be mounted
    /// depends on which is older.
    fn namespace(&self, line: &Line) -> Result<FilesystemKind, String> {
        let number = line.root.split_once(":[").and_then(|(_, rest)| rest.strip_suffix(']'));
        let known = number.and_then(|inode| self.namespaces.get(&inode.parse().ok()?));
        match known {
            Some(&(kind, number)) if kind != "mnt" => {
                Ok(FilesystemKind::Namespace { kind: kind.to_owned(), number })
            }
            _ => Err(format!("the namespace {}", line.root)),
        }
    }

    /// The network that a file system is about.
    fn network(
        &self,
        line: &Line,
        node: Option<Node>,
        kind: &FilesystemKind,
    ) -> Result<u32, String> {
        match kind {
            FilesystemKind::Network => inode_of_network(&line.root)
                .and_then(|inode| self.namespaces.get(&inode))
                .map(|&(_, number)| number)
                .ok_or_else(|| "a network namespace that cannot be looked into".to_owned()),
            // With one network there is nothing to be told apart.
            FilesystemKind::Sysfs if !self.loopbacks.is_empty() => {
                let loopback = node.and_then(|node| node.loopback);
                // Nothing can be seen of one that is covered, and of a part of one.
                Ok(loopback.and_then(|inode| self.loopbacks.get(&inode).copied()).unwrap_or(0))
            }
            _ => Ok(0),
        }
    }

    /// The pid namespace that a `/proc` is of.
    fn pids(&self, line: &Line, kind: &FilesystemKind) -> Result<u32, String> {
        if *kind != FilesystemKind::Proc || self.procs.is_empty() {
            return Ok(0);
        }
        let known = self.procs.get(&line.device).copied().flatten();
        known.ok_or_else(|| "a /proc that does not show whose processes it is about".to_owned())
    }

    /// The IPC namespace that message queues are of.
    fn ipc(&self, line: &Line, kind: &FilesystemKind) -> Result<u32, String> {
        if *kind != FilesystemKind::Mqueue || self.mailboxes.is_empty() {
            return Ok(0);
        }
        let known = self.mailboxes.get(&line.device).copied();
        known.ok_or_else(|| "message queues of an IPC namespace that has ended".to_owned())
    }

    /// The number of the line's file system, which is added if it is new.
    fn filesystem(
        &mut self,
        line: &Line,
        kind: FilesystemKind,
        (network, pids, ipc): (u32, u32, u32),
    ) -> Option<u32> {
        // Device nodes of the host share one file system there; here each stands alone.
        let key = match &kind {
            FilesystemKind::Device { name } => format!("device {name}"),
            // So do all namespaces.
            FilesystemKind::Network | FilesystemKind::Namespace { .. } => line.root.clone(),
            _ => line.device.clone(),
        };
        if let Some(&known) = self.known.get(&key) {
            return Some(known);
        }
        let options = match kind {
            FilesystemKind::Tmpfs
            | FilesystemKind::Ramfs
            | FilesystemKind::Devpts
            | FilesystemKind::Proc => self.options(&line.super_options)?,
            FilesystemKind::Overlay(_) => layers::options(&line.super_options).ok()?,
            _ => Vec::new(),
        };
        let number = u32::try_from(self.filesystems.len()).ok()?;
        let source = line.source.clone();
        self.filesystems.push(Filesystem { kind, source, options, network, pids, ipc });
        self.known.insert(key, number);
        Some(number)
    }

    /// The options of a file system with the ids as the VE sees them. `None` for a foreign id.
    fn options(&self, options: &str) -> Option<Vec<MountOption>> {
        let mut found = Vec::new();
        for option in options.split(',') {
            let (name, value) = match option.split_once('=') {
                Some((name, value)) => (name, Some(value)),
                None => (option, None),
            };
            let value = match (name, value) {
                ("rw" | "newinstance" | "relatime", _) => continue,
                ("uid" | "gid", Some(id)) => {
                    let id = id.parse::<u32>().ok()?.checked_sub(self.base)?;
                    Some((id < ID_COUNT).then(|| id.to_string())?)
                }
                (_, value) => value.map(str::to_owned),
            };
            found.push(MountOption { name: name.to_owned(), value });
        }
        Some(found)
    }

    /// The part of the cgroup tree that a mount shows, from what the VE sees as the top. The
    /// host reads the path from its own top.
    fn cgroup_root(&self, line: &Line) -> String {
        match line.root.strip_prefix(&self.cgroup_top) {
            None | Some("") => "/".to_owned(),
            Some(rest) if rest.starts_with('/') => rest.to_owned(),
            Some(_) => line.root.clone(),
        }
    }

    fn block(&mut self, line: &Line, object: &str) {
        self.blockers.push(unmovable(object, &line.point));
    }
}

/// A mount that cannot be made again elsewhere.
pub(super) fn unmovable(object: &str, point: &str) -> Blocker {
    Blocker {
        pid: 1,
        command: "init".to_owned(),
        fd: None,
        object: format!("{object} mounted on {point}"),
        hint: format!("unmount {point} inside the VE"),
    }
}

/// The name of the host's device node that is mounted, if it is one.
fn host_device(line: &Line, node: Option<Node>) -> Result<Option<&'static str>, String> {
    let known = |(_, major, minor): &&(&str, u32, u32)| {
        node.is_some_and(|node| node.device == (u64::from(*major), u64::from(*minor)))
    };
    let named =
        |(name, ..): &&(&str, u32, u32)| line.root.strip_prefix('/').is_some_and(|it| it == *name);
    let found = match (node, line.kind.as_str()) {
        (Some(_), _) => HOST_DEVICES.iter().find(known),
        // Something is mounted over it, so nobody can look.
        (None, "devtmpfs") => HOST_DEVICES.iter().find(named),
        (None, "tmpfs") if line.source == devices::SOURCE => {
            return Ok(HOST_DEVICES.iter().find(named).map(|(name, ..)| *name));
        }
        (None, _) => return Ok(None),
    };
    match (found, node) {
        (Some((name, ..)), _) => Ok(Some(name)),
        // A node of the VE's own that stands for nothing.
        (None, Some(Node { device: (0, 0), .. })) => Ok(None),
        (None, Some(Node { device: (major, minor), .. })) => Err(format!("device {major}:{minor}")),
        (None, None) => Err(format!("device {}", line.root)),
    }
}

/// The number of a network namespace: "net:[4026532281]".
fn inode_of_network(root: &str) -> Option<u64> {
    root.strip_prefix("net:[")?.strip_suffix(']')?.parse().ok()
}

/// An order in which every mount can be attached by its path: parents before what is on them,
/// and of the mounts on one parent the deeper first, because one further up would hide it.
fn attach_order(lines: &[Line]) -> Vec<usize> {
    let mut below: HashMap<u32, Vec<usize>> = HashMap::new();
    for (index, line) in lines.iter().enumerate() {
        if line.parent != line.id {
            below.entry(line.parent).or_default().push(index);
        }
    }
    for children in below.values_mut() {
        // Taken from the end; of those as deep as each other the oldest first.
        let depth = |index: usize| lines[index].point.matches('/').count();
        children.sort_by_key(|&index| (depth(index), std::cmp::Reverse(index)));
    }
    let known = |id| lines.iter().any(|other| other.id == id);
    let top = lines.iter().position(|line| line.parent == line.id || !known(line.parent));
    let mut order = Vec::new();
    let mut pending: Vec<usize> = top.into_iter().collect();
    while let Some(index) = pending.pop() {
        order.push(index);
        // Each mount is found once, so that a damaged table cannot be a loop.
        pending.extend(below.remove(&lines[index].id).unwrap_or_default());
    }
    order
}

fn attributes(options: &str) -> u64 {
    let mut bits = 0;
    for option in options.split(',') {
        bits |= match option {
            "ro" => attribute::RDONLY,
            "nosuid" => attribute::NOSUID,
            "nodev" => attribute::NODEV,
            "noexec" => attribute::NOEXEC,
            "noatime" => attribute::NOATIME,
            "nodiratime" => attribute::NODIRATIME,
            "nosymfollow" => attribute::NOSYMFOLLOW,
            _ => 0,
        };
    }
    // The kernel shows relatime as a word and strictatime as the absence of any.
    if !options.split(',').any(|option| option == "relatime" || option == "noatime") {
        bits |= attribute::STRICTATIME;
    }
    bits
}
