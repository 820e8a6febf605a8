//! Where the time of a blackout goes, step by step, as one line in the log.

use std::time::Instant;

/// Notes how long each step takes; tells when it is dropped.
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

    /// The step that ends now.
    pub(super) fn lap(&mut self, step: &'static str) {
        let now = Instant::now();
        self.laps.push((step, (now - self.last).as_secs_f64() * 1000.0));
        self.last = now;
    }
}

impl Drop for Stopwatch {
    fn drop(&mut self) {
        let steps: Vec<String> =
            self.laps.iter().map(|(step, ms)| format!("{step} {ms:.2}")).collect();
        tracing::info!("{}, ms: {}", self.what, steps.join(", "));
    }
}
