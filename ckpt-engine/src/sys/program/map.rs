//! Maps of every kind, used as arrays of atomic words.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr::{self, NonNull};
use std::sync::atomic::AtomicU64;

const MAP_DROPPABLE: i32 = 8;

/// Bytes of a page.
pub const PAGE_BYTES: usize = 4096;

/// How many pages a huge page has.
pub const HUGE_PAGES: usize = 512;
const HUGE: i32 = libc::MAP_HUGETLB | libc::MAP_HUGE_2MB;

/// What a map shows.
#[derive(Clone, Copy, Debug)]
pub enum Backing<'a> {
    /// Fresh memory of this process.
    Private,
    /// Fresh memory shared with children.
    Shared,
    /// Fresh memory for which nothing is set aside (`MAP_NORESERVE`).
    Unreserved,
    /// Fresh memory that the kernel may take away at any time (`MAP_DROPPABLE`).
    Droppable,
    /// Fresh memory of huge pages that are set aside (`MAP_HUGETLB`).
    Huge,
    /// The same, shared with children.
    HugeShared,
    /// Fresh memory that grows downwards when it is touched there (`MAP_GROWSDOWN`).
    GrowingDown,
    /// A file from its start; writes stay in this process.
    FilePrivate(BorrowedFd<'a>),
    /// A file from its start; writes go to the file.
    FileShared(BorrowedFd<'a>),
}

/// A map that is removed when it is dropped.
#[derive(Debug)]
pub struct Map {
    start: NonNull<u8>,
    pages: usize,
}

// SAFETY: the map is a region of memory that belongs to the process, not to a thread.
unsafe impl Send for Map {}
// SAFETY: it is only reachable as atomic words.
unsafe impl Sync for Map {}

impl Map {
    /// A map of so many pages that can be read and written.
    pub fn new(pages: usize, backing: Backing<'_>) -> io::Result<Self> {
        let (flags, fd) = match backing {
            Backing::Private => (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1),
            Backing::Shared => (libc::MAP_SHARED | libc::MAP_ANONYMOUS, -1),
            Backing::Unreserved => {
                (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE, -1)
            }
            Backing::Droppable => (MAP_DROPPABLE | libc::MAP_ANONYMOUS, -1),
            Backing::Huge => (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | HUGE, -1),
            Backing::HugeShared => (libc::MAP_SHARED | libc::MAP_ANONYMOUS | HUGE, -1),
            Backing::GrowingDown => {
                (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_GROWSDOWN, -1)
            }
            Backing::FilePrivate(fd) => (libc::MAP_PRIVATE, fd.as_raw_fd()),
            Backing::FileShared(fd) => (libc::MAP_SHARED, fd.as_raw_fd()),
        };
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: no address is asked for, so no existing map is replaced.
        let start =
            unsafe { libc::mmap(ptr::null_mut(), pages * PAGE_BYTES, protection, flags, fd, 0) };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let start = NonNull::new(start.cast()).ok_or_else(io::Error::last_os_error)?;
        Ok(Self { start, pages })
    }

    /// The number of words in it.
    pub fn words(&self) -> usize {
        self.pages * PAGE_BYTES / size_of::<AtomicU64>()
    }

    /// Where it begins.
    pub fn address(&self) -> usize {
        self.start.as_ptr() as usize
    }

    /// One word. Panics when the map has no such word; a word of a page that was made
    /// inaccessible ends the process with a signal.
    pub fn word(&self, index: usize) -> &AtomicU64 {
        assert!(index < self.words(), "word {index} of {}", self.words());
        // SAFETY: the word lies in the map, as checked, so the pointer stays in one object.
        let word = unsafe { self.start.cast::<AtomicU64>().add(index) };
        // SAFETY: the map is aligned to pages, lives as long as `self`, every bit pattern is a
        // valid word, and all access is atomic.
        unsafe { word.as_ref() }
    }

    /// Makes pages inaccessible (`false`) or usable again (`true`).
    pub fn set_accessible(&self, page: usize, pages: usize, accessible: bool) -> io::Result<()> {
        assert!(page + pages <= self.pages, "pages outside the map");
        let protection =
            if accessible { libc::PROT_READ | libc::PROT_WRITE } else { libc::PROT_NONE };
        // SAFETY: the range lies in the map; access to it while it is inaccessible is a fault,
        // never a read of other memory.
        let result = unsafe {
            libc::mprotect(
                self.start.as_ptr().wrapping_add(page * PAGE_BYTES).cast(),
                pages * PAGE_BYTES,
                protection,
            )
        };
        if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    }

    /// Makes the map longer or shorter; it may move.
    pub fn resize(&mut self, pages: usize) -> io::Result<()> {
        // SAFETY: `&mut self` proves that no word is borrowed while the map moves.
        let start = unsafe {
            libc::mremap(
                self.start.as_ptr().cast(),
                self.pages * PAGE_BYTES,
                pages * PAGE_BYTES,
                libc::MREMAP_MAYMOVE,
            )
        };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        self.start = NonNull::new(start.cast()).ok_or_else(io::Error::last_os_error)?;
        self.pages = pages;
        Ok(())
    }

    /// Gives the memory of all pages back; private memory reads as zero afterwards.
    pub fn discard(&mut self) -> io::Result<()> {
        // SAFETY: the range is this map, and zeroes are valid words.
        let result = unsafe {
            libc::madvise(self.start.as_ptr().cast(), self.pages * PAGE_BYTES, libc::MADV_DONTNEED)
        };
        if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    }
}

impl Drop for Map {
    fn drop(&mut self) {
        // SAFETY: the range is this map, and nothing borrows it any more.
        unsafe { libc::munmap(self.start.as_ptr().cast(), self.pages * PAGE_BYTES) };
    }
}
