//! Waits of one kind each. None may be interrupted, end early, or end much too late.

use std::io::Read;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use ckpt_engine::sys::program::signal;
use nix::poll::{PollFd, PollFlags, ppoll};
use nix::sys::select::{FdSet, pselect};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::time::TimeSpec;
use nix::time::{ClockId, ClockNanosleepFlags, clock_gettime, clock_nanosleep};

use crate::client::record::mix;
use crate::workload::context::Context;
use crate::workload::outcome::{Failure, LATE, ensure};

/// Waits again and again, each time for another while.
fn again(
    context: &mut Context,
    mut wait: impl FnMut(Duration) -> Result<(), Failure>,
) -> Result<(), Failure> {
    for turn in 0u64.. {
        if !context.step(Duration::from_millis(1))? {
            break;
        }
        // Short ones, so that the end is noticed in time, and now and then a long one.
        let longest = if turn % 8 == 0 { 2000 } else { 200 };
        let asked = Duration::from_millis(1 + mix(turn) % longest);
        let began = Instant::now();
        wait(asked)?;
        let took = if context.progress.plant() { Duration::ZERO } else { began.elapsed() };
        ensure(took + Duration::from_millis(1) >= asked, || {
            format!("a wait of {asked:?} ended after {took:?}")
        })?;
        ensure(took < asked + LATE, || format!("a wait of {asked:?} took {took:?}"))?;
        context.progress.count();
    }
    Ok(())
}

pub(super) fn by_ppoll(context: &mut Context) -> Result<(), Failure> {
    let (read, _write) = std::io::pipe()?;
    again(context, |time| {
        let mut fds = [PollFd::new(read.as_fd(), PollFlags::POLLIN)];
        let found = ppoll(&mut fds, Some(TimeSpec::from_duration(time)), Some(SigSet::empty()))?;
        ensure(found == 0, || "ppoll saw data in an empty pipe".to_owned())
    })
}

pub(super) fn by_pselect(context: &mut Context) -> Result<(), Failure> {
    let (read, _write) = std::io::pipe()?;
    again(context, |time| {
        let mut set = FdSet::new();
        set.insert(read.as_fd());
        let time = TimeSpec::from_duration(time);
        let found = pselect(None, &mut set, None, None, &time, &SigSet::empty())?;
        ensure(found == 0, || "pselect saw data in an empty pipe".to_owned())
    })
}

pub(super) fn for_a_signal(context: &mut Context) -> Result<(), Failure> {
    let number = Signal::SIGUSR2 as i32;
    signal::block(number)?;
    again(context, |time| {
        let ended = signal::take(&[number], time).err().and_then(|error| error.raw_os_error());
        ensure(ended == Some(libc::EAGAIN), || format!("a wait for a signal ended with {ended:?}"))
    })
}

pub(super) fn until_a_date(context: &mut Context) -> Result<(), Failure> {
    again(context, |time| until(ClockId::CLOCK_REALTIME, time))
}

pub(super) fn until_since_boot(context: &mut Context) -> Result<(), Failure> {
    again(context, |time| until(ClockId::CLOCK_BOOTTIME, time))
}

fn until(clock: ClockId, time: Duration) -> Result<(), Failure> {
    let end = TimeSpec::from_duration(Duration::from(clock_gettime(clock)?) + time);
    clock_nanosleep(clock, ClockNanosleepFlags::TIMER_ABSTIME, &end)?;
    Ok(())
}

/// A socket that gives up by itself.
pub(super) fn for_data(context: &mut Context) -> Result<(), Failure> {
    let (mut one, _other) = UnixStream::pair()?;
    again(context, |time| {
        one.set_read_timeout(Some(time))?;
        let ended = one.read(&mut [0; 1]).err().and_then(|error| error.raw_os_error());
        ensure(ended == Some(libc::EAGAIN), || format!("a wait for data ended with {ended:?}"))
    })
}
