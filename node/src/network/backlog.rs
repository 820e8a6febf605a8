//! Frames that are between two interfaces of this host.
//!
//! A frame that goes through a pair of interfaces waits in a queue of the processor that sent it
//! until the kernel finds time to receive it at the other end, on a busy host for milliseconds.

use std::{
    fs, thread,
    time::{Duration, Instant},
};

use tracing::debug;

/// How long frames may stay under way until we go on without them.
const SETTLE_MAX: Duration = Duration::from_millis(5);

/// How often we look.
const LOOK_EVERY: Duration = Duration::from_micros(50);

/// Waits until every frame that was under way between two interfaces of this host has been
/// received. After five milliseconds it gives up: UDP may lose, and TCP sends again.
pub(super) fn settle() {
    let begun = Instant::now();
    let mut busy = vec![true; waiting().len()];
    while begun.elapsed() < SETTLE_MAX {
        for (busy, waiting) in busy.iter_mut().zip(waiting()) {
            *busy &= waiting > 0;
        }
        if !busy.contains(&true) {
            return;
        }
        thread::sleep(LOOK_EVERY);
    }
    debug!("frames are still under way after {SETTLE_MAX:?}");
}

/// The frames that wait to be received, for each processor: the twelfth column of
/// `/proc/net/softnet_stat` (kernel, net/core/net-procfs.c).
fn waiting() -> Vec<u64> {
    let text = fs::read_to_string("/proc/net/softnet_stat").unwrap_or_default();
    let column = |line: &str| u64::from_str_radix(line.split_whitespace().nth(11)?, 16).ok();
    text.lines().filter_map(column).collect()
}

#[cfg(test)]
mod tests {
    #[test]
    fn every_processor_has_a_queue() {
        assert!(!super::waiting().is_empty());
    }
}
