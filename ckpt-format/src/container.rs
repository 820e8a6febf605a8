//! The container around a VE's processes: its names, clocks, file systems and mounts.

mod cgroup;
mod mounts;
mod namespaces;
mod overlay;

use serde::{Deserialize, Serialize};

pub use self::{
    cgroup::{Cgroup, Setting},
    mounts::{Cover, Mount, Part, covers, inside, locked, parts},
    namespaces::{Children, IdRange, Names, Namespaces, Nested, Owners, Users},
    overlay::{Overlay, Waiting, late, made_late},
};

/// What a container looks like, as found on the source and made again on the target.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Container {
    /// The host name.
    pub hostname: String,
    /// The NIS domain name.
    pub domainname: String,
    /// What CLOCK_MONOTONIC and CLOCK_BOOTTIME show inside.
    pub clocks: Clocks,
    /// The date (CLOCK_REALTIME, in nanoseconds) when the clocks showed that; 0 if it was not read.
    #[serde(default)]
    pub date_ns: i64,
    /// The file systems that the mounts show.
    pub filesystems: Vec<Filesystem>,
    /// The mounts of the VE's own namespace, in an order in which they can be attached; the
    /// first is `/`.
    pub mounts: Vec<Mount>,
    /// The namespaces that programs in the VE have made.
    #[serde(default)]
    pub nested: Nested,
}

/// The readings of two clocks inside the VE, or the difference of two such readings.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Clocks {
    /// CLOCK_MONOTONIC in nanoseconds.
    pub monotonic_ns: i64,
    /// CLOCK_BOOTTIME in nanoseconds.
    pub boottime_ns: i64,
}

impl Clocks {
    /// How far these readings are ahead of others.
    #[must_use]
    pub fn since(self, other: Self) -> Self {
        Self {
            monotonic_ns: self.monotonic_ns.saturating_sub(other.monotonic_ns),
            boottime_ns: self.boottime_ns.saturating_sub(other.boottime_ns),
        }
    }
}

/// A file system: one superblock of the kernel, shown by one mount or several.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Filesystem {
    /// Which kind.
    pub kind: FilesystemKind,
    /// What mount tables show as its source; any text.
    #[serde(default)]
    pub source: String,
    /// Its own options, e.g. `size=64k`; ids in them are the VE's.
    pub options: Vec<MountOption>,
    /// Of which network namespace it is, for `/sys` and for one that is mounted itself: see
    /// [`Namespaces::network`].
    #[serde(default)]
    pub network: u32,
    /// Of which pid namespace it is, for `/proc`: see [`Namespaces::pid`].
    #[serde(default)]
    pub pids: u32,
    /// Of which IPC namespace it is, for POSIX message queues: see [`Namespaces::ipc`].
    #[serde(default)]
    pub ipc: u32,
}

impl Filesystem {
    /// True if its files are in memory, and travel with the VE.
    pub fn holds_files(&self) -> bool {
        matches!(self.kind, FilesystemKind::Tmpfs | FilesystemKind::Ramfs)
    }
}

/// One option of a file system.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MountOption {
    /// The name.
    pub name: String,
    /// The value, for options that have one.
    pub value: Option<String>,
}

/// The kinds of file systems that a container can have.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum FilesystemKind {
    /// The VE's own files, an overlay made by the host.
    Root,
    /// Files in memory.
    Tmpfs,
    /// Files in memory without a limit.
    Ramfs,
    /// `/proc`.
    Proc,
    /// `/sys`.
    Sysfs,
    /// Pseudo-terminals.
    Devpts,
    /// POSIX message queues.
    Mqueue,
    /// The VE's part of the cgroup tree.
    Cgroup,
    /// A network namespace that is mounted on a file, which keeps it without a process.
    Network,
    /// A namespace of another kind that is kept in the same way.
    Namespace {
        /// Which kind, as `/proc/PID/ns` names it.
        kind: String,
        /// Its number; see [`Nested`].
        number: u32,
    },
    /// A device node, by its name below `/dev`; see [`HOST_DEVICES`].
    Device {
        /// The name.
        name: String,
    },
    /// An overlay that a program has made.
    Overlay(Overlay),
    /// Which programs run files of which kinds (binfmt_misc): that of the VE's user namespace.
    BinaryFormats,
}

