//! timerfd_create(2).

use std::{
    io,
    os::fd::{AsFd, OwnedFd},
};

use ckpt_format::files::{Kind, Timer};

use super::{
    find::{Object, Refusal},
    info::Info,
    rebuild::RebuildError,
};
use crate::{due, sys::event};

/// How often a timer is read again that ended while it was read.
const TRIES: u32 = 8;

pub(super) fn capture(object: &Object) -> Result<Kind, Refusal> {
    // First, because it also counts the expirations of a periodic timer up to now, which
    // nobody has counted while nobody read it.
    let (mut remaining_ns, _) = event::timer_remaining(object.fd())?;
    let mut tries = 0;
    loop {
        let info = Info::of(object.fd())?;
        let before = remaining_ns;
        let interval_ns;
        (remaining_ns, interval_ns) = event::timer_remaining(object.fd())?;
        // One that ends between the two would be counted, and would end once more.
        let ended = remaining_ns > before || (before != 0 && remaining_ns == 0);
        tries += 1;
        if ended && tries < TRIES {
            continue;
        }
        let read_at = event::now(libc::CLOCK_MONOTONIC)?;
        return Ok(Kind::Timer(Timer {
            clock: i32::try_from(info.number("clockid", 10)?).map_err(io::Error::other)?,
            settime_flags: i32::try_from(info.number("settime flags", 8)?)
                .map_err(io::Error::other)?,
            remaining_ns,
            interval_ns,
            ticks: info.number("ticks", 10)?,
            read_at_ns: i64::try_from(read_at).map_err(io::Error::other)?,
        }));
    }
}

/// `ahead_ns` is how far the source's CLOCK_MONOTONIC is ahead of ours.
pub(super) fn rebuild(timer: &Timer, ahead_ns: i64) -> Result<OwnedFd, RebuildError> {
    let failed = |source: io::Error| RebuildError::Kernel { object: "timerfd", source };
    let made = event::timer(timer.clock).map_err(failed)?;
    let elapsed = event::elapsed(timer.read_at_ns, ahead_ns).map_err(failed)?;
    let left = due::left(timer.remaining_ns, timer.interval_ns, elapsed);
    if left.remaining_ns != 0 {
        let wall = matches!(timer.clock, libc::CLOCK_REALTIME | libc::CLOCK_REALTIME_ALARM);
        let absolute = timer.settime_flags & libc::TFD_TIMER_ABSTIME != 0;
        // An absolute timer of the wall clock follows the clock when it is set; the others only
        // count down, and then the time namespace does not matter.
        let (flags, value) = if wall && absolute {
            let now = event::now(libc::CLOCK_REALTIME).map_err(failed)?;
            (timer.settime_flags, left.remaining_ns.saturating_add(now))
        } else {
            (0, left.remaining_ns)
        };
        event::arm_timer(made.as_fd(), flags, value, timer.interval_ns).map_err(failed)?;
    }
    // Last, because arming sets the ticks to zero.
    let ticks = timer.ticks.saturating_add(left.expirations);
    if ticks != 0 {
        event::set_timer_ticks(made.as_fd(), ticks).map_err(failed)?;
    }
    Ok(made)
}
