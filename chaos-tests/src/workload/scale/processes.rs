//! A thousand processes: ten that each have a hundred in a row or side by side.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use ckpt_engine::sys::program::fork::fork;
use ckpt_engine::sys::program::map::{Backing, Map};
use nix::sys::prctl::set_pdeathsig;
use nix::sys::signal::Signal;
use nix::sys::wait::waitpid;
use nix::unistd::{Pid, getppid};

use crate::workload::context::{Context, stdin_ended};
use crate::workload::outcome::{Failure, ensure};

const ROWS: usize = 10;
const ROW: usize = 100;
/// Behind the counters: set by a process that found something wrong.
const BROKEN: usize = ROWS * ROW;
const PAGES: usize = 4;

/// Where each process counts.
type Counters = Arc<Map>;

pub(super) fn run(context: &mut Context) -> Result<(), Failure> {
    let counters: Counters = Arc::new(Map::new(PAGES, Backing::Shared)?);
    let mut rows = Vec::new();
    for row in 0..ROWS {
        rows.push(Pid::from_raw(fork(|| live(row * ROW, row % 2 == 0, &counters))?));
    }
    let mut last = vec![0; ROWS * ROW];
    let mut still = 0;
    while context.step(Duration::from_millis(100))? {
        let broken = counters.word(BROKEN).load(Ordering::SeqCst);
        ensure(broken == 0, || format!("process {} of the tree found a fault", broken - 1))?;
        if context.progress.plant() {
            counters.word(0).store(u64::MAX, Ordering::SeqCst);
        }
        still += 1;
        // In ten seconds everyone has counted on.
        if still == 100 {
            still = 0;
            for (place, last) in last.iter_mut().enumerate() {
                let now = counters.word(place).load(Ordering::SeqCst);
                ensure(now > *last, || format!("process {place} of the tree stands at {now}"))?;
                *last = now;
            }
        }
    }
    for row in rows {
        waitpid(row, None)?;
    }
    Ok(())
}

/// One process, which makes the others of its row: its own child each, or all its children.
fn live(place: usize, deep: bool, counters: &Counters) -> i32 {
    let first = place.is_multiple_of(ROW);
    let make = if !deep && first { ROW - 1 } else { 0 };
    let make = if deep && !(place + 1).is_multiple_of(ROW) { 1 } else { make };
    let mut children = Vec::new();
    for number in 1..=make {
        match fork(|| live(place + number, deep, counters)) {
            Ok(pid) => children.push(pid),
            Err(_) => counters.word(BROKEN).store(place as u64 + 1, Ordering::SeqCst),
        }
    }
    let parent = getppid();
    // Whoever is not first has its parent as long as it lives.
    let armed = set_pdeathsig(Signal::SIGKILL).is_ok();
    let mut count = 0;
    let counter = counters.word(place);
    while let Ok(false) = stdin_ended(Duration::from_millis(1000)) {
        let good = counter.load(Ordering::SeqCst) == count && getppid() == parent && armed;
        if !good {
            counters.word(BROKEN).store(place as u64 + 1, Ordering::SeqCst);
        }
        count += 1;
        counter.store(count, Ordering::SeqCst);
    }
    for child in children {
        // It ends as this one does.
        let _ = waitpid(Pid::from_raw(child), None);
    }
    0
}
