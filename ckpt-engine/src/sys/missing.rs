//! userfaultfd(2), faults of pages that are not there yet
//! (Documentation/admin-guide/mm/userfaultfd.rst).

use std::{
    fs::File,
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
    path::Path,
};

use super::{check, userfault};

/// Where a userfaultfd comes from that also serves the kernel's own accesses, as read(2) makes
/// them: userfaultfd(2) gives a process in a user namespace none that does.
pub const DEVICE: &str = "/dev/userfaultfd";
/// The ioctl(2) on [`DEVICE`] that makes one, for the process that calls it.
pub const NEW: u64 = 0xaa00;

const FEATURE_EVENT_FORK: u64 = 1 << 1;
const FEATURE_EVENT_REMAP: u64 = 1 << 2;
const FEATURE_EVENT_REMOVE: u64 = 1 << 3;
const FEATURE_EVENT_UNMAP: u64 = 1 << 6;
const REGISTER_MODE_MISSING: u64 = 1;
const UFFDIO_WAKE: libc::c_ulong = 0x8010_aa02;
const UFFDIO_COPY: libc::c_ulong = 0xc028_aa03;
const UFFDIO_ZEROPAGE: libc::c_ulong = 0xc020_aa04;

const EVENT_PAGEFAULT: u8 = 0x12;
const EVENT_FORK: u8 = 0x13;
const EVENT_REMAP: u8 = 0x14;
const EVENT_REMOVE: u8 = 0x15;
const EVENT_UNMAP: u8 = 0x16;
/// The size of `struct uffd_msg`.
const MESSAGE: usize = 32;
/// Events read in one go.
const EVENTS: usize = 32;

#[repr(C)]
struct Range {
    start: u64,
    len: u64,
}

#[repr(C)]
struct Copy {
    destination: u64,
    source: u64,
    len: u64,
    mode: u64,
    copied: i64,
}

#[repr(C)]
struct Zero {
    start: u64,
    len: u64,
    mode: u64,
    zeroed: i64,
}

/// What has happened in an address space.
#[derive(Debug)]
pub enum Event {
    /// A thread waits for the page at this address.
    Fault(u64),
    /// fork(2): the child has the same pages and misses the same ones.
    Fork(Missing),
    /// mremap(2).
    Moved {
        /// Where it was.
        from: u64,
        /// Where it is.
        to: u64,
        /// How much, in bytes.
        len: u64,
    },
    /// munmap(2), madvise(2): whatever was there, or was to come, is gone.
    Gone {
        /// The first address.
        start: u64,
        /// The first address behind it.
        end: u64,
    },
}

/// How far pages were put in place, in bytes, and what then stood in the way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Placed {
    /// So far.
    pub len: u64,
    /// Why no further.
    pub stopped: Option<Obstacle>,
}

/// Why a page could not be put in place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Obstacle {
    /// A page is there.
    Present,
    /// The address space is just being changed: there are events to be read first.
    Changing,
    /// Nothing that is waited for lies at all of these addresses.
    NoPlace,
    /// The address space is gone.
    Ended,
    /// There is no memory.
    NoMemory,
    /// Something else.
    Other(i32),
}

/// Opens the device; fails where the host has none.
pub fn open_device() -> io::Result<File> {
    File::options().read(true).write(true).open(Path::new(DEVICE))
}

/// A userfaultfd of another process, whose missing pages are put in place through it.
///
/// **A trap**: when its last copy is closed, every page that is still missing reads as zeros.
#[derive(Debug)]
pub struct Missing(OwnedFd);

impl AsFd for Missing {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl Missing {
    /// For the calling process itself.
    pub fn own() -> io::Result<Self> {
        let device = open_device()?;
        let flags = libc::O_CLOEXEC | libc::O_NONBLOCK;
        // SAFETY: the argument is a number.
        let fd = check(unsafe { libc::ioctl(device.as_raw_fd(), NEW, flags) }.into())?;
        // SAFETY: the kernel has just made this descriptor for us alone.
        Self::new(unsafe { OwnedFd::from_raw_fd(fd as i32) })
    }

