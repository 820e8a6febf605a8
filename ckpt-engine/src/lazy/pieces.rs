//! Which pages of one address space are still to come, and where they were on the source.

use std::collections::BTreeMap;

/// Disjoint ranges of missing pages. Each was somewhere on the source: at the same address, unless
/// the program has moved it since (mremap(2)).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Pieces {
    by_place: BTreeMap<u64, Piece>,
    /// Whether any was ever moved: until then each is where it was.
    moved: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Piece {
    end: u64,
    /// Where its first page was on the source.
    origin: u64,
}

/// A part of the pieces: where it is, and where it was on the source.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Part {
    pub(super) start: u64,
    pub(super) end: u64,
    pub(super) origin: u64,
}

impl Pieces {
    /// Adds pages that are missing where they were.
    pub(super) fn insert(&mut self, start: u64, end: u64) {
        self.remove(start, end);
        self.by_place.insert(start, Piece { end, origin: start });
    }

    /// Forgets what lies in `start..end`.
    pub(super) fn remove(&mut self, start: u64, end: u64) {
        for part in self.within(start, end).collect::<Vec<_>>() {
            let Some((&low, &piece)) = self.by_place.range(..=part.start).next_back() else {
                continue;
            };
            self.by_place.remove(&low);
            if low < part.start {
                self.by_place.insert(low, Piece { end: part.start, origin: piece.origin });
            }
            if part.end < piece.end {
                let origin = piece.origin + (part.end - low);
                self.by_place.insert(part.end, Piece { end: piece.end, origin });
            }
        }
    }

    /// Follows a move of memory: what was to come there comes to the new place.
    pub(super) fn relocate(&mut self, from: u64, to: u64, len: u64) {
        let moved: Vec<Part> = self.within(from, from.saturating_add(len)).collect();
        self.remove(from, from.saturating_add(len));
        self.remove(to, to.saturating_add(len));
        self.moved |= !moved.is_empty();
        for part in moved {
            let start = to + (part.start - from);
            let end = start + (part.end - part.start);
            self.by_place.insert(start, Piece { end, origin: part.origin });
        }
    }

    /// The parts in `start..end`, in ascending order.
    pub(super) fn within(&self, start: u64, end: u64) -> impl Iterator<Item = Part> + '_ {
        let before = self.by_place.range(..start).next_back();
        let before = before.filter(|(_, piece)| piece.end > start && start < end);
        let inside = self.by_place.range(start..end.max(start));
        before.into_iter().chain(inside).map(move |(&low, piece)| {
            let (first, last) = (low.max(start), piece.end.min(end));
            Part { start: first, end: last, origin: piece.origin + (first - low) }
        })
    }

    /// The parts whose pages were in `start..end` on the source.
    pub(super) fn with_origin(&self, start: u64, end: u64) -> Vec<Part> {
        if !self.moved {
            return self.within(start, end).collect();
        }
        let parts = self.by_place.iter().filter_map(|(&low, piece)| {
            let origin_end = piece.origin + (piece.end - low);
            let (first, last) = (piece.origin.max(start), origin_end.min(end));
            (first < last).then(|| {
                let at = low + (first - piece.origin);
                Part { start: at, end: at + (last - first), origin: first }
            })
        });
        parts.collect()
    }

    /// True when nothing is to come.
    pub(super) fn is_empty(&self) -> bool {
        self.by_place.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    #[derive(Clone, Debug)]
    enum Step {
        Insert(u64, u64),
        Remove(u64, u64),
        Relocate(u64, u64, u64),
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            (0u64..64, 1u64..16).prop_map(|(start, len)| Step::Insert(start, start + len)),
            (0u64..64, 0u64..16).prop_map(|(start, len)| Step::Remove(start, start + len)),
            (0u64..32, 48u64..80, 0u64..16)
                .prop_map(|(from, to, len)| Step::Relocate(from, to, len)),
        ]
    }

    proptest! {
        #[test]
        fn pieces_behave_like_a_map_of_pages(steps in prop::collection::vec(step(), 0..30)) {
            let mut pieces = Pieces::default();
            let mut model = BTreeMap::new();
            for step in steps {
                match step {
                    Step::Insert(start, end) => {
                        pieces.insert(start, end);
                        model.extend((start..end).map(|page| (page, page)));
                    }
                    Step::Remove(start, end) => {
                        pieces.remove(start, end);
                        model.retain(|page, _| !(start..end).contains(page));
                    }
                    Step::Relocate(from, to, len) => {
                        pieces.relocate(from, to, len);
                        let moved: Vec<(u64, u64)> = (0..len)
                            .filter_map(|at| Some((to + at, model.remove(&(from + at))?)))
                            .collect();
                        model.retain(|page, _| !(to..to + len).contains(page));
                        model.extend(moved);
                    }
                }
            }
            let flat: BTreeMap<u64, u64> = pieces
                .within(0, u64::MAX)
                .flat_map(|part| (part.start..part.end).map(move |at| (at, part.origin + (at - part.start))))
                .collect();
            prop_assert_eq!(&flat, &model);
            let mut found: Vec<u64> = pieces
                .with_origin(10, 20)
                .iter()
                .flat_map(|part| part.start..part.end)
                .collect();
            found.sort_unstable();
            let expected: Vec<u64> = model
                .iter()
                .filter(|(_, origin)| (10..20).contains(*origin))
                .map(|(page, _)| *page)
                .collect();
            prop_assert_eq!(found, expected);
            prop_assert_eq!(pieces.is_empty(), model.is_empty());
        }
    }
}
