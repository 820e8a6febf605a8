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

    /// Watches one step that is done beside others until the value is dropped. It is told, but
    /// not as a part of what is done one after the other.
    pub(super) fn beside(step: &'static str) -> Beside {
        Beside { step, start: Instant::now() }
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

/// A step beside others; see [`Stopwatch::beside`].
pub(super) struct Beside {
    step: &'static str,
    start: Instant,
}

impl Drop for Beside {
    fn drop(&mut self) {
        let ms = self.start.elapsed().as_secs_f64() * 1000.0;
        tracing::info!("beside of a VE, ms: {} {ms:.2}", self.step);
    }
}
