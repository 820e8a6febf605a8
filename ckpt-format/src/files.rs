//! Open file descriptions and the objects behind them.
//!
//! An open file description is a [`File`]; descriptor tables refer to it by [`FileId`], and so
//! do queues that carry descriptors and epoll sets. What several descriptions share (a pipe, a
//! deleted file, a terminal) is kept once and referred to by its index.

use serde::{Deserialize, Serialize};

use crate::{ipc::Ipc, memory::SharedObject};

mod interpreters;
mod object;
mod socket;
mod terminal;

pub use interpreters::*;
pub use object::*;
pub use socket::*;
pub use terminal::*;

/// One open file description, unique in one capture: its index in [`Files::files`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct FileId(pub u32);

/// Everything that the descriptor tables of a VE refer to.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Files {
    /// The open file descriptions; the place in the list is the [`FileId`].
    pub files: Vec<File>,
    /// Pipes and FIFOs, referred to by [`Kind::Pipe`].
    pub pipes: Vec<Pipe>,
    /// The memfds and the files without a name that descriptors refer to. Their contents travel
    /// with the shared memory, under the same [`SharedObject::id`].
    #[serde(default)]
    pub unnamed: Vec<SharedObject>,
    /// Symbolic links and socket nodes without a name, referred to by [`Kind::DeletedNode`].
    #[serde(default)]
    pub nodes: Vec<DeletedNode>,
    /// Pseudo terminals, referred to by [`Kind::PtyMaster`] and [`Kind::PtySlave`].
    pub terminals: Vec<Terminal>,
    /// POSIX record locks, which belong to a process and not to a description.
    pub record_locks: Vec<RecordLock>,
    /// What is known by a number or a name in the VE's IPC namespace.
    #[serde(default)]
    pub ipc: Ipc,
    /// The same for those that programs have made, without the VE's own; see
    /// [`Nested::ipcs`](crate::container::Nested::ipcs).
    #[serde(default)]
    pub nested_ipcs: Vec<Ipc>,
    /// Which programs run files of which kinds.
    #[serde(default)]
    pub interpreters: Vec<Interpreters>,
}

impl Files {
    /// The description with this id, if there is one.
    pub fn get(&self, id: FileId) -> Option<&File> {
        self.files.get(usize::try_from(id.0).ok()?)
    }

    /// What is in each IPC namespace, by its number.
    pub fn ipcs(&self) -> impl Iterator<Item = &Ipc> {
        std::iter::once(&self.ipc).chain(&self.nested_ipcs)
    }

    /// What is in the IPC namespace with this number, to be changed.
    pub fn ipc_mut(&mut self, number: u32) -> Option<&mut Ipc> {
        match usize::try_from(number).ok()?.checked_sub(1) {
            None => Some(&mut self.ipc),
            Some(place) => self.nested_ipcs.get_mut(place),
        }
    }
}

/// One open file description.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct File {
    /// The flags as `F_GETFL` tells them.
    pub flags: u32,
    /// Who gets `SIGIO`, when somebody does.
    pub owner: Option<SignalOwner>,
    /// `F_GETSIG`: the signal instead of `SIGIO`; 0 is `SIGIO`.
    pub signal: i32,
    /// Locks that belong to the description: flock(2) and `F_OFD_SETLK`.
    pub locks: Vec<DescriptionLock>,
    /// `F_GETLEASE`: `F_RDLCK` or `F_WRLCK`, when there is a lease on it.
    pub lease: Option<i32>,
    /// The mount namespace that its path is looked up in: see
    /// [`Namespaces`](crate::container::Namespaces).
    #[serde(default)]
    pub mounts: u32,
    /// The network namespace that a socket, or the link of a file of `/dev/net/tun`, is in, in the
    /// same way.
    #[serde(default)]
    pub network: u32,
    /// `F_GET_RW_HINT` of its inode: how long the data in it are expected to live (`RWH_*`).
    #[serde(default)]
    pub write_hint: u64,
    /// What it is.
    pub kind: Kind,
}

/// The receiver of `SIGIO`, set by `F_SETOWN_EX`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SignalOwner {
    /// `F_OWNER_TID`, `F_OWNER_PID` or `F_OWNER_PGRP`.
    pub kind: i32,
    /// The thread, process or group inside the VE.
    pub pid: i32,
}

/// A lock that belongs to an open file description.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DescriptionLock {
    /// Exclusive, or shared.
    pub exclusive: bool,
    /// The bytes of an `F_OFD_SETLK` lock (start and length, 0 is to the end); none for flock(2).
    pub range: Option<(u64, u64)>,
}

/// A lock set by `F_SETLK`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RecordLock {
    /// The process that holds it.
    pub pid: i32,
    /// A descriptor of that process for the locked file.
    pub fd: i32,
    /// Exclusive, or shared.
    pub exclusive: bool,
    /// The first byte.
    pub start: u64,
    /// How many bytes; 0 is to the end of the file.
    pub length: u64,
}

