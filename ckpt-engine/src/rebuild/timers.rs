//! setitimer(2) and timer_create(2) timers.

use ckpt_format::process::{IntervalTimer, PosixTimer};

use crate::inject::Batch;

const PR_TIMER_CREATE_RESTORE_IDS: u64 = 77;

/// Adds the calls that start the three interval timers.
pub(super) fn interval_timers(batch: &mut Batch, timers: &[IntervalTimer; 3]) {
    for (which, timer) in timers.iter().enumerate() {
        // A periodic timer whose signal is pending shows no value: it must go on all the same.
        let value = match timer.value_us {
            0 => timer.interval_us,
            value => value,
        };
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
pub(super) fn posix_timers(batch: &mut Batch, timers: &[PosixTimer]) {
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
        let remaining = match timer.remaining_ns {
            0 => timer.interval_ns,
            remaining => remaining,
        };
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
