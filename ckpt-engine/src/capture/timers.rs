//! Timers of a process: which there are, and that each expiry is counted once.

use ckpt_format::process::{Process, SignalInfo};

/// `si_code` of the signals of timers (asm-generic/siginfo.h).
const SI_TIMER: i32 = -2;
const SI_KERNEL: i32 = 0x80;

/// Takes those back that ended between the reading of the timers and that of the pending
/// signals, which took `window_ns` in all: their expiry is in both, and would be told twice.
pub(super) fn count_once(process: &mut Process, window_ns: u64) {
    let threads = process.threads.iter().flat_map(|thread| &thread.pending);
    let pending: Vec<&SignalInfo> = process.pending.iter().chain(threads).collect();
    let word = |info: &SignalInfo, at: usize| {
        let bytes = info.0.get(at..at + 4).and_then(|bytes| bytes.try_into().ok());
        bytes.map_or(0, i32::from_le_bytes)
    };
    let ended = |remaining_ns: u64| remaining_ns != 0 && remaining_ns <= window_ns;
    for timer in &mut process.posix_timers {
        let is_its = |info: &&SignalInfo| word(info, 8) == SI_TIMER && word(info, 16) == timer.id;
        if ended(timer.remaining_ns) && pending.iter().any(is_its) {
            timer.remaining_ns = next(timer.remaining_ns, timer.interval_ns);
        }
    }
    let alarm = |info: &&SignalInfo| word(info, 0) == libc::SIGALRM && word(info, 8) == SI_KERNEL;
    let [real, ..] = &mut process.interval_timers;
    if ended(real.value_us.saturating_mul(1000)) && pending.iter().any(alarm) {
        real.value_us = next(real.value_us, real.interval_us);
    }
}

/// What is left of a timer until the expiry after the next one; 0 if there is none.
fn next(remaining: u64, interval: u64) -> u64 {
    if interval == 0 { 0 } else { remaining.saturating_add(interval) }
}

/// One timer in `/proc/PID/timers` (proc_pid_timers(5)).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct TimerLine {
    pub(super) id: i32,
    pub(super) signal: i32,
    pub(super) value: u64,
    pub(super) notify: i32,
    pub(super) thread: i32,
    pub(super) clock: i32,
}

pub(super) fn timer_lines(text: &str) -> Vec<TimerLine> {
    let mut timers: Vec<TimerLine> = Vec::new();
    for line in text.lines() {
        let Some((key, value)) = line.split_once(": ") else { continue };
        if key == "ID" {
            timers.push(TimerLine { id: value.parse().unwrap_or(0), ..TimerLine::default() });
        }
        let Some(timer) = timers.last_mut() else { continue };
        match key {
            "signal" => {
                let (signal, pointer) = value.split_once('/').unwrap_or((value, "0"));
                timer.signal = signal.parse().unwrap_or(0);
                timer.value = u64::from_str_radix(pointer, 16).unwrap_or(0);
            }
            "notify" => {
                let (how, whom) = value.split_once('/').unwrap_or((value, ""));
                timer.notify = match how {
                    "none" => libc::SIGEV_NONE,
                    "thread" => libc::SIGEV_THREAD,
                    _ => libc::SIGEV_SIGNAL,
                };
                if let Some(thread) = whom.strip_prefix("tid.") {
                    timer.notify |= libc::SIGEV_THREAD_ID;
                    timer.thread = thread.parse().unwrap_or(0);
                }
            }
            "ClockID" => timer.clock = value.parse().unwrap_or(0),
            _ => {}
        }
    }
    timers
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn timers_are_read_with_their_thread() {
        let text = "ID: 0\nsignal: 60/00007fff86e452a8\nnotify: signal/tid.2634\nClockID: 1\n\
                    ID: 7\nsignal: 14/0000000000000001\nnotify: none/pid.2634\nClockID: -6\n";
        let timers = timer_lines(text);
        assert_eq!(timers.len(), 2);
        assert_eq!((timers[0].signal, timers[0].thread, timers[0].clock), (60, 2634, 1));
        assert_eq!(timers[0].value, 0x7fff_86e4_52a8);
        assert_eq!((timers[1].id, timers[1].notify, timers[1].clock), (7, libc::SIGEV_NONE, -6));
    }
}
