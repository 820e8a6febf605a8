//! How the files of a VE follow it: the steps that make a tree on the target equal to the one on
//! the source.
//!
//! A *tree* is one file system of the VE: 0 is its own files (what it has changed of its
//! template), n is the tmpfs at that place in
//! [`Container::filesystems`](crate::container::Container::filesystems). The steps must be taken
//! in the order in which they were made. They name things by their path from the top of their
//! tree, without a leading `/`; the empty path is the top itself. Ids are those inside the VE.
//!
//! Something that is on its way to another name, or whose name may only seem to be gone, is
//! *parked* under a number in between: it is in the tree no more, but keeps its contents.

use bytes::Bytes;
use serde::{Deserialize, Serialize};

/// The most file data in one record, in bytes. A larger one is refused.
pub const FILE_DATA_MAX: usize = 1 << 20;

/// The longest path in a record, in bytes. A longer one is refused.
pub const PATH_LENGTH_MAX: usize = 64 << 10;

/// The most bytes of names and values of extended attributes of one file.
pub const ATTRIBUTE_BYTES_MAX: usize = 256 << 10;

/// The most extended attributes of one file.
pub const ATTRIBUTE_COUNT_MAX: usize = 1024;

/// One step in one tree.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileRecord {
    /// Which tree.
    pub tree: u32,
    /// The step.
    pub step: Step,
}

/// What can be done to a tree.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Step {
    /// The name goes, with all below it. It need not exist.
    Remove {
        /// The name.
        #[serde(with = "serde_bytes")]
        path: Vec<u8>,
    },
    /// What has this name is parked.
    Park {
        /// The name.
        #[serde(with = "serde_bytes")]
        path: Vec<u8>,
        /// Its number from now on.
        number: u64,
    },
    /// What is parked gets a name, in place of whatever has it now.
    Place {
        /// Its number until now.
        number: u64,
        /// The name.
        #[serde(with = "serde_bytes")]
        path: Vec<u8>,
    },
    /// What is parked goes. It is never a directory.
    Discard {
        /// Its number.
        number: u64,
    },
    /// Something new gets a name, in place of whatever has it now.
    Make {
        /// The name.
        #[serde(with = "serde_bytes")]
        path: Vec<u8>,
        /// What it is.
        node: Node,
    },
    /// One more name for something that is no directory, in place of whatever has it now.
    Link {
        /// A name it has.
        #[serde(with = "serde_bytes")]
        existing: Vec<u8>,
        /// The new name.
        #[serde(with = "serde_bytes")]
        path: Vec<u8>,
    },
    /// A file gets this size; what is beyond the old one reads as zeros.
    Resize {
        /// The file.
        #[serde(with = "serde_bytes")]
        path: Vec<u8>,
        /// Its size in bytes.
        size: u64,
    },
    /// A part of a file.
    Data {
        /// The file.
        #[serde(with = "serde_bytes")]
        path: Vec<u8>,
        /// Where the part begins, in bytes.
        offset: u64,
        /// What it holds.
        data: Bytes,
    },
    /// A part of a file that holds zeros and needs no space.
    Hole {
        /// The file.
        #[serde(with = "serde_bytes")]
        path: Vec<u8>,
        /// Where the part begins, in bytes.
        offset: u64,
        /// How long it is, in bytes.
        length: u64,
    },
    /// Everything about a file but its contents.
    Describe {
        /// The file.
        #[serde(with = "serde_bytes")]
        path: Vec<u8>,
        /// What is known about it.
        attributes: Attributes,
    },
}

/// Something new in a tree.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Node {
    /// A file, empty at first.
    File,
    /// A directory. One that is `opaque` shows nothing of the template; another one is what it is
    /// in the template, if the template has it.
    Directory {
        /// Nothing of the template shows through.
        opaque: bool,
    },
    /// A symbolic link.
    Symlink {
        /// Where it points to.
        #[serde(with = "serde_bytes")]
        target: Vec<u8>,
    },
    /// A FIFO.
    Fifo,
    /// The name of a unix socket. Whoever makes the socket again binds it in its place.
    Socket,
    /// A device node.
    Device {
        /// A block device, or a character device.
        block: bool,
        /// The major number.
        major: u32,
        /// The minor number.
        minor: u32,
    },
}

/// Everything about a file but its contents.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Attributes {
    /// The permission bits with set-user-id, set-group-id and sticky.
    pub mode: u32,
    /// The user.
    pub uid: u32,
    /// The group.
    pub gid: u32,
    /// When it was last read.
    pub accessed: Timestamp,
    /// When its contents last changed.
    pub modified: Timestamp,
    /// All extended attributes that travel, by name.
    pub extended: Vec<ExtendedAttribute>,
}

/// A moment as file systems keep it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Timestamp {
    /// Seconds since 1970.
    pub seconds: i64,
    /// Nanoseconds of the second.
    pub nanoseconds: u32,
}

/// An extended attribute. Ids in the value are those inside the VE.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExtendedAttribute {
    /// The name with its class, e.g. `user.comment`.
    #[serde(with = "serde_bytes")]
    pub name: Vec<u8>,
    /// The value.
    #[serde(with = "serde_bytes")]
    pub value: Vec<u8>,
}

/// Whether an extended attribute belongs to the VE and so travels with it.
///
/// `trusted.*` is the host's (the overlay keeps its notes there), and so are the labels of the
/// host's security modules. An overlay of a program notes the origin of a file by its file handle,
/// which means another file, or none, on another host; without it nothing is lost but the number
/// that the file had before it was copied up.
#[must_use]
pub fn travels(name: &[u8]) -> bool {
    name.starts_with(b"user.") && name != b"user.overlay.origin"
        || [&b"security.capability"[..], b"system.posix_acl_access", b"system.posix_acl_default"]
            .contains(&name)
}
