//! Ends a benchmark that takes too long or is interrupted.
//!
//! The testbed is taken down under it: whatever it waits for fails then, and it ends by itself,
//! with what it has found so far.

use std::io;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use chaos_tests::testbed::{DEFAULT_DIRECTORY, Testbed};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use std::os::fd::AsFd;

use crate::arguments::Common;

/// Watches over the time and the signals of one run.
#[derive(Clone, Debug)]
pub struct Guard {
    end: Instant,
    shared: Arc<Shared>,
}

#[derive(Debug, Default)]
struct Shared {
    testbed: Mutex<Option<String>>,
    reason: OnceLock<&'static str>,
}

impl Guard {
    /// Starts to watch.
    pub fn start(common: &Common) -> io::Result<Self> {
        let limit = common.limit();
        let guard = Self { end: Instant::now() + limit, shared: Arc::default() };
        let signals = chaos_tests::workload::supervisor::blocked_signals()?;
        let shared = Arc::clone(&guard.shared);
        let last = Instant::now() + limit * 2;
        std::thread::spawn(move || {
            let reason = loop {
                let left = last.saturating_duration_since(Instant::now());
                if left.is_zero() {
                    break "it took twice as long as it may";
                }
                let wait = PollTimeout::try_from(left.min(Duration::from_secs(60)))
                    .unwrap_or(PollTimeout::NONE);
                let mut files = [PollFd::new(signals.as_fd(), PollFlags::POLLIN)];
                if poll(&mut files, wait).is_ok_and(|count| count > 0) {
                    break "interrupted";
                }
            };
            let _ = shared.reason.set(reason);
            let name = shared.testbed.lock().unwrap_or_else(PoisonError::into_inner).clone();
            if let Some(name) = name
                && let Err(error) = Testbed::remove(DEFAULT_DIRECTORY.as_ref(), &name)
            {
                eprintln!("cannot take down {name}: {}", chaos_tests::chain(&error));
            }
        });
        Ok(guard)
    }

    /// Tells which testbed to take down.
    pub fn watch(&self, testbed: Option<&str>) {
        let mut watched = self.shared.testbed.lock().unwrap_or_else(PoisonError::into_inner);
        *watched = testbed.map(str::to_owned);
    }

    /// Why it was ended, if it was.
    pub fn reason(&self) -> Option<&'static str> {
        self.shared.reason.get().copied()
    }

    /// Whether there is time to begin something that takes about so long.
    pub fn has_time_for(&self, time: Duration) -> bool {
        self.reason().is_none() && Instant::now() + time < self.end
    }
}
