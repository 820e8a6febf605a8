//! Time: timers, clocks, and waits that end in time.

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
    ],
};