impl FilesystemKind {
    /// The kernel's name for it; that of the node for a device.
    pub fn name(&self) -> &str {
        match self {
            Self::Root => "root",
            Self::Tmpfs => "tmpfs",
            Self::Ramfs => "ramfs",
            Self::Proc => "proc",
            Self::Sysfs => "sysfs",
            Self::Devpts => "devpts",
            Self::Mqueue => "mqueue",
            Self::Cgroup => "cgroup2",
            Self::Network | Self::Namespace { .. } => "nsfs",
            Self::Device { name } => name,
            Self::Overlay(_) => "overlay",
            Self::BinaryFormats => "binfmt_misc",
        }
    }
}

/// The file types of `st_mode` that the mounts of a fresh VE have.
const S_IFDIR: u32 = 0o040_000;
const S_IFREG: u32 = 0o100_000;

/// The device nodes that a VE may have: name, major, minor.
pub const HOST_DEVICES: &[(&str, u32, u32)] = &[
    ("null", 1, 3),
    ("zero", 1, 5),
    ("full", 1, 7),
    ("random", 1, 8),
    ("urandom", 1, 9),
    ("tty", 5, 0),
    (TUN_DEVICE, 10, 200),
];

/// Device nodes that templates have besides those that every VE has: `console` and `ptmx`.
/// They give no access to anything of the host. `0:0` is how systemd and overlays hide a file.
const HARMLESS_DEVICES: [(u32, u32); 3] = [(5, 1), (5, 2), (0, 0)];

/// Whether a VE may have a node of this character device among its files.
pub fn may_have_device(number: (u32, u32)) -> bool {
    HOST_DEVICES.iter().any(|(_, major, minor)| (*major, *minor) == number)
        || HARMLESS_DEVICES.contains(&number)
}

/// The one of [`HOST_DEVICES`] that is not the host's own node, which may be for its root alone. It
/// makes links in the network of whoever opens it, and only for the root of that.
pub const TUN_DEVICE: &str = "net/tun";

impl Container {
    /// The place of the VE's own files in [`Self::filesystems`].
    pub fn root_filesystem(&self) -> Option<usize> {
        self.filesystems.iter().position(|filesystem| filesystem.kind == FilesystemKind::Root)
    }

    /// True if programs have made overlays.
    pub fn has_overlays(&self) -> bool {
        self.filesystems.iter().any(|it| matches!(it.kind, FilesystemKind::Overlay(_)))
    }

    /// The mounts of each mount namespace; the first is the VE's own.
    pub fn mount_tables(&self) -> impl Iterator<Item = &[Mount]> {
        std::iter::once(self.mounts.as_slice()).chain(self.nested.mounts.iter().map(Vec::as_slice))
    }

