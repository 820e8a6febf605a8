//! Time: timers, clocks, and waits that end in time.

mod single;
mod threads;
mod timers;
mod waits;

use super::{Area, local};

pub(super) const AREA: Area = Area {
    name: "time",
    workloads: &[
        local(
            "timers",
            "interval, POSIX and descriptor timers; clocks that never go back",
            timers::run,
        ),
        local(
            "waits",
            "sleep, poll, epoll, futex and select with timeouts, never interrupted",
            waits::run,
        ),
        local("ppoll", "waits of ppoll(2)", single::by_ppoll),
        local("pselect", "waits of pselect(2)", single::by_pselect),
        local("sigtimedwait", "waits for a signal", single::for_a_signal),
        local("until-date", "sleep until a time of day", single::until_a_date),
        local("until-boottime", "sleep until a time since boot", single::until_since_boot),
        local("thread-timers", "timers that each tell one thread alone", threads::run),
        local("receive-timeout", "a socket that gives up by itself", single::for_data),
    ],
};
