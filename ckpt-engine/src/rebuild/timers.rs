//! setitimer(2) and timer_create(2) timers.

use ckpt_format::process::{IntervalTimer, PosixTimer};

use crate::{due, inject::Batch};

const PR_TIMER_CREATE_RESTORE_IDS: u64 = 77;

/// What to arm a timer with that was read `elapsed_ns` ago, in nanoseconds. One that has ended
/// meanwhile ends at once, so that the kernel itself tells the program.
fn value(remaining_ns: u64, interval_ns: u64, elapsed_ns: i64) -> u64 {
    // A periodic timer whose signal is pending may show no value: it must go on all the same.
    let remaining_ns = if remaining_ns == 0 { interval_ns } else { remaining_ns };
    let left = due::left(remaining_ns, interval_ns, elapsed_ns);
    if left.expirations > 0 { 1 } else { left.remaining_ns }
}

/// Adds the calls that start the three interval timers.
pub(super) fn interval_timers(batch: &mut Batch, timers: &[IntervalTimer; 3], elapsed_ns: i64) {
    for (which, timer) in timers.iter().enumerate() {
        // The other two count the time that the process uses.
        let elapsed_ns = if which == libc::ITIMER_REAL as usize { elapsed_ns } else { 0 };
        let [remaining, interval] =
            [timer.value_us, timer.interval_us].map(|micros| micros.saturating_mul(1000));
        let value = value(remaining, interval, elapsed_ns).div_ceil(1000);
        if value == 0 {
            continue;
        }
        let words = [
            timer.interval_us / 1_000_000,
            timer.interval_us % 1_000_000,
            value / 1_000_000,
            value % 1_000_000,
        ];
        let setting = batch.bytes(&bytes(&words));
        batch.call("setitimer", libc::SYS_setitimer, &[which as u64, setting, 0]);
    }
}

/// Adds the calls that make and start timer_create(2) timers with their old ids
/// (`PR_TIMER_CREATE_RESTORE_IDS`, Linux 6.16).
pub(super) fn posix_timers(batch: &mut Batch, timers: &[PosixTimer], elapsed_ns: i64) {
    if timers.is_empty() {
        return;
    }
    batch.call("prctl", libc::SYS_prctl, &[PR_TIMER_CREATE_RESTORE_IDS, 1]);
    for timer in timers {
        let mut event = [0u8; 64];
        event[..8].copy_from_slice(&timer.value.to_le_bytes());
        event[8..12].copy_from_slice(&timer.signal.to_le_bytes());
        event[12..16].copy_from_slice(&timer.notify.to_le_bytes());
        event[16..20].copy_from_slice(&timer.thread.to_le_bytes());
        let event = batch.bytes(&event);
        let id = batch.bytes(&timer.id.to_le_bytes());
        let arguments = [timer.clock as u64, event, id];
        batch.call("timer_create", libc::SYS_timer_create, &arguments);
        // Negative numbers are clocks of the time that a process or thread uses.
        let wall = timer.clock >= 0
            && !matches!(
                timer.clock,
                libc::CLOCK_PROCESS_CPUTIME_ID | libc::CLOCK_THREAD_CPUTIME_ID
            );
        let elapsed_ns = if wall { elapsed_ns } else { 0 };
        let remaining = value(timer.remaining_ns, timer.interval_ns, elapsed_ns);
        if remaining != 0 {
            let setting = batch.bytes(&bytes(&[
                timer.interval_ns / 1_000_000_000,
                timer.interval_ns % 1_000_000_000,
                remaining / 1_000_000_000,
                remaining % 1_000_000_000,
            ]));
            let arguments = [timer.id as u64, 0, setting, 0];
            batch.call("timer_settime", libc::SYS_timer_settime, &arguments);
        }
    }
    batch.call("prctl", libc::SYS_prctl, &[PR_TIMER_CREATE_RESTORE_IDS, 0]);
}

fn bytes(words: &[u64]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}