    /// What a VE has when it starts afresh.
    pub fn fresh(hostname: &str) -> Self {
        const RDONLY: u64 = 1;
        const NOSUID: u64 = 2;
        const NODEV: u64 = 4;
        const NOEXEC: u64 = 8;
        let none = NOSUID | NODEV | NOEXEC;
        let mut this = Self { hostname: hostname.to_owned(), ..Self::default() };
        this.add("/", FilesystemKind::Root, &[], 0);
        this.add("/proc", FilesystemKind::Proc, &[], none);
        // Read-only, because much below it is about the host; what is about the VE's own network
        // has its files under /proc/sys.
        this.add("/sys", FilesystemKind::Sysfs, &[], none | RDONLY);
        this.add("/sys/fs/cgroup", FilesystemKind::Cgroup, &[], none);
        this.add("/dev", FilesystemKind::Tmpfs, &[("mode", "755"), ("size", "1m")], NOSUID);
        for (name, ..) in HOST_DEVICES {
            let device = FilesystemKind::Device { name: (*name).to_owned() };
            this.add(&format!("/dev/{name}"), device, &[], NOSUID | NOEXEC);
        }
        // Init writes to its console; nobody reads this one, so it never blocks.
        let null = FilesystemKind::Device { name: "null".to_owned() };
        this.add("/dev/console", null, &[], NOSUID | NOEXEC);
        let pts = [("gid", "5"), ("mode", "620"), ("ptmxmode", "666")];
        this.add("/dev/pts", FilesystemKind::Devpts, &pts, NOSUID | NOEXEC);
        this.add("/dev/shm", FilesystemKind::Tmpfs, &[("mode", "1777")], NOSUID | NODEV);
        this.add("/dev/mqueue", FilesystemKind::Mqueue, &[], none);
        this.add("/run", FilesystemKind::Tmpfs, &[("mode", "755")], NOSUID | NODEV);
        let lock = [("mode", "1777"), ("size", "5m")];
        this.add("/run/lock", FilesystemKind::Tmpfs, &lock, none);
        this
    }

    /// The same without `/dev/console`, which is the one mount that not every init wants.
    #[must_use]
    pub fn without_console(mut self) -> Self {
        if let Some(place) = self.mounts.iter().position(|mount| mount.point == "/dev/console") {
            let gone = self.mounts.remove(place).filesystem;
            self.filesystems.remove(gone as usize);
            for mount in &mut self.mounts {
                mount.filesystem -= u32::from(mount.filesystem > gone);
                mount.parent -= u32::from(mount.parent as usize > place);
            }
        }
        self
    }

    fn add(
        &mut self,
        point: &str,
        kind: FilesystemKind,
        options: &[(&str, &str)],
        attributes: u64,
    ) {
        let directory = !matches!(kind, FilesystemKind::Device { .. });
        let options = options.iter().map(|(name, value)| MountOption {
            name: (*name).to_owned(),
            value: Some((*value).to_owned()),
        });
        let filesystem = u32::try_from(self.filesystems.len()).expect("a handful");
        let source = kind.name().to_owned();
        let options = options.collect();
        self.filesystems.push(Filesystem { kind, source, options, network: 0, pids: 0, ipc: 0 });
        let parent = mounts::parent(&self.mounts, point);
        self.mounts.push(Mount {
            point: point.to_owned(),
            parent,
            filesystem,
            root: "/".to_owned(),
            file_type: if directory { S_IFDIR } else { S_IFREG },
            attributes,
            peers: None,
            master: None,
            unbindable: false,
            locked: false,
        });
    }
}

/// The symbolic links that a fresh `/dev` has: name, what it points to.
pub const FRESH_LINKS: &[(&str, &str)] = &[
    ("/dev/ptmx", "pts/ptmx"),
    ("/dev/fd", "/proc/self/fd"),
    ("/dev/stdin", "/proc/self/fd/0"),
    ("/dev/stdout", "/proc/self/fd/1"),
    ("/dev/stderr", "/proc/self/fd/2"),
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_a_console_all_else_stands_where_it_stood() {
        let with = Container::fresh("ve");
        let without = with.clone().without_console();
        assert_eq!(without.mounts.len() + 1, with.mounts.len());
        assert_eq!(without.filesystems.len() + 1, with.filesystems.len());
        let seen = |plan: &Container, mount: &Mount| {
            let on = plan.mounts[mount.parent as usize].point.clone();
            (mount.point.clone(), on, plan.filesystems[mount.filesystem as usize].kind.clone())
        };
        for mount in &without.mounts {
            let before = with.mounts.iter().find(|it| it.point == mount.point).unwrap();
            assert_eq!(seen(&without, mount), seen(&with, before));
        }
    }
}
