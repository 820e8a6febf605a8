//! setitimer(2) and timer_create(2) timers.

use ckpt_format::process::{IntervalTimer, PosixTimer};

use crate::{
    due,
    inject::{Batch, Gate, InjectError, Stopped},
    sys::task,
};

/// The highest id that is counted up to, at about a microsecond each.
const COUNTED_ID_MAX: i32 = 200_000;

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

/// Makes the timers of timer_create(2) with their old ids; they do not run yet.
pub(super) fn create_posix_timers(
    thread: &Stopped,
    gate: Gate,
    timers: &[PosixTimer],
) -> Result<(), InjectError> {
    if timers.is_empty() {
        return Ok(());
    }
    if task::can_choose_timer_ids() {
        let mut batch = gate.batch();
        batch.call("prctl", libc::SYS_prctl, &[task::PR_TIMER_CREATE_RESTORE_IDS, 1]);
        for timer in timers {
            create(&mut batch, timer);
        }
        batch.call("prctl", libc::SYS_prctl, &[task::PR_TIMER_CREATE_RESTORE_IDS, 0]);
        return batch.run(thread)?.all();
    }
    count_up_to(thread, gate, timers)
}

/// Before Linux 6.16 a process counts its timers up from 0: those before the wanted ids are made
/// and deleted.
fn count_up_to(thread: &Stopped, gate: Gate, timers: &[PosixTimer]) -> Result<(), InjectError> {
    let mut timers: Vec<_> = timers.iter().collect();
    timers.sort_by_key(|timer| timer.id);
    let mut next = 0;
    let (mut batch, mut made) = (gate.batch(), Vec::new());
    for timer in timers {
        if timer.id > COUNTED_ID_MAX {
            let source = std::io::Error::from_raw_os_error(libc::ERANGE);
            let call = format!("timer_create with id {}", timer.id).into();
            return Err(InjectError::Call { call, tid: thread.tid, source });
        }
        let mut event = [0u8; 64];
        event[12..16].copy_from_slice(&libc::SIGEV_NONE.to_le_bytes());
        let (mut nothing, mut place) = (batch.bytes(&event), batch.room(4));
        while next < timer.id {
            let arguments = [libc::CLOCK_MONOTONIC as u64, nothing, place];
            batch.call("timer_create", libc::SYS_timer_create, &arguments);
            batch.call("timer_delete", libc::SYS_timer_delete, &[next as u64]);
            next += 1;
            if batch.is_nearly_full() {
                let full = std::mem::replace(&mut batch, gate.batch());
                run_and_compare(full, thread, &std::mem::take(&mut made))?;
                (nothing, place) = (batch.bytes(&event), batch.room(4));
            }
        }
        made.push((timer.id, create(&mut batch, timer)));
        next += 1;
        if batch.is_nearly_full() {
            let full = std::mem::replace(&mut batch, gate.batch());
            run_and_compare(full, thread, &std::mem::take(&mut made))?;
        }
    }
    run_and_compare(batch, thread, &made)
}

/// Makes sure that each timer got its id.
fn run_and_compare(batch: Batch, thread: &Stopped, made: &[(i32, u64)]) -> Result<(), InjectError> {
    let done = batch.run(thread)?;
    done.all()?;
    match made.iter().all(|&(id, place)| done.word(place) == id.cast_unsigned()) {
        true => Ok(()),
        false => {
            let source = std::io::Error::from_raw_os_error(libc::EEXIST);
            Err(InjectError::Call { call: "timer_create".into(), tid: thread.tid, source })
        }
    }
}

/// Adds the call that makes a timer; returns where its id will be.
fn create(batch: &mut Batch, timer: &PosixTimer) -> u64 {
    let mut event = [0u8; 64];
    event[..8].copy_from_slice(&timer.value.to_le_bytes());
    event[8..12].copy_from_slice(&timer.signal.to_le_bytes());
    event[12..16].copy_from_slice(&timer.notify.to_le_bytes());
    event[16..20].copy_from_slice(&timer.thread.to_le_bytes());
    let event = batch.bytes(&event);
    let id = batch.bytes(&timer.id.to_le_bytes());
    batch.call("timer_create", libc::SYS_timer_create, &[timer.clock as u64, event, id]);
    id
}

/// Adds the calls that start the timers of timer_create(2).
pub(super) fn start_posix_timers(batch: &mut Batch, timers: &[PosixTimer], elapsed_ns: i64) {
    for timer in timers {
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
}

fn bytes(words: &[u64]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

#[cfg(test)]
mod tests {
    use std::process::{Command, Stdio};

    use super::*;
    use crate::{areas::AddressSpace, procfs, sys::ptrace};

    #[test]
    fn ids_are_counted_up_to_on_kernels_that_give_them_in_order() {
        let mut child = Command::new("sleep").arg("100").stdin(Stdio::null()).spawn().unwrap();
        let pid = child.id() as i32;
        while procfs::read_text(pid, "comm").unwrap().trim() != "sleep" {}
        let vdso = AddressSpace::read(pid).unwrap().vdso().unwrap();
        let mut stopped = Stopped::attach(&[pid], ptrace::SUSPEND_SECCOMP).unwrap();
        let thread = stopped.pop().unwrap();
        let gate = Gate::open(&thread, vdso, None).unwrap();
        let timers = [2500, 0, 7].map(|id| PosixTimer {
            id,
            clock: libc::CLOCK_MONOTONIC,
            notify: libc::SIGEV_SIGNAL,
            signal: libc::SIGUSR1,
            ..PosixTimer::default()
        });
        count_up_to(&thread, gate, &timers).unwrap();
        let text = procfs::read_text(pid, "timers").unwrap();
        let ids: Vec<_> = text.lines().filter_map(|line| line.strip_prefix("ID: ")).collect();
        assert_eq!(ids.len(), 3, "{text}");
        for id in ["0", "7", "2500"] {
            assert!(ids.contains(&id), "{text}");
        }
        thread.detach().unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
    }
}
