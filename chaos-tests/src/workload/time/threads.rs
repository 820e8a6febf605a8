//! Timers that each tell one thread alone.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use ckpt_engine::sys::program::signal;
use nix::sys::signal::{SigEvent, SigevNotify, Signal};
use nix::sys::timer::{Expiration, Timer, TimerSetTimeFlags};
use nix::time::ClockId;
use nix::unistd::gettid;

use crate::workload::context::Context;
use crate::workload::outcome::{Failure, LATE, ensure, same};

const THREADS: usize = 3;

/// What a thread has been told: how often, and whether it was ever meant for another one.
#[derive(Default)]
struct Told {
    count: AtomicU64,
    strange: AtomicU64,
}

fn period(number: usize) -> Duration {
    Duration::from_millis(20 + 7 * number as u64)
}

fn listen(number: usize, told: &Told, shift: &AtomicU64) -> Result<(), Failure> {
    let value = 1000 + number;
    let event = SigevNotify::SigevThreadId {
        signal: Signal::SIGUSR1,
        thread_id: gettid().as_raw(),
        si_value: value as isize,
    };
    let mut timer = Timer::new(ClockId::CLOCK_MONOTONIC, SigEvent::new(event))?;
    let every = Expiration::Interval(period(number).into());
    timer.set(every, TimerSetTimeFlags::empty())?;
    loop {
        let taken = signal::take(&[Signal::SIGUSR1 as i32], LATE)?;
        if taken.value + shift.load(Ordering::SeqCst) as usize != value {
            told.strange.fetch_add(1, Ordering::SeqCst);
        }
        told.count.fetch_add(1, Ordering::SeqCst);
    }
}

pub(super) fn run(context: &mut Context) -> Result<(), Failure> {
    // Those that come inherit it.
    signal::block(Signal::SIGUSR1 as i32)?;
    let told: Arc<[Told; THREADS]> = Arc::default();
    let shift = Arc::new(AtomicU64::new(0));
    for number in 0..THREADS {
        let (told, shift) = (told.clone(), shift.clone());
        std::thread::spawn(move || {
            if listen(number, &told[number], &shift).is_err() {
                told[number].strange.fetch_add(1, Ordering::SeqCst);
            }
        });
    }
    let mut seen = [0; THREADS];
    let mut changed = [Instant::now(); THREADS];
    while context.step(Duration::from_millis(20))? {
        for (number, told) in told.iter().enumerate() {
            same("signals of others", told.strange.load(Ordering::SeqCst), 0)?;
            let count = told.count.load(Ordering::SeqCst);
            if count != seen[number] {
                (seen[number], changed[number]) = (count, Instant::now());
            }
            ensure(changed[number].elapsed() < LATE, || format!("timer {number} has ended"))?;
        }
        if context.progress.plant() {
            shift.store(1, Ordering::SeqCst);
        }
    }
    Ok(())
}
