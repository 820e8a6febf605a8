//! Very many of one thing.

mod areas;
mod connections;
mod copies;
mod descriptors;
mod processes;
mod threads;

use super::{Area, local};

pub(super) const AREA: Area = Area {
    name: "scale",
    workloads: &[
        local("many-processes", "a tree of a thousand processes", processes::run),
        local("many-threads", "a process of a thousand threads", threads::run),
        local("many-connections", "two thousand ends of TCP connections", connections::run),
        local("many-files", "ten thousand open files of several kinds", descriptors::run),
        local("many-areas", "a process of fifty thousand areas", areas::run),
        local("many-copies", "eight processes that each made the same 32 MiB", copies::run),
    ],
};