/// The kinds of open file descriptions.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Kind {
    /// Something opened by its name: a file, a directory, a device.
    Path(PathFile),
    /// A file that has no name any more.
    Deleted {
        /// [`SharedObject::id`] in [`Files::unnamed`].
        object: u64,
        /// The offset in bytes.
        offset: u64,
    },
    /// A directory that has no name any more: an empty one.
    DeletedDirectory {
        /// The name that it once had, inside the VE.
        #[serde(with = "serde_bytes")]
        path: Vec<u8>,
    },
    /// An end of a pipe or FIFO; which end is told by the flags.
    Pipe {
        /// Index in [`Files::pipes`].
        pipe: u32,
    },
    /// eventfd(2).
    Event(EventCounter),
    /// timerfd_create(2).
    Timer(Timer),
    /// signalfd(2), with its mask.
    Signal {
        /// The signals, bit 0 is signal 1.
        mask: u64,
    },
    /// epoll_create(2), with the entries in the order of the kernel's list.
    Epoll {
        /// What is watched.
        entries: Vec<EpollEntry>,
        /// How devices are polled for it, if a program has set it.
        #[serde(default)]
        busy_poll: Option<BusyPoll>,
    },
    /// memfd_create(2).
    Memfd {
        /// [`SharedObject::id`] in [`Files::unnamed`].
        object: u64,
        /// The offset in bytes.
        offset: u64,
    },
    /// pidfd_open(2) of a process that still exists, if only as a zombie.
    Process {
        /// The process inside the VE.
        pid: i32,
        /// `PIDFD_THREAD` was given.
        thread: bool,
        /// The number of its inode, by which programs know the process again; 0 before Linux
        /// 6.9, where all pidfds have the same.
        #[serde(default)]
        inode: u64,
    },
    /// pidfd_open(2) of a process that is gone.
    GoneProcess {
        /// The wait status that it ended with.
        status: i32,
        /// `PIDFD_THREAD` was given.
        thread: bool,
    },
    /// A namespace, held open.
    Namespace {
        /// Its number, if it was made by a program; see
        /// [`Namespaces`](crate::container::Namespaces). It need not have a process then.
        #[serde(default)]
        number: Option<u32>,
        /// The name of its file below `/proc/PID/ns`.
        name: String,
        /// A process inside the VE that is in it.
        pid: i32,
    },
    /// mq_open(3).
    Mailbox {
        /// The IPC namespace that it is in.
        #[serde(default)]
        namespace: u32,
        /// Index in [`Ipc::mailboxes`] of that.
        mailbox: u32,
    },
    /// inotify_init(2).
    Inotify {
        /// The watches by ascending number.
        watches: Vec<Watch>,
    },
    /// fanotify_init(2).
    Fanotify {
        /// `FAN_REPORT_*`.
        flags: u32,
        /// `O_*` of the files that it would open.
        event_flags: u32,
        /// What is watched.
        marks: Vec<Mark>,
    },
    /// A unix socket.
    Unix(Box<UnixSocket>),
    /// A TCP socket.
    Tcp(Box<TcpSocket>),
    /// A UDP socket and its like, or a raw one.
    Udp(Box<UdpSocket>),
    /// A socket for frames.
    Packet(Box<PacketSocket>),
    /// A netlink socket.
    Netlink(Box<NetlinkSocket>),
    /// The master side of a pseudo terminal.
    PtyMaster {
        /// Index in [`Files::terminals`].
        terminal: u32,
    },
    /// The slave side of a pseudo terminal.
    PtySlave {
        /// Index in [`Files::terminals`].
        terminal: u32,
        /// It was opened as `/dev/tty`.
        by_controlling_name: bool,
    },
    /// A file of `/dev/net/tun`.
    Tun(Box<TunFile>),
    /// Something without contents that has no name any more, opened with `O_PATH`.
    DeletedNode {
        /// Index in [`Files::nodes`].
        node: u32,
    },
}

impl Kind {
    /// Its name, for people who want to know where time goes.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Path(_) => "files",
            Self::Deleted { .. } | Self::DeletedDirectory { .. } | Self::DeletedNode { .. } => {
                "deleted files"
            }
            Self::Pipe { .. } => "pipes",
            Self::Event(_) => "eventfds",
            Self::Timer(_) => "timerfds",
            Self::Signal { .. } => "signalfds",
            Self::Epoll { .. } => "epoll",
            Self::Memfd { .. } => "memfds",
            Self::Process { .. } | Self::GoneProcess { .. } => "pidfds",
            Self::Namespace { .. } => "namespaces",
            Self::Mailbox { .. } => "message queues",
            Self::Inotify { .. } => "inotify",
            Self::Fanotify { .. } => "fanotify",
            Self::Unix(_) => "unix",
            Self::Tcp(_) => "TCP",
            Self::Udp(_) => "UDP",
            Self::Packet(_) => "packet",
            Self::Netlink(_) => "netlink",
            Self::PtyMaster { .. } | Self::PtySlave { .. } => "terminals",
            Self::Tun(_) => "tun",
        }
    }
}
