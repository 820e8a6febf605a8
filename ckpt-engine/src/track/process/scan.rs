//! Finds the pages that were written, and what else is to be told of a process that stands still.

use std::io;

use ckpt_format::memory::{Area, Backing};

use super::{Life, has_private_pages};
use crate::{
    beside,
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
        let no_file = not_private(is_anonymous(area)) | guards();
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
            if self.tracking.is_some() && self.look(group, true, due, &mut standing)? {
                continue;
            }
            for area in group {
                let one = std::slice::from_ref(area);
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

    /// Looks at neighbouring areas of a process that stands still; without trust in the tracking all
    /// that is there counts as written. False, with nothing said, if a part is not tracked any more.
    fn look(
        &self,
        areas: &[Area],
        trusted: bool,
        due: &mut Ranges,
        standing: &mut Standing,
    ) -> io::Result<bool> {
        let kinds = category::WRITTEN | guards();
        let scanned = beside::each(&pieces(areas), |piece| {
            let query = Query {
                mask: not_private(piece.anonymous),
                inverted: not_private(piece.anonymous),
                any_of: category::PRESENT | category::SWAPPED,
                protect: false,
                tracked: trusted,
            };
            let mut seen = Vec::new();
            let found = |start, end, kind| seen.push((start, end, kind));
            let Piece { start, end, .. } = *piece;
            pagemap::scan_kinds(&self.pagemap, start, end, query, kinds, found).map(|()| seen)
        });
        let scanned = match scanned.into_iter().collect::<io::Result<Vec<_>>>() {
            Err(error) if error.raw_os_error() == Some(libc::EPERM) && trusted => return Ok(false),
            other => other?,
        };
        for (start, end, kind) in scanned.into_iter().flatten() {
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

/// How much memory is looked at in one call, in bytes, so that several threads can share much.
const PIECE: u64 = 16 << 20;

/// Addresses to be looked at in one call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Piece {
    start: u64,
    end: u64,
    /// No page in it can be one of a file. Whether one is costs a look at its description in the
    /// kernel, which is far more than the rest.
    anonymous: bool,
}

/// Neighbouring areas, with what is between them: large anonymous ones in pieces, others together.
fn pieces(areas: &[Area]) -> Vec<Piece> {
    let mut pieces = Vec::new();
    let mut small: Option<(u64, u64)> = None;
    let together = |(start, end)| Piece { start, end, anonymous: false };
    for area in areas {
        if !is_anonymous(area) || area.len() < PIECE {
            small = Some((small.map_or(area.start, |(start, _)| start), area.end));
            continue;
        }
        pieces.extend(small.take().map(together));
        let cut = (area.start..area.end).step_by(PIECE as usize);
        pieces.extend(cut.map(|start| Piece {
            start,
            end: area.end.min(start + PIECE),
            anonymous: true,
        }));
    }
    pieces.extend(small.map(together));
    pieces
}

fn is_anonymous(area: &Area) -> bool {
    matches!(area.backing, Backing::Anonymous { .. })
}

/// What pages of a process's own are not.
fn not_private(anonymous: bool) -> u64 {
    if anonymous { category::ZERO } else { category::FILE | category::ZERO }
}

/// The category of guards, where the kernel tells them.
fn guards() -> u64 {
    if pagemap::shows_guards() { category::GUARD } else { 0 }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::areas::testing::anonymous;

    #[test]
    fn pieces_cover_all_areas_once() {
        let mib = |count: u64| count << 20;
        let file = Backing::File { path: "/a".to_owned(), inode: 1 };
        let areas = [
            anonymous(mib(1), mib(3)),
            Area { backing: file, ..anonymous(mib(100), mib(150)) },
            anonymous(mib(1 << 20), mib((1 << 20) + 40)),
            anonymous(mib(1 << 21), mib((1 << 21) + 1)),
        ];
        let piece = |start, end, anonymous| Piece { start, end, anonymous };
        let large = mib(1 << 20);
        assert_eq!(
            pieces(&areas),
            [
                piece(mib(1), mib(150), false),
                piece(large, large + PIECE, true),
                piece(large + PIECE, large + 2 * PIECE, true),
                piece(large + 2 * PIECE, large + mib(40), true),
                piece(mib(1 << 21), mib((1 << 21) + 1), false),
            ]
        );
    }
}
