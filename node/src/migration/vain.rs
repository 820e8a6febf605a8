//! Stops in vain: something that passes by itself was in the way of a VE that stood still.

use std::time::{Duration, Instant};

/// How long a VE is stopped anew, from the first time on, before its state counts as unmovable.
const LASTING: Duration = Duration::from_secs(5);
const SHORTEST: Duration = Duration::from_millis(50);
/// A stop costs the clients some milliseconds, so that there are not many in a second.
const LONGEST: Duration = Duration::from_millis(500);

/// The stops in vain of one move or checkpoint.
#[derive(Debug, Default)]
pub(super) struct VainStops {
    first: Option<Instant>,
    count: u32,
}

impl VainStops {
    /// How long the VE runs until it is stopped again; none where it was in vain for too long.
    pub(super) fn next(&mut self) -> Option<Duration> {
        self.next_at(Instant::now())
    }

    fn next_at(&mut self, now: Instant) -> Option<Duration> {
        let first = *self.first.get_or_insert(now);
        self.count += 1;
        (now - first < LASTING).then(|| (SHORTEST * self.count).min(LONGEST))
    }
}

#[cfg(test)]
mod tests {
    use super::{LASTING, LONGEST, SHORTEST, VainStops};

    #[test]
    fn what_passes_has_its_time_and_no_more() {
        let mut vain = VainStops::default();
        let start = std::time::Instant::now();
        assert_eq!(vain.next_at(start), Some(SHORTEST));
        assert_eq!(vain.next_at(start), Some(SHORTEST * 2));
        for _ in 0..20 {
            assert!(vain.next_at(start + LASTING / 2).is_some_and(|pause| pause <= LONGEST));
        }
        assert_eq!(vain.next_at(start + LASTING), None);
    }
}
