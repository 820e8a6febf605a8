//! Where the time of a blackout goes, step by step, as a line in the log for each part.

use std::time::{Duration, Instant};

/// Notes how long each step takes; tells when it is dropped.
#[derive(Debug)]
pub(super) struct Stopwatch {
    what: &'static str,
    last: Instant,
    laps: Vec<(&'static str, f64)>,
}

impl Stopwatch {
    /// Starts to watch.
    pub(super) fn start(what: &'static str) -> Self {
        Self { what, last: Instant::now(), laps: Vec::new() }
    }

    /// Tells of this part, and goes on with the next one without a gap: also what the telling took
    /// is in it.
    pub(super) fn turn(&mut self, what: &'static str) {
        *self = Self { what, last: self.last, laps: Vec::new() };
    }

    /// Watches one step that is done beside others until the value is dropped. It is told, but
    /// not as a part of what is done one after the other.
    pub(super) fn beside(step: &'static str) -> Beside {
        Beside { step, start: Instant::now() }
    }

    /// Tells of the same when it was measured elsewhere.
    pub(super) fn was_beside(step: &'static str, time: Duration) {
        tracing::info!("beside of a VE, ms: {step} {:.2}", time.as_secs_f64() * 1000.0);
    }

    /// The step that ends now.
    pub(super) fn lap(&mut self, step: &'static str) {
        self.lap_without(step, 0.0);
    }

    /// The step that ends now, without so many milliseconds of it of which the other node tells.
    pub(super) fn lap_without(&mut self, step: &'static str, told_ms: f64) {
        let now = Instant::now();
        let ms = (now - self.last).as_secs_f64() * 1000.0;
        self.laps.push((step, (ms - told_ms).max(0.0)));
        self.last = now;
    }
}

impl Drop for Stopwatch {
    fn drop(&mut self) {
        // It was begun for what did not happen.
        if self.laps.is_empty() {
            return;
        }
        let steps: Vec<String> =
            self.laps.iter().map(|(step, ms)| format!("{step} {ms:.2}")).collect();
        tracing::info!("{}, ms: {}", self.what, steps.join(", "));
    }
}

/// A step beside others; see [`Stopwatch::beside`].
pub(super) struct Beside {
    step: &'static str,
    start: Instant,
}

impl Drop for Beside {
    fn drop(&mut self) {
        Stopwatch::was_beside(self.step, self.start.elapsed());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_follow_each_other_without_a_gap() {
        let start = Instant::now();
        let mut watch = Stopwatch::start("one");
        watch.lap("a");
        let end = watch.last;
        watch.turn("two");
        assert_eq!((watch.what, watch.last, watch.laps.len()), ("two", end, 0));
        watch.lap("b");
        assert!(
            watch.last > end
                && watch.last - start >= Duration::from_secs_f64(watch.laps[0].1 / 1e3)
        );
        watch.lap_without("c", 1e6);
        assert_eq!(watch.laps[1], ("c", 0.0));
    }
}
