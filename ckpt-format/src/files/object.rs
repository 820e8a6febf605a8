//! Files with and without a name, pipes, and the objects that only a descriptor names.

use serde::{Deserialize, Serialize};

use super::FileId;

/// Something that was opened by its name and is opened by it again.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PathFile {
    /// The path inside the VE; not always UTF-8.
    #[serde(with = "serde_bytes")]
    pub path: Vec<u8>,
    /// The offset in bytes; for directories the kernel's own cookie.
    pub offset: u64,
    /// The type bits of `st_mode`, to notice when the name shows something else now.
    pub file_type: u32,
    /// `st_rdev` of a device.
    pub device: u64,
    /// A file of pressure (PSI) with a trigger: it tells whoever polls it of stalls.
    #[serde(default)]
    pub trigger: bool,
    /// In `/proc`, of a process that is gone: it can be opened only while there is one with its number.
    #[serde(default)]
    pub process_gone: bool,
}

/// A pipe or FIFO.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pipe {
    /// The capacity in bytes (`F_GETPIPE_SZ`).
    pub size: u32,
    /// The bytes in it, in the packets that `O_DIRECT` writers made, or in one piece.
    pub packets: Vec<serde_bytes::ByteBuf>,
    /// The packets must stay apart.
    pub packet_mode: bool,
    /// Owner inside the VE (of one without a name).
    pub uid: u32,
    /// Group inside the VE.
    pub gid: u32,
    /// The name of a FIFO.
    pub fifo: Option<Fifo>,
    /// No writer is left, and a reader has seen one: `POLLHUP`.
    pub hung_up: bool,
}

/// Where a FIFO is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fifo {
    /// The path inside the VE.
    #[serde(with = "serde_bytes")]
    pub path: Vec<u8>,
    /// The name is gone; a FIFO of this mode is made and unlinked.
    pub deleted: bool,
    /// The mode bits.
    pub mode: u32,
}

/// A symbolic link, a device node, or what a unix socket was bound to, that has no name any more.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeletedNode {
    /// The name that it once had, inside the VE.
    #[serde(with = "serde_bytes")]
    pub path: Vec<u8>,
    /// Where a symbolic link leads to.
    pub target: Option<serde_bytes::ByteBuf>,
    /// Major and minor number of a character device; without this and a target, it is the node of a
    /// socket.
    #[serde(default)]
    pub device: Option<(u32, u32)>,
    /// The permission bits.
    pub mode: u32,
    /// Owner inside the VE.
    pub uid: u32,
    /// Group inside the VE.
    pub gid: u32,
}

/// The state of an eventfd(2).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct EventCounter {
    /// The counter.
    pub count: u64,
    /// `EFD_SEMAPHORE`.
    pub semaphore: bool,
}

/// The state of a timerfd_create(2) timer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Timer {
    /// `CLOCK_*`.
    pub clock: i32,
    /// `TFD_TIMER_*` of the last timerfd_settime(2).
    pub settime_flags: i32,
    /// Nanoseconds until the next expiry; 0 is disarmed.
    pub remaining_ns: u64,
    /// The period in nanoseconds; 0 is one shot.
    pub interval_ns: u64,
    /// Expirations that were not read yet.
    pub ticks: u64,
    /// When this was read: CLOCK_MONOTONIC of the source in nanoseconds.
    pub read_at_ns: i64,
}

/// One entry of an epoll set.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct EpollEntry {
    /// The number under which the file was added; it may name something else by now.
    pub fd: i32,
    /// What is watched.
    pub file: FileId,
    /// The events with `EPOLLET` and the like.
    pub events: u32,
    /// The caller's data.
    pub data: u64,
}

/// `EPIOCSPARAMS` of an epoll set.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BusyPoll {
    /// How long, in microseconds.
    pub microseconds: u32,
    /// The most packets in one go.
    pub packets: u16,
    /// Rather than by interrupts.
    pub preferred: bool,
}

/// One mark of a fanotify(7) group.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mark {
    /// How much is watched.
    pub scope: Scope,
    /// A path inside the VE that leads to it.
    #[serde(with = "serde_bytes")]
    pub path: Vec<u8>,
    /// The events that are told: `FAN_*`.
    pub mask: u64,
    /// Those that are not.
    pub ignored: u64,
    /// `FAN_MARK_EVICTABLE` and those about ignored events.
    pub flags: u32,
}

/// How much a [`Mark`] watches.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Scope {
    /// One file or directory.
    Inode,
    /// Everything in a mount.
    Mount,
    /// Everything in a file system.
    Filesystem,
}

/// One inotify(7) watch.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Watch {
    /// The watch descriptor.
    pub number: i32,
    /// The path inside the VE.
    #[serde(with = "serde_bytes")]
    pub path: Vec<u8>,
    /// `IN_*`.
    pub mask: u32,
    /// What is watched has no path any more, but this description of it is open.
    #[serde(default)]
    pub file: Option<FileId>,
}

/// A file of `/dev/net/tun`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TunFile {
    /// The device node.
    pub node: PathFile,
    /// The link that it is a queue of.
    pub queue: Option<TunQueue>,
}

/// A queue of a tun or tap link, and what the link has by its files alone.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TunQueue {
    /// The link's name.
    pub link: String,
    /// The flags of `TUNSETIFF`.
    pub flags: u16,
    /// The link stays when all its files are closed.
    pub persistent: bool,
    /// The queue takes no part for now.
    pub detached: bool,
    /// The link seems to be plugged in.
    pub carrier: bool,
    /// How much may be written and not passed on, in bytes.
    pub send_buffer: i32,
    /// The length of the `virtio_net_hdr` before each frame, if there is one.
    pub header_size: i32,
    /// That header is little-endian on every host.
    pub little_endian: bool,
    /// `TUN_F_*`: what the reader does in the place of the kernel.
    pub offload: u32,
    /// The filter of a tap (`TUNATTACHFILTER`), eight bytes for each instruction.
    #[serde(default, with = "serde_bytes")]
    pub filter: Vec<u8>,
    /// The frames that wait to be read, each as it would be read.
    pub frames: Vec<serde_bytes::ByteBuf>,
}
