//! What a program can ask of the kernel for a part of its memory.

use std::io;

use super::map::{Map, PAGE_BYTES};

/// madvise(2) that changes no contents.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "the names are those of madvise(2)")]
pub enum Advice {
    DontFork,
    DontDump,
    WipeOnFork,
    HugePage,
    NoHugePage,
    Mergeable,
    Sequential,
    Random,
}

/// Locks of memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lock {
    /// With all its pages.
    Now,
    /// Each page when it is first used.
    OnFault,
}

impl Map {
    /// Advises about the whole map.
    pub fn advise(&self, advice: Advice) -> io::Result<()> {
        let number = match advice {
            Advice::DontFork => libc::MADV_DONTFORK,
            Advice::DontDump => libc::MADV_DONTDUMP,
            Advice::WipeOnFork => libc::MADV_WIPEONFORK,
            Advice::HugePage => libc::MADV_HUGEPAGE,
            Advice::NoHugePage => libc::MADV_NOHUGEPAGE,
            Advice::Mergeable => libc::MADV_MERGEABLE,
            Advice::Sequential => libc::MADV_SEQUENTIAL,
            Advice::Random => libc::MADV_RANDOM,
        };
        self.madvise(0, self.words() * 8, number)
    }

    /// Installs guards over pages, which lose what they held: a touch ends the process.
    pub fn guard(&mut self, page: usize, pages: usize) -> io::Result<()> {
        const MADV_GUARD_INSTALL: i32 = 102;
        assert!((page + pages) * PAGE_BYTES <= self.words() * 8, "pages outside the map");
        self.madvise(page * PAGE_BYTES, pages * PAGE_BYTES, MADV_GUARD_INSTALL)
    }

    /// Takes guards away; the pages read as zero.
    pub fn unguard(&mut self, page: usize, pages: usize) -> io::Result<()> {
        const MADV_GUARD_REMOVE: i32 = 103;
        assert!((page + pages) * PAGE_BYTES <= self.words() * 8, "pages outside the map");
        self.madvise(page * PAGE_BYTES, pages * PAGE_BYTES, MADV_GUARD_REMOVE)
    }

    fn madvise(&self, offset: usize, len: usize, advice: i32) -> io::Result<()> {
        let start = (self.address() + offset) as *mut libc::c_void;
        // SAFETY: the range lies in this map; what is advised changes no page, or makes it zero
        // or inaccessible for a caller that holds the map alone.
        check(unsafe { libc::madvise(start, len, advice) }.into())
    }

    /// Locks the map in memory.
    pub fn lock(&self, how: Lock) -> io::Result<()> {
        let flags: u32 = match how {
            Lock::Now => 0,
            Lock::OnFault => 1,
        };
        let (start, len) = (self.address(), self.words() * 8);
        // SAFETY: the range is this map.
        check(unsafe { libc::syscall(libc::SYS_mlock2, start, len, flags) })
    }

    /// Ends a lock.
    pub fn unlock(&self) -> io::Result<()> {
        let start = self.address() as *const libc::c_void;
        // SAFETY: the range is this map.
        check(unsafe { libc::munlock(start, self.words() * 8) }.into())
    }

    /// Seals the map for as long as the process lives (mseal(2)): what it maps, and how, cannot
    /// be changed. The map is never freed.
    pub fn seal(self) -> io::Result<&'static Self> {
        const SYS_MSEAL: i64 = 462;
        let map: &'static Self = Box::leak(Box::new(self));
        // SAFETY: the range is this map, which is never unmapped.
        check(unsafe { libc::syscall(SYS_MSEAL, map.address(), map.words() * 8, 0) })?;
        Ok(map)
    }

    /// Names the map as `/proc/self/maps` shows it; without a name it has none any more.
    pub fn name(&self, name: Option<&std::ffi::CStr>) -> io::Result<()> {
        const PR_SET_VMA: i32 = 0x5356_4d41;
        let (start, len) = (self.address(), self.words() * 8);
        let name = name.map_or(std::ptr::null(), std::ffi::CStr::as_ptr);
        // SAFETY: the range is this map, and the name is a live string or null.
        check(unsafe { libc::prctl(PR_SET_VMA, 0u64, start, len, name) }.into())
    }
}

/// Locks all memory that comes from now on (mlockall(2)), or no more.
pub fn lock_future(on: bool) -> io::Result<()> {
    let (call, flags) = match on {
        true => (libc::SYS_mlockall, libc::MCL_FUTURE),
        false => (libc::SYS_munlockall, 0),
    };
    // SAFETY: no pointers.
    check(unsafe { libc::syscall(call, flags) })
}

fn check(result: i64) -> io::Result<()> {
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
