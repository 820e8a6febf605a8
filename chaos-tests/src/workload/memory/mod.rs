//! Memory: what it holds, and how it is mapped.

mod counters;
mod maps;

use super::{Area, local};

pub(super) const AREA: Area = Area {
    name: "memory",
    workloads: &[
        local(
            "counters",
            "counters in memory against the same in files; pages written at random",
            counters::run,
        ),
        local(
            "maps",
            "maps of files, shared with children, guarded, moved, discarded",
            maps::kinds,
        ),
        local("churn", "maps made, resized and removed all the time; deep stacks", maps::churn),
    ],
};
