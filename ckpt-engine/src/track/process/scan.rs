//! Finds the pages that were written, and what else is to be told of a process that stands still.

use std::io;

use ckpt_format::memory::Area;

use super::{Life, has_private_pages};
use crate::{
    ranges::Ranges,
    sys::pagemap::{self, Query, category},
};

/// What a scan of a frozen process finds beside what was written.
#[derive(Debug, Default)]
pub(super) struct Standing {
    /// The pages that are there.
    pub(super) present: Ranges,
    /// Guards (`MADV_GUARD_INSTALL`).
    pub(super) guards: Ranges,
}

impl Life {
    /// Adds the written pages of one area to `due`.
    pub(super) fn scan(&self, area: &Area, due: &mut Ranges) -> io::Result<()> {
        let no_file = not_private() | guards();
        let written = Query {
            mask: category::WRITTEN | no_file,
            inverted: no_file,
            any_of: category::PRESENT | category::SWAPPED,
            protect: self.tracking.is_some(),
            tracked: self.tracking.is_some(),
        };
        let there = Query { mask: no_file, ..written };
        let look = Query { protect: false, tracked: false, ..there };
        for (start, end) in self.anew.iter() {
            let (start, end) = (start.max(area.start), end.min(area.end));
            if start < end {
                self.scan_or_take(start, end, there, look, due)?;
            }
        }
        self.scan_or_take(area.start, area.end, written, look, due)
    }

    /// All areas of a process that stands still: what was written, and what stands there.
    pub(super) fn scan_still(&self, due: &mut Ranges) -> io::Result<Standing> {
        let mut standing = Standing::default();
        // Neighbours in one go; what is between them belongs to nobody.
        let groups = self.space.areas.chunk_by(|a, b| has_private_pages(a) == has_private_pages(b));
        for group in groups.filter(|group| has_private_pages(&group[0])) {
            let whole = (group[0].start, group[group.len() - 1].end);
            if self.tracking.is_some() && self.look(whole, true, due, &mut standing)? {
                continue;
            }
            for area in group {
                let one = (area.start, area.end);
                // Where there is no tracking, or has been none for a moment, marks say nothing.
                if self.tracking.is_none() || !self.look(one, true, due, &mut standing)? {
                    self.look(one, false, due, &mut standing)?;
                }
            }
        }
        let anew = self.anew.common(&standing.present);
        anew.iter().for_each(|(start, end)| due.insert(start, end));
        Ok(standing)
    }

    /// Looks at addresses of a process that stands still; without trust in the tracking all that is
    /// there counts as written. False, with nothing said, if a part is not tracked any more.
    fn look(
        &self,
        (start, end): (u64, u64),
        trusted: bool,
        due: &mut Ranges,
        standing: &mut Standing,
    ) -> io::Result<bool> {
        let query = Query {
            mask: not_private(),
            inverted: not_private(),
            any_of: category::PRESENT | category::SWAPPED,
            protect: false,
            tracked: trusted,
        };
        let mut seen = Vec::new();
        let kinds = category::WRITTEN | guards();
        let found = |start, end, kind| seen.push((start, end, kind));
        match pagemap::scan_kinds(&self.pagemap, start, end, query, kinds, found) {
            Err(error) if error.raw_os_error() == Some(libc::EPERM) && trusted => return Ok(false),
            other => other?,
        }
        for (start, end, kind) in seen {
            if kind & guards() != 0 {
                standing.guards.insert(start, end);
                continue;
            }
            standing.present.insert(start, end);
            if !trusted || kind & category::WRITTEN != 0 {
                due.insert(start, end);
            }
        }
        Ok(true)
    }

    /// Adds what `query` finds to `due`; where there is no tracking, what `look` finds: new, or
    /// moved there a moment ago, and marks that it may have say nothing.
    fn scan_or_take(
        &self,
        start: u64,
        end: u64,
        query: Query,
        look: Query,
        due: &mut Ranges,
    ) -> io::Result<()> {
        let mut found = |start, end| due.insert(start, end);
        match pagemap::scan(&self.pagemap, start, end, query, &mut found) {
            Err(error) if error.raw_os_error() == Some(libc::EPERM) => {
                pagemap::scan(&self.pagemap, start, end, look, &mut found)
            }
            other => other,
        }
    }
}

/// What pages of a process's own are not.
fn not_private() -> u64 {
    category::FILE | category::ZERO
}

/// The category of guards, where the kernel tells them.
fn guards() -> u64 {
    if pagemap::shows_guards() { category::GUARD } else { 0 }
}
