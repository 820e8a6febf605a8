//! Address spaces: their areas, and the objects that several of them share.

use serde::{Deserialize, Serialize};

use crate::ipc::Segment;

/// The size of a page of the architectures that we support, in bytes.
pub const PAGE: u64 = 4096;

/// One virtual memory area of a process, as `/proc/PID/maps` and `smaps` tell it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Area {
    /// First address.
    pub start: u64,
    /// First address behind it.
    pub end: u64,
    /// `PROT_READ`, `PROT_WRITE`, `PROT_EXEC` bits of mmap(2).
    pub protection: u8,
    /// `MAP_SHARED` when true, `MAP_PRIVATE` when not.
    pub shared: bool,
    /// The area grows downwards by itself (`MAP_GROWSDOWN`): the stack.
    pub grows_down: bool,
    /// The file or object behind it was opened for writing: `VM_MAYWRITE`.
    pub may_write: bool,
    /// Where the area starts in its file or object, in bytes.
    pub offset: u64,
    /// What stands behind the area.
    pub backing: Backing,
    /// Flags set by madvise(2), mlock(2) and the like.
    pub advice: Advice,
}

impl Area {
    /// The size in bytes.
    pub fn len(&self) -> u64 {
        self.end - self.start
    }

    /// True for an area of no size, which the kernel never reports.
    pub fn is_empty(&self) -> bool {
        self.end == self.start
    }
}

/// What stands behind an [`Area`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Backing {
    /// Zero-filled memory of this process alone.
    Anonymous {
        /// The name given by `PR_SET_VMA_ANON_NAME`, if any.
        name: Option<String>,
    },
    /// A file of the VE, by its path inside the VE.
    File {
        /// The path inside the VE.
        path: String,
        /// The inode number on the source: tells a file from another one that took its name.
        inode: u64,
    },
    /// Memory shared between mappings: see [`SharedObject`].
    Shared {
        /// The object's [`SharedObject::id`].
        object: u64,
    },
    /// The vdso, the kernel's code in every process. Rebuilt, never copied.
    Vdso,
    /// The data pages of the vdso.
    Vvar,
    /// The legacy page at the top of the address space: the same for every process.
    Vsyscall,
    /// The ring of an AIO context: see [`Ring`](crate::process::Ring).
    Ring,
    /// Zero-filled memory of this process alone, of huge pages (`MAP_HUGETLB`).
    Huge {
        /// The size of a page in bytes.
        page: u64,
    },
    /// The ring of a packet socket: see [`PacketRing`](crate::files::PacketRing).
    Frames,
    /// As [`Vdso`](Self::Vdso), of a program of 32 bits.
    Vdso32,
}

impl Backing {
    /// The kernel's code, or the data pages of that.
    pub fn is_vdso(&self) -> bool {
        matches!(self, Self::Vdso | Self::Vdso32 | Self::Vvar)
    }
}

/// Flags of an area that are set by calls other than mmap(2), as in the `VmFlags` line of smaps.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Advice {
    /// `MADV_DONTFORK`.
    pub dont_fork: bool,
    /// `MADV_DONTDUMP`.
    pub dont_dump: bool,
    /// `MADV_WIPEONFORK`.
    pub wipe_on_fork: bool,
    /// `MADV_HUGEPAGE`.
    pub huge: bool,
    /// `MADV_NOHUGEPAGE`.
    pub no_huge: bool,
    /// `MADV_MERGEABLE`.
    pub mergeable: bool,
    /// mlock(2) or `MAP_LOCKED`.
    pub locked: bool,
    /// Locked with `MLOCK_ONFAULT`.
    pub locked_on_fault: bool,
    /// `MAP_NORESERVE`.
    pub no_reserve: bool,
    /// `MADV_SEQUENTIAL`.
    pub sequential: bool,
    /// `MADV_RANDOM`.
    pub random: bool,
    /// `MAP_DROPPABLE`.
    pub droppable: bool,
    /// mseal(2).
    pub sealed: bool,
}

/// Memory that more than one mapping or descriptor can show, and whose contents travel with the
/// memory of the processes: shared anonymous memory, memfds, System V segments, and files without
/// a name.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SharedObject {
    /// Unique in one capture.
    pub id: u64,
    /// The size in bytes.
    pub size: u64,
    /// Which kind of object.
    pub kind: SharedKind,
}

/// The kinds of [`SharedObject`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum SharedKind {
    /// `MAP_SHARED | MAP_ANONYMOUS`: shown as `/dev/zero (deleted)`.
    Anonymous,
    /// memfd_create(2).
    Memfd {
        /// The name without `/memfd:` and ` (deleted)`.
        name: String,
        /// `F_GET_SEALS`.
        seals: u32,
        /// The mode bits of the inode.
        mode: u32,
        /// Owner inside the VE.
        uid: u32,
        /// Group inside the VE.
        gid: u32,
        /// The size of its huge pages in bytes (`MFD_HUGETLB`); 0 for one without.
        #[serde(default)]
        huge: u64,
    },
    /// shmget(2).
    Segment(Segment),
    /// A file of the VE that has no name any more.
    Deleted {
        /// The name that it once had, inside the VE.
        #[serde(with = "serde_bytes")]
        path: Vec<u8>,
        /// The permission bits.
        mode: u32,
        /// Owner inside the VE.
        uid: u32,
        /// Group inside the VE.
        gid: u32,
        /// Made by `O_TMPFILE`, so it may still be linked to a name.
        linkable: bool,
    },
    /// `MAP_SHARED | MAP_ANONYMOUS | MAP_HUGETLB`.
    Huge {
        /// The size of a page in bytes.
        page: u64,
    },
}

impl SharedKind {
    /// The size of the huge pages that it is made of, in bytes.
    pub fn huge_page(&self) -> Option<u64> {
        match self {
            Self::Huge { page } => Some(*page),
            Self::Memfd { huge, .. } | Self::Segment(Segment { huge, .. }) => {
                Some(*huge).filter(|&huge| huge != 0)
            }
            _ => None,
        }
    }
}

/// A run of pages at one place.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Run {
    /// The address (of a process) or offset (in a shared object), in bytes.
    pub start: u64,
    /// How many pages.
    pub pages: u64,
}

impl Run {
    /// The first byte behind the run.
    pub fn end(&self) -> u64 {
        self.start + self.pages * PAGE
    }
}

/// Whose pages a block of page data belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Space {
    /// The private pages of the process with this number.
    Process(i32),
    /// The shared object with this id.
    Shared(u64),
}

/// The `mm` fields that prctl(2) `PR_SET_MM_MAP` sets, with the auxiliary vector.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[expect(missing_docs, reason = "the names are those of struct prctl_mm_map")]
pub struct MemoryMap {
    pub start_code: u64,
    pub end_code: u64,
    pub start_data: u64,
    pub end_data: u64,
    pub start_brk: u64,
    pub brk: u64,
    pub start_stack: u64,
    pub arg_start: u64,
    pub arg_end: u64,
    pub env_start: u64,
    pub env_end: u64,
    #[serde(with = "serde_bytes")]
    pub auxv: Vec<u8>,
}
