//! Files of every type, and what is open on them.

mod devices;
mod pipes;
mod regular;
mod terminals;

use super::{Area, local};

pub(super) const AREA: Area = Area {
    name: "files",
    workloads: &[
        local(
            "regular",
            "offsets, append, sharing after fork, deleted files, directories",
            regular::run,
        ),
        local("pipes", "pipes and FIFOs with data in them", pipes::run),
        local("terminals", "a pseudo terminal with a session at its other end", terminals::run),
        local("devices", "the character devices that everybody has", devices::run),
    ],
};
