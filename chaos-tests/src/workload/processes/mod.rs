//! Processes and threads: registers, signals, identities, relatives.

mod family;
mod identity;
mod mutexes;
mod signals;
mod threads;

use super::{Area, local};

pub(super) const AREA: Area = Area {
    name: "processes",
    workloads: &[
        local(
            "threads",
            "thread-locals, locks and conditions, the processor a thread runs on",
            threads::run,
        ),
        local(
            "registers",
            "vector, general and control registers in the middle of a loop",
            threads::registers,
        ),
        local("mutexes", "robust mutexes whose owner dies", mutexes::run),
        local(
            "signals",
            "handlers, masks, pending and queued signals, alternate stack",
            signals::run,
        ),
        local(
            "identity",
            "user, groups, capabilities, limits, umask, working directory, names",
            identity::run,
        ),
        local(
            "family",
            "sessions, groups, orphans, children that come and go, a zombie",
            family::run,
        ),
        local("stopped", "a child stopped by a signal", family::stopped),
    ],
};
