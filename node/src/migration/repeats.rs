//! Whether it is worth looking for pages that the target has already.
//!
//! A look costs a hash of the page here, and another one there if it is found; a page that is found
//! costs the link nothing. What a look costs, what the link takes for a byte, and how many pages are
//! found is measured all the time. All pages are looked at while that is expected to save more than
//! it costs, or costs next to nothing beside the link; of a VE without repetitions on a fast link
//! that is only its beginning. Otherwise a sample is looked at, to notice when that changes.

use std::time::{Duration, Instant};

use ckpt_engine::track::{Look, Repeats, SAMPLE};
use ckpt_format::stream::{PageKey, Record};

use super::share::Share;

/// So much is looked at in any case, in bytes: a first copy must be known for a second to be found.
const AHEAD: u64 = 64 << 20;
/// Where a look takes less than this of what the link takes, it is always worth it.
const NEXT_TO_NOTHING: f64 = 1.0 / 16.0;
/// Nothing that is sent takes less time than so many looks at it, however fast the link is: it is
/// encrypted and decrypted. A link that has little to do looks faster than that.
const LOOKS: f64 = 3.0;
/// The size of a page in bytes.
const PAGE: u64 = ckpt_format::memory::PAGE;

/// For one stream.
#[derive(Debug)]
pub(super) struct Once {
    repeats: Repeats,
    worth: Worth,
}

impl Once {
    /// With a key that nobody knows.
    pub(super) fn new() -> Self {
        let key: PageKey = rand::random();
        Self { repeats: Repeats::new(key), worth: Worth::default() }
    }

    /// What to send for a record: all records of the stream come by here. `link` is how many
    /// seconds the link takes for a byte.
    pub(super) fn shorten(&mut self, record: Record, link: Option<f64>) -> Vec<Record> {
        let len = match &record {
            Record::Pages { data, .. } => data.len() as u64,
            _ => 0,
        };
        let look = self.worth.look(link);
        let start = Instant::now();
        let shortened = self.repeats.shorten(record, look);
        if len > 0 {
            self.worth.looked(len, look, shortened.looked, shortened.found, start.elapsed());
        }
        shortened.records
    }
}

/// What is known of the pages and of the cost.
#[derive(Debug, Default)]
struct Worth {
    /// Bytes that came by.
    seen: u64,
    /// Seconds to look at a byte.
    cost: Share,
    /// Bytes that are found of one.
    found: Share,
}

impl Worth {
    fn look(&self, link: Option<f64>) -> Look {
        let known = (self.cost.get(), self.found.get(), link);
        let pays = match known {
            (Some(cost), Some(found), Some(link)) => {
                found * LOOKS > 1.0 || cost < link * found.max(NEXT_TO_NOTHING)
            }
            _ => true,
        };
        if pays || self.seen < AHEAD { Look::All } else { Look::Sample }
    }

    /// Of `len` bytes so many pages were looked at and found.
    fn looked(&mut self, len: u64, look: Look, looked: u64, found: u64, time: Duration) {
        self.seen += len;
        // Those of a sample stand for all.
        let each = match look {
            Look::All => PAGE,
            Look::Sample => PAGE * SAMPLE,
        };
        self.found.add((looked * each) as usize, (found * each) as f64);
        if look == Look::All {
            self.cost.add(len as usize, time.as_secs_f64());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PIECE: u64 = 256 << 10;
    const HASHING: f64 = 1.0 / 2000e6;

    /// Plays so many pieces, of whose pages this share repeats, over a link with so many bytes per
    /// second. Returns how many of the last hundred were looked at as a whole.
    fn play(worth: &mut Worth, pieces: usize, link: f64, share: f64) -> usize {
        let mut all = 0;
        for piece in 0..pieces {
            let look = worth.look(Some(1.0 / link));
            let pages = PIECE / PAGE;
            let looked = if look == Look::All { pages } else { pages / SAMPLE };
            let time = Duration::from_secs_f64((looked * PAGE) as f64 * HASHING);
            let found = (looked as f64 * share) as u64;
            worth.looked(PIECE, look, looked, found, time);
            all += usize::from(look == Look::All && piece + 100 >= pieces);
        }
        all
    }

    #[test]
    fn on_a_fast_link_it_ends_where_nothing_repeats() {
        let mut worth = Worth::default();
        let ahead = (AHEAD / PIECE) as usize;
        assert_eq!(play(&mut worth, ahead, 500e6, 0.0), 100);
        assert_eq!(play(&mut worth, 1000, 500e6, 0.0), 0);
        // And begins again where something does.
        assert_eq!(play(&mut worth, 1000, 500e6, 0.75), 100);
        assert_eq!(play(&mut worth, 1000, 500e6, 0.0), 0);
        // With little to do the link seems to take nothing.
        assert_eq!(play(&mut worth, 1000, 9000e6, 0.75), 100);
    }

    #[test]
    fn beside_a_slow_link_it_costs_nothing() {
        assert_eq!(play(&mut Worth::default(), 10_000, 50e6, 0.0), 100);
    }
}
