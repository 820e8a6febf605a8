//! How a client program is driven: a line in, a report out.

use std::io::{self, BufRead, Write};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use chaos_tests::client::counters::Counters;
use chaos_tests::client::load::Tally;
use chaos_tests::client::report::Report;

/// What a client counts, shared with the thread that reports on it.
#[derive(Clone, Debug, Default)]
pub struct Tallied(Arc<Mutex<State>>);

#[derive(Debug, Default)]
struct State {
    tally: Tally,
    waiting_since: Option<Instant>,
}

impl Tallied {
    /// Counts so many requests that took the same time.
    pub fn add(&self, latency: Duration, requests: u32) {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        state.waiting_since = None;
        (0..requests).for_each(|_| state.tally.latencies.add(latency));
    }

    /// Notes that an answer is waited for.
    pub fn wait(&self, since: Instant) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).waiting_since = Some(since);
    }

    /// Counts a connection that ended.
    pub fn lose(&self, why: &io::Error) {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        state.waiting_since = None;
        state.tally.lost_connections += 1;
        state.tally.complaints.push(why.to_string());
    }

    fn take(&self) -> Tally {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let mut tally = std::mem::take(&mut state.tally);
        if let Some(since) = state.waiting_since {
            tally.latencies.note_waiting(since.elapsed());
        }
        tally
    }
}

/// Obeys standard input until it ends or says `stop`: each line ends a stretch of time, and the
/// report on it is printed as JSON. `check` is done before each report.
pub fn obey(tallied: &Tallied, mut check: impl FnMut()) -> io::Result<()> {
    let epoch = Instant::now();
    let (mut from, mut before) = (0.0, Counters::read()?);
    for line in io::stdin().lock().lines() {
        let line = line?;
        check();
        let (now, counters) = (epoch.elapsed().as_secs_f64(), Counters::read()?);
        let name = line.strip_prefix("mark ").unwrap_or(&line);
        let report = Report::new(name, from, now, &tallied.take(), counters.since(&before));
        (from, before) = (now, counters);
        let mut output = io::stdout().lock();
        writeln!(output, "{}", serde_json::to_string(&report).expect("plain data"))?;
        output.flush()?;
        if line == "stop" {
            break;
        }
    }
    Ok(())
}
