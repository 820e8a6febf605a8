//! Descriptors that count, at their limits.

use std::time::{Duration, Instant};

use ckpt_engine::sys::program::signal;
use nix::errno::Errno;
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::time::TimeSpec;
use nix::sys::timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags};
use nix::time::clock_gettime;
use nix::unistd::getpid;

use crate::workload::context::Context;
use crate::workload::outcome::{Failure, LATE, ensure, same};
use crate::workload::process::Child;

pub(super) fn full(context: &mut Context) -> Result<(), Failure> {
    const MAX: u64 = u64::MAX - 1;
    let counter = EventFd::from_value_and_flags(0, EfdFlags::EFD_NONBLOCK)?;
    counter.write(MAX)?;
    while context.step(Duration::from_millis(8))? {
        same("counting beyond the end", counter.write(1), Err(Errno::EAGAIN))?;
        if context.progress.plant() {
            counter.read()?;
            counter.write(MAX - 1)?;
        }
        same("a full counter", counter.read()?, MAX)?;
        counter.write(MAX)?;
    }
    Ok(())
}

pub(super) fn tokens(context: &mut Context) -> Result<(), Failure> {
    let flags = EfdFlags::EFD_SEMAPHORE | EfdFlags::EFD_NONBLOCK;
    let (free, taken) =
        (EventFd::from_value_and_flags(9, flags)?, EventFd::from_value_and_flags(0, flags)?);
    // The child brings back what we take.
    let child = Child::start(context, "porter", |stop| {
        while !stop.wait(Duration::from_millis(1))? {
            match taken.read() {
                Ok(count) => {
                    same("tokens at once", count, 1)?;
                    free.write(1)?;
                }
                Err(Errno::EAGAIN) => {}
                Err(error) => return Err(error.into()),
            }
        }
        // All of them are free at the end.
        while taken.read().is_ok() {
            free.write(1)?;
        }
        for _ in 0..9 {
            same("a token at the end", free.read()?, 1)?;
        }
        same("a tenth token", free.read(), Err(Errno::EAGAIN))
    })?;
    while context.step(Duration::from_millis(3))? {
        child.check()?;
        match free.read() {
            Ok(count) => {
                same("tokens at once", count, 1)?;
                taken.write(1 + u64::from(context.progress.plant()))?;
            }
            Err(Errno::EAGAIN) => {}
            Err(error) => return Err(error.into()),
        }
    }
    child.finish()
}

pub(super) fn queued(context: &mut Context) -> Result<(), Failure> {
    const SIGNAL: i32 = 42;
    signal::block(SIGNAL)?;
    signal::block(Signal::SIGUSR2 as i32)?;
    let mut set = SigSet::empty();
    set.add(Signal::SIGUSR2);
    let other = SignalFd::with_flags(&set, SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC)?;
    let own = getpid().as_raw();
    let mut next = 0usize;
    (0..5).try_for_each(|value| signal::queue(own, SIGNAL, value))?;
    let mut sent = 5;
    while context.step(Duration::from_millis(8))? {
        same("a signal that nobody sent", other.read_signal()?.is_some(), false)?;
        let found = signal::take(&[SIGNAL], Duration::ZERO)?;
        let planted = usize::from(context.progress.plant());
        same("the oldest value", (found.value, found.pid), (next + planted, own))?;
        next += 1;
        signal::queue(own, SIGNAL, sent)?;
        sent += 1;
    }
    Ok(())
}

pub(super) fn cancel(context: &mut Context) -> Result<(), Failure> {
    let timer = TimerFd::new(ClockId::CLOCK_REALTIME, TimerFlags::TFD_NONBLOCK)?;
    let flags = TimerSetTimeFlags::TFD_TIMER_ABSTIME | TimerSetTimeFlags::TFD_TIMER_CANCEL_ON_SET;
    let now = || clock_gettime(nix::time::ClockId::CLOCK_REALTIME).map(Duration::from);
    let half = Duration::from_millis(500);
    let mut due = now()? + half;
    timer.set(Expiration::OneShot(TimeSpec::from_duration(due)), flags)?;
    let mut set = Instant::now();
    let mut planted = false;
    while context.step(Duration::from_millis(8))? {
        let is_due = now()? >= due;
        match timer.wait() {
            Ok(()) => {
                let early = due.saturating_sub(now()?);
                ensure(is_due || early.is_zero(), || format!("a timer ended {early:?} early"))?;
            }
            Err(Errno::EAGAIN) => {
                let late = now()?.saturating_sub(due);
                ensure(late < LATE && !planted, || format!("a timer is late by {late:?}"))?;
                continue;
            }
            // Somebody has set the clock of the host.
            Err(Errno::ECANCELED) => {}
            Err(error) => return Err(error.into()),
        }
        ensure(set.elapsed() < LATE, || "a timer of half a second took long".to_owned())?;
        (due, set) = (now()? + half, Instant::now());
        planted = context.progress.plant();
        let end = if planted { due + LATE } else { due };
        timer.set(Expiration::OneShot(TimeSpec::from_duration(end)), flags)?;
    }
    Ok(())
}

pub(super) fn periodic(context: &mut Context) -> Result<(), Failure> {
    const PERIOD: Duration = Duration::from_millis(50);
    let timer = TimerFd::new(ClockId::CLOCK_BOOTTIME, TimerFlags::TFD_NONBLOCK)?;
    let period = TimeSpec::from_duration(PERIOD);
    let boot = || clock_gettime(nix::time::ClockId::CLOCK_BOOTTIME).map(Duration::from);
    timer.set(Expiration::Interval(period), TimerSetTimeFlags::empty())?;
    let start = boot()?;
    let mut ticks = 0u64;
    while context.step(Duration::from_millis(120))? {
        let mut bytes = [0; 8];
        match nix::unistd::read(&timer, &mut bytes) {
            Ok(_) => ticks += u64::from_ne_bytes(bytes),
            Err(Errno::EAGAIN) => {}
            Err(error) => return Err(error.into()),
        }
        if context.progress.plant() {
            ticks += 3;
        }
        // It counts the time while nobody looked, and no more.
        let due = (boot()? - start).as_nanos() / PERIOD.as_nanos();
        let due = u64::try_from(due).unwrap_or(u64::MAX);
        ensure(ticks == due || ticks + 1 == due, || {
            format!("{ticks} ticks counted, {due} were due")
        })?;
    }
    Ok(())
}
