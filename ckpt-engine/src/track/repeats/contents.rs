//! Which contents stand where: for a VE of any size only so many are remembered.

use std::collections::{BTreeMap, HashMap};

use ckpt_format::stream::PageHash;

use crate::ranges::Ranges;

/// A page of a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Place {
    pub(super) pid: i32,
    pub(super) start: u64,
}

/// Contents and their places, each with one of the other.
#[derive(Debug, Default)]
pub(super) struct Contents {
    places: HashMap<PageHash, Place>,
    /// The same the other way round, by process and address.
    pages: HashMap<i32, BTreeMap<u64, PageHash>>,
}

impl Contents {
    /// The most that is remembered: 448 MiB of pages, in about 10 MiB. As many as fit a table of
    /// the next smaller power of two.
    const MOST: usize = (1 << 17) / 8 * 7;

    /// Where these contents are.
    pub(super) fn find(&self, hash: &PageHash) -> Option<Place> {
        self.places.get(hash).copied()
    }

    /// What stands there, if it is remembered.
    pub(super) fn at(&self, pid: i32, start: u64) -> Option<&PageHash> {
        self.pages.get(&pid)?.get(&start)
    }

    /// Remembers what stands in a place of which nothing is remembered.
    pub(super) fn add(&mut self, hash: PageHash, place: Place) {
        if self.places.len() >= Self::MOST {
            // What comes again soon is soon known again.
            *self = Self::default();
        }
        self.places.insert(hash, place);
        self.pages.entry(place.pid).or_default().insert(place.start, hash);
    }

    /// Something else stands there from here on.
    pub(super) fn forget(&mut self, pid: i32, start: u64, end: u64) {
        let Some(pages) = self.pages.get_mut(&pid) else { return };
        while let Some((&start, hash)) = pages.range(start..end.max(start)).next() {
            self.places.remove(hash);
            pages.remove(&start);
        }
    }

    /// The process has ended, or begins anew.
    pub(super) fn forget_process(&mut self, pid: i32) {
        for hash in self.pages.remove(&pid).unwrap_or_default().values() {
            self.places.remove(hash);
        }
    }

    /// Only what is in these ranges stays.
    pub(super) fn keep(&mut self, pid: i32, ranges: &Ranges) {
        let mut next = 0;
        for (start, end) in ranges.iter() {
            self.forget(pid, next, start);
            next = end;
        }
        self.forget(pid, next, u64::MAX);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_more_is_remembered_than_fits() {
        let mut contents = Contents::default();
        let hash = |number: u64| {
            let mut hash = PageHash::default();
            hash[..8].copy_from_slice(&number.to_le_bytes());
            hash
        };
        for number in 0..Contents::MOST as u64 * 2 + 5 {
            contents.add(hash(number), Place { pid: 1, start: number << 12 });
            assert!(contents.places.len() <= Contents::MOST);
        }
        assert_eq!(contents.places.len(), 5);
        assert_eq!(contents.pages[&1].len(), 5);
    }
}
