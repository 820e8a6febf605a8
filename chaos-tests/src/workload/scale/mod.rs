//! Very many of one thing.

mod areas;
mod processes;
mod threads;

use super::{Area, local};

pub(super) const AREA: Area = Area {
    name: "scale",
    workloads: &[
        local("many-processes", "a tree of a thousand processes", processes::run),
        local("many-threads", "a process of a thousand threads", threads::run),
        local("many-areas", "a process of fifty thousand areas", areas::run),
    ],
};
