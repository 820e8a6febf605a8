//! Pages that a device may still be writing.
//!
//! Input without the page cache (`O_DIRECT`) goes from the device straight into a program's memory.
//! The page counts as written when the request is made, not when the data comes: a page that was
//! sent in between would never be sent again. So what such a program has written is sent once more
//! a while later, or at the end, when no request is under way any more.

use std::{
    collections::VecDeque,
    time::{Duration, Instant},
};

use crate::ranges::Ranges;

/// How long a request takes at most.
const LATENCY: Duration = Duration::from_secs(1);

/// What was found written, and when.
#[derive(Debug, Default)]
pub(super) struct Doubted(VecDeque<(Instant, Ranges)>);

impl Doubted {
    /// Adds to `due` what is to be sent once more, and remembers what is sent now for the first
    /// time. The last time, `present` tells which pages are there.
    pub(super) fn settle(&mut self, due: Ranges, last: Option<&Ranges>) -> Ranges {
        self.settle_at(due, last, Instant::now())
    }

    fn settle_at(&mut self, due: Ranges, last: Option<&Ranges>, now: Instant) -> Ranges {
        let mut all = due.clone();
        let is_over = |&mut (then, _): &mut (Instant, Ranges)| {
            last.is_some() || now.saturating_duration_since(then) > LATENCY
        };
        while let Some((_, ranges)) = self.0.pop_front_if(is_over) {
            let ranges = last.map_or_else(|| ranges.clone(), |present| ranges.common(present));
            ranges.iter().for_each(|(start, end)| all.insert(start, end));
        }
        if last.is_none() && !due.is_empty() {
            self.0.push_back((now, due));
        }
        all
    }

    /// Forgets what is not in these ranges any more.
    pub(super) fn keep(&mut self, ranges: &Ranges) {
        for (_, doubted) in &mut self.0 {
            *doubted = doubted.common(ranges);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pages(ranges: &[(u64, u64)]) -> Ranges {
        ranges.iter().copied().collect()
    }

    #[test]
    fn what_was_written_is_sent_once_more() {
        let (mut doubted, start) = (Doubted::default(), Instant::now());
        let list = |ranges: Ranges| ranges.iter().collect::<Vec<_>>();
        let first = doubted.settle_at(pages(&[(0, 4), (8, 12)]), None, start);
        assert_eq!(list(first), [(0, 4), (8, 12)]);
        let soon = doubted.settle_at(Ranges::default(), None, start + LATENCY / 2);
        assert_eq!(list(soon), []);
        doubted.keep(&pages(&[(0, 10)]));
        let later = doubted.settle_at(pages(&[(20, 24)]), None, start + LATENCY * 2);
        assert_eq!(list(later), [(0, 4), (8, 10), (20, 24)]);
        let last = doubted.settle_at(Ranges::default(), Some(&pages(&[(21, 30)])), start);
        assert_eq!(list(last), [(21, 24)]);
    }
}
