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
use crate::sys::event;

pub(super) fn capture(object: &Object) -> Result<Kind, Refusal> {
    // First, because it also counts the expirations of a periodic timer up to now, which
    // nobody has counted while nobody read it.
    let (remaining_ns, interval_ns) = event::timer_remaining(object.fd())?;
    let info = Info::of(object.fd())?;
    Ok(Kind::Timer(Timer {
        clock: i32::try_from(info.number("clockid", 10)?).map_err(io::Error::other)?,
        settime_flags: i32::try_from(info.number("settime flags", 8)?).map_err(io::Error::other)?,
        remaining_ns,
        interval_ns,
        ticks: info.number("ticks", 10)?,
    }))
}

pub(super) fn rebuild(timer: &Timer) -> Result<OwnedFd, RebuildError> {
    let failed = |source: io::Error| RebuildError::Kernel { object: "timerfd", source };
    let made = event::timer(timer.clock).map_err(failed)?;
    if timer.remaining_ns != 0 {
        let wall = matches!(timer.clock, libc::CLOCK_REALTIME | libc::CLOCK_REALTIME_ALARM);
        let absolute = timer.settime_flags & libc::TFD_TIMER_ABSTIME != 0;
        // An absolute timer of the wall clock follows the clock when it is set; the others only
        // count down, and then the time namespace does not matter.
        let (flags, value) = if wall && absolute {
            (
                timer.settime_flags,
                timer.remaining_ns + event::now(libc::CLOCK_REALTIME).map_err(failed)?,
            )
        } else {
            (0, timer.remaining_ns)
        };
        event::arm_timer(made.as_fd(), flags, value, timer.interval_ns).map_err(failed)?;
    }
    // Last, because arming sets the ticks to zero.
    if timer.ticks != 0 {
        event::set_timer_ticks(made.as_fd(), timer.ticks).map_err(failed)?;
    }
    Ok(made)
}