    /// Takes a descriptor, not used for anything yet, made by [`NEW`] in the process.
    pub fn new(fd: OwnedFd) -> io::Result<Self> {
        let features =
            FEATURE_EVENT_FORK | FEATURE_EVENT_REMAP | FEATURE_EVENT_REMOVE | FEATURE_EVENT_UNMAP;
        userfault::enable(&fd, features)?;
        Ok(Self(fd))
    }

    /// Takes one that was set up by somebody else.
    pub fn received(fd: OwnedFd) -> Self {
        Self(fd)
    }

    /// To be handed to somebody else.
    pub fn into_descriptor(self) -> OwnedFd {
        self.0
    }

    /// Lets threads wait for what is missing in `start..end`.
    pub fn register(&self, start: u64, end: u64) -> io::Result<()> {
        userfault::register(&self.0, start, end, REGISTER_MODE_MISSING)
    }

    /// Puts pages in place and wakes who waits for them.
    pub fn copy(&self, to: u64, pages: &[u8]) -> Placed {
        let mut copy = Copy {
            destination: to,
            source: pages.as_ptr() as u64,
            len: pages.len() as u64,
            mode: 0,
            copied: 0,
        };
        // SAFETY: the argument is a live `struct uffdio_copy`, its source as long as it says.
        let done = unsafe { libc::ioctl(self.0.as_raw_fd(), UFFDIO_COPY, &raw mut copy) };
        placed(done, copy.copied, copy.len)
    }

    /// Puts zeros in place and wakes who waits for them.
    pub fn zero(&self, start: u64, len: u64) -> Placed {
        let mut zero = Zero { start, len, mode: 0, zeroed: 0 };
        // SAFETY: the argument is a live `struct uffdio_zeropage`.
        let done = unsafe { libc::ioctl(self.0.as_raw_fd(), UFFDIO_ZEROPAGE, &raw mut zero) };
        placed(done, zero.zeroed, len)
    }

    /// Has everybody who waits there look again.
    pub fn wake(&self, start: u64, len: u64) {
        let mut range = Range { start, len };
        // SAFETY: the argument is a live `struct uffdio_range`.
        let done = unsafe { libc::ioctl(self.0.as_raw_fd(), UFFDIO_WAKE, &raw mut range) };
        debug_assert!(done == 0, "the range is one of whole pages");
    }

    /// What has happened since the last time; does not wait.
    pub fn events(&self) -> io::Result<Vec<Event>> {
        let mut buffer = [0; MESSAGE * EVENTS];
        let len = match nix::unistd::read(&self.0, &mut buffer) {
            Ok(len) => len,
            Err(nix::errno::Errno::EAGAIN | nix::errno::Errno::EINTR) => 0,
            Err(error) => return Err(error.into()),
        };
        Ok(buffer[..len].chunks_exact(MESSAGE).filter_map(event).collect())
    }
}

/// Reads a `struct uffd_msg`.
fn event(message: &[u8]) -> Option<Event> {
    let word = |at: usize| {
        let bytes = message[at..].first_chunk().copied();
        u64::from_ne_bytes(bytes.unwrap_or_default())
    };
    Some(match message[0] {
        EVENT_PAGEFAULT => Event::Fault(word(16)),
        EVENT_FORK => {
            let raw = word(8) as u32 as i32;
            // SAFETY: the kernel has just installed this descriptor for us alone.
            Event::Fork(Missing(unsafe { OwnedFd::from_raw_fd(raw) }))
        }
        EVENT_REMAP => Event::Moved { from: word(8), to: word(16), len: word(24) },
        EVENT_REMOVE | EVENT_UNMAP => Event::Gone { start: word(8), end: word(16) },
        _ => return None,
    })
}

fn placed(done: i32, moved: i64, len: u64) -> Placed {
    if done == 0 {
        return Placed { len, stopped: None };
    }
    let error = io::Error::last_os_error().raw_os_error().unwrap_or(0);
    if moved > 0 {
        // What stopped it is not told; the rest, tried again, says it.
        return Placed { len: moved as u64, stopped: None };
    }
    let obstacle = match error {
        libc::EEXIST => Obstacle::Present,
        libc::EAGAIN => Obstacle::Changing,
        libc::ENOENT => Obstacle::NoPlace,
        libc::ESRCH => Obstacle::Ended,
        libc::ENOMEM => Obstacle::NoMemory,
        other => Obstacle::Other(other),
    };
    Placed { len: 0, stopped: Some(obstacle) }
}
