//! Workloads that check themselves, and know nothing of how they are moved.
//!
//! Each is a small program that holds kernel objects of one kind, uses them all the time, and
//! compares what it finds with what it knows. It fails the moment something is lost, repeated,
//! changed, early or much too late. [`AREAS`] lists them; `selfcheck` runs them.

pub mod context;
pub mod keep;
pub mod listing;
pub mod outcome;
pub mod peer;
pub mod process;
pub mod stream;
pub mod supervisor;

mod cgroups;
mod files;
mod ipc;
mod memory;
mod mounts;
mod namespaces;
mod network;
mod objects;
mod processes;
mod scale;
mod sockets;
mod time;

use context::Context;
use outcome::Failure;

/// A workload by name.
#[derive(Clone, Copy, Debug)]
pub struct Workload {
    /// What it is called on the command line and in the table.
    pub name: &'static str,
    /// What it holds.
    pub about: &'static str,
    /// Whether it needs a host to talk to.
    pub needs_peer: bool,
    /// Runs until it is told to stop.
    pub run: fn(&mut Context) -> Result<(), Failure>,
}

const fn local(
    name: &'static str,
    about: &'static str,
    run: fn(&mut Context) -> Result<(), Failure>,
) -> Workload {
    Workload { name, about, needs_peer: false, run }
}

const fn with_peer(
    name: &'static str,
    about: &'static str,
    run: fn(&mut Context) -> Result<(), Failure>,
) -> Workload {
    Workload { name, about, needs_peer: true, run }
}

/// The workloads of one part of the kernel.
#[derive(Clone, Copy, Debug)]
pub struct Area {
    /// What it is called on the command line and in the documentation.
    pub name: &'static str,
    /// Its workloads.
    pub workloads: &'static [Workload],
}

/// All areas.
pub const AREAS: &[Area] = &[
    memory::AREA,
    processes::AREA,
    scale::AREA,
    time::AREA,
    files::AREA,
    ipc::AREA,
    sockets::AREA,
    objects::AREA,
    mounts::AREA,
    namespaces::AREA,
    network::AREA,
    cgroups::AREA,
];

/// All workloads.
pub fn all() -> impl Iterator<Item = &'static Workload> {
    AREAS.iter().flat_map(|area| area.workloads)
}

/// The workload of this name.
pub fn find(name: &str) -> Option<&'static Workload> {
    all().find(|workload| workload.name == name)
}

/// The workloads that a name stands for: that of one workload, or of an area. Empty for neither.
pub fn named(name: &str) -> Vec<&'static Workload> {
    let area = AREAS.iter().find(|area| area.name == name).map_or(&[][..], |area| area.workloads);
    area.iter().chain(find(name)).collect()
}
