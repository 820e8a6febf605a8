//! Memory that a process and its parent still have in common since fork(2).
//!
//! A page that two processes map and neither may write is the same page, and has been since the
//! fork: whoever writes it gets a copy first. So it needs to be sent for one of them only. The
//! kernel tells by page frame numbers, which need CAP_SYS_ADMIN; without, nothing is in common.

use std::{fs::File, io, os::unix::fs::FileExt};

use ckpt_format::memory::PAGE;

use crate::ranges::Ranges;

/// Pages looked at in one go.
const CHUNK: u64 = 4096;

// Documentation/admin-guide/mm/pagemap.rst
const PRESENT: u64 = 1 << 63;
const SWAPPED: u64 = 1 << 62;
const FILE: u64 = 1 << 61;
const EXCLUSIVE: u64 = 1 << 56;
const FRAME: u64 = (1 << 55) - 1;

/// The pages in `ranges` that the two processes have in common, by their `pagemap` files.
pub(super) fn common(child: &File, parent: &File, ranges: &Ranges) -> io::Result<Ranges> {
    let mut found = Ranges::default();
    for (start, end) in ranges.iter() {
        for from in (start..end).step_by((CHUNK * PAGE) as usize) {
            let pages = ((end - from) / PAGE).min(CHUNK);
            // Twice the parent: what it has before and after, it has while the child is read.
            let before = entries(parent, from, pages)?;
            let own = entries(child, from, pages)?;
            let after = entries(parent, from, pages)?;
            for (index, ((own, before), after)) in own.iter().zip(before).zip(after).enumerate() {
                if let Some(frame) = shared_frame(*own)
                    && shared_frame(before) == Some(frame)
                    && shared_frame(after) == Some(frame)
                {
                    let at = from + index as u64 * PAGE;
                    found.insert(at, at + PAGE);
                }
            }
        }
    }
    Ok(found)
}

/// Whether any of the pages is one that other processes have, too.
///
/// The kernel copies such a page for a process as soon as somebody pins it to read it, as
/// process_vm_readv(2) does: after that the family would need more memory. Reading
/// `/proc/PID/mem` does not.
pub(super) fn has_shared(pagemap: &File, start: u64, end: u64) -> io::Result<bool> {
    let entries = entries(pagemap, start, (end - start) / PAGE)?;
    Ok(entries.into_iter().any(|entry| entry & PRESENT != 0 && entry & (FILE | EXCLUSIVE) == 0))
}

/// The pages that are in memory and that no other process has.
pub(super) fn exclusive(pagemap: &File, ranges: &Ranges) -> io::Result<Ranges> {
    let mut found = Ranges::default();
    for (start, end) in ranges.iter() {
        for from in (start..end).step_by((CHUNK * PAGE) as usize) {
            let pages = ((end - from) / PAGE).min(CHUNK);
            for (index, entry) in entries(pagemap, from, pages)?.into_iter().enumerate() {
                let kind = entry & (PRESENT | SWAPPED | FILE | EXCLUSIVE);
                if kind == PRESENT | EXCLUSIVE {
                    let at = from + index as u64 * PAGE;
                    found.insert(at, at + PAGE);
                }
            }
        }
    }
    Ok(found)
}

/// Which frame or place in swap it is, for anonymous memory that more than one process has.
fn shared_frame(entry: u64) -> Option<u64> {
    let kind = entry & (PRESENT | SWAPPED);
    let shared = kind != 0 && entry & (FILE | EXCLUSIVE) == 0 && entry & FRAME != 0;
    shared.then_some(kind | entry & FRAME)
}

fn entries(pagemap: &File, from: u64, pages: u64) -> io::Result<Vec<u64>> {
    let mut bytes = vec![0; pages as usize * 8];
    pagemap.read_exact_at(&mut bytes, from / PAGE * 8)?;
    let words = bytes.chunks_exact(8);
    Ok(words.map(|word| u64::from_le_bytes(word.try_into().expect("eight bytes"))).collect())
}
