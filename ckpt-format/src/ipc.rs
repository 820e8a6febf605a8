//! What an IPC namespace holds: System V memory, semaphores and messages, and POSIX message
//! queues.

use serde::{Deserialize, Serialize};

/// Everything in an IPC namespace but the contents of shared memory, which travel with the
/// memory of the processes.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ipc {
    /// Its limits: the names of files below `/proc/sys`, and their texts.
    pub limits: Vec<(String, String)>,
    /// shmget(2).
    pub segments: Vec<Segment>,
    /// semget(2).
    pub semaphores: Vec<SemaphoreSet>,
    /// msgget(2).
    pub queues: Vec<MessageQueue>,
    /// mq_open(3).
    pub mailboxes: Vec<Mailbox>,
}

/// Number, name and owners of a System V object. Ids are those inside the VE.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    /// The number by which programs use it.
    pub id: i32,
    /// The name by which programs find it; 0 for none.
    pub key: i32,
    /// The permission bits.
    pub mode: u16,
    /// Its owner.
    pub uid: u32,
    /// Its group.
    pub gid: u32,
    /// Who has made it.
    pub creator_uid: u32,
    /// In which group.
    pub creator_gid: u32,
}

/// A shared memory segment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Segment {
    /// The IPC namespace that it is in, see [`Namespaces`](crate::container::Namespaces).
    #[serde(default)]
    pub namespace: u32,
    /// Its number and owners.
    pub entry: Entry,
    /// Its size in bytes.
    pub size: u64,
    /// It goes when nobody has it attached any more (`IPC_RMID`).
    pub removed: bool,
    /// `SHM_LOCK`.
    pub locked: bool,
    /// The size of its huge pages in bytes (`SHM_HUGETLB`); 0 for one without. Only told where its
    /// contents are, in a [`SharedKind`](crate::memory::SharedKind).
    #[serde(default)]
    pub huge: u64,
}

/// A set of semaphores.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SemaphoreSet {
    /// Its number and owners.
    pub entry: Entry,
    /// The value of each.
    pub values: Vec<u16>,
}

/// What the end of a process adds to a semaphore (`SEM_UNDO`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SemaphoreUndo {
    /// The set.
    pub set: i32,
    /// Which semaphore of it.
    pub number: u16,
    /// What is added.
    pub adjustment: i32,
}

/// A queue of System V messages.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MessageQueue {
    /// Its number and owners.
    pub entry: Entry,
    /// How many bytes it may hold.
    pub bytes_max: u64,
    /// Type and text of each, oldest first.
    pub messages: Vec<(i64, serde_bytes::ByteBuf)>,
}

/// A POSIX message queue.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mailbox {
    /// Its name without the leading `/`; not always UTF-8.
    #[serde(with = "serde_bytes")]
    pub name: Vec<u8>,
    /// The name is gone; descriptors still refer to it.
    pub deleted: bool,
    /// The permission bits.
    pub mode: u32,
    /// Its owner inside the VE.
    pub uid: u32,
    /// Its group inside the VE.
    pub gid: u32,
    /// How many messages it may hold.
    pub messages_max: i64,
    /// How long one may be, in bytes.
    pub size_max: i64,
    /// Priority and text of each, in the order in which they are received.
    pub messages: Vec<(u32, serde_bytes::ByteBuf)>,
    /// Who wants to be told of the next message.
    pub notify: Option<Notify>,
}

/// A process that wants to be told of a message (mq_notify(3)).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Notify {
    /// The process inside the VE.
    pub pid: i32,
    /// The signal that it gets; 0 for none at all.
    pub signal: i32,
}
