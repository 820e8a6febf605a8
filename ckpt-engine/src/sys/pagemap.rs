//! `PAGEMAP_SCAN` on `/proc/PID/pagemap` (Linux 6.7; Documentation/admin-guide/mm/pagemap.rst).

use std::{fs::File, io, os::fd::AsRawFd};

use super::check;

/// Kinds of pages, as the scan reports them.
pub mod category {
    /// Written since the last write protection, or never protected.
    pub const WRITTEN: u64 = 1 << 1;
    /// A page of a file or of shared memory.
    pub const FILE: u64 = 1 << 2;
    /// In memory.
    pub const PRESENT: u64 = 1 << 3;
    /// Swapped out.
    pub const SWAPPED: u64 = 1 << 4;
    /// The shared page of zeros.
    pub const ZERO: u64 = 1 << 5;
    /// A guard (`MADV_GUARD_INSTALL`); shown since Linux 6.15, see [`super::shows_guards`].
    pub const GUARD: u64 = 1 << 8;
}

/// Whether this kernel tells guards from pages.
pub fn shows_guards() -> bool {
    static ANSWER: std::sync::OnceLock<bool> = std::sync::OnceLock::new();
    *ANSWER.get_or_init(|| {
        let query = Query { mask: category::GUARD, inverted: 0, ..Query::default() };
        File::open("/proc/self/pagemap").is_ok_and(|pagemap| {
            let anywhere = &raw const query as u64 & !0xfff;
            scan(&pagemap, anywhere, anywhere + 0x1000, query, |_, _| ()).is_ok()
        })
    })
}

/// Write protect what matched.
const PM_SCAN_WP_MATCHING: u64 = 1;
/// Fail with EPERM where write protection is not asynchronous.
const PM_SCAN_CHECK_WPASYNC: u64 = 2;
/// `_IOWR('f', 16, struct pm_scan_arg)`, 96 bytes.
const PAGEMAP_SCAN: libc::c_ulong = 0xc060_6610;
const REGIONS: usize = 512;

#[derive(Clone, Copy, Default)]
#[repr(C)]
struct Region {
    start: u64,
    end: u64,
    categories: u64,
}

#[derive(Default)]
#[repr(C)]
struct ScanArgument {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    vec: u64,
    vec_len: u64,
    max_pages: u64,
    category_inverted: u64,
    category_mask: u64,
    category_anyof_mask: u64,
    return_mask: u64,
}

/// What to look for in [`scan`].
#[derive(Clone, Copy, Debug, Default)]
pub struct Query {
    /// All of these must hold …
    pub mask: u64,
    /// … where these are wanted *absent*.
    pub inverted: u64,
    /// At least one of these must hold; 0 asks for nothing.
    pub any_of: u64,
    /// Write protect the pages found.
    pub protect: bool,
    /// Fail with EPERM in an area that is not registered.
    pub tracked: bool,
}

/// Calls `found(start, end)` for every run of pages in `start..end` that matches.
pub fn scan(
    pagemap: &File,
    start: u64,
    end: u64,
    query: Query,
    mut found: impl FnMut(u64, u64),
) -> io::Result<()> {
    let found = |start, end, _| found(start, end);
    scan_kinds(pagemap, start, end, query, category::PRESENT, found)
}

/// As [`scan`]; `found` is also told which of the categories in `kinds` the run has.
pub fn scan_kinds(
    pagemap: &File,
    start: u64,
    end: u64,
    query: Query,
    kinds: u64,
    mut found: impl FnMut(u64, u64, u64),
) -> io::Result<()> {
    let mut regions = [Region::default(); REGIONS];
    let mut flags = if query.protect { PM_SCAN_WP_MATCHING } else { 0 };
    if query.tracked {
        flags |= PM_SCAN_CHECK_WPASYNC;
    }
    let mut next = start;
    while next < end {
        let mut argument = ScanArgument {
            size: size_of::<ScanArgument>() as u64,
            flags,
            start: next,
            end,
            vec: regions.as_mut_ptr() as u64,
            vec_len: REGIONS as u64,
            category_inverted: query.inverted,
            category_mask: query.mask,
            category_anyof_mask: query.any_of,
            return_mask: kinds,
            ..ScanArgument::default()
        };
        // SAFETY: the argument is a live `struct pm_scan_arg` whose vector is `regions`.
        let count = check(
            unsafe { libc::ioctl(pagemap.as_raw_fd(), PAGEMAP_SCAN, &raw mut argument) }.into(),
        )?;
        for region in &regions[..count as usize] {
            found(region.start, region.end, region.categories);
        }
        if argument.walk_end <= next {
            break;
        }
        next = argument.walk_end;
    }
    Ok(())
}
