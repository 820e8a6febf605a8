//! Workloads that check themselves, and know nothing of how they are moved.
//!
//! Each is a small program that holds kernel objects of one kind, uses them all the time, and
//! compares what it finds with what it knows. It fails the moment something is lost, repeated,
//! changed, early or much too late. [`TABLE`] lists them; `selfcheck` runs them.

pub mod context;
pub mod outcome;
pub mod peer;
pub mod process;
pub mod stream;
pub mod supervisor;

mod devices;
mod epoll;
mod events;
mod family;
mod files;
mod identity;
mod maps;
mod memory;
mod mutexes;
mod pipes;
mod signals;
mod tcp;
mod tcp_peer;
mod terminals;
mod threads;
mod timers;
mod udp;
mod unix;
mod waits;

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

/// All workloads.
pub const TABLE: &[Workload] = &[
    local(
        "memory",
        "counters in memory against the same in files; pages written at random",
        memory::run,
    ),
    local("maps", "maps of files, shared with children, guarded, moved, discarded", maps::kinds),
    local("churn", "maps made, resized and removed all the time; deep stacks", maps::churn),
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
    local("signals", "handlers, masks, pending and queued signals, alternate stack", signals::run),
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
    local(
        "identity",
        "user, groups, capabilities, limits, umask, working directory, names",
        identity::run,
    ),
    local("family", "sessions, groups, orphans, children that come and go, a zombie", family::run),
    local("stopped", "a child stopped by a signal", family::stopped),
    local("files", "offsets, append, sharing after fork, deleted files, directories", files::run),
    local("pipes", "pipes and FIFOs with data in them", pipes::run),
    local("unix", "unix sockets of each type with data and descriptors in flight", unix::run),
    local("tcp", "connections inside with unread data, half-closed ones, a listener", tcp::run),
    local("backlog", "connections that wait to be accepted", tcp::backlog),
    local("udp", "datagrams inside, some unread", udp::run),
    local("epoll", "level, edge, one-shot and nested epoll", epoll::run),
    local("events", "eventfd, signalfd, timerfd with what they hold", events::run),
    local("terminals", "a pseudo terminal with a session at its other end", terminals::run),
    local("devices", "the character devices that everybody has", devices::run),
    with_peer("tcp-peer", "streams, unread and unsent data with another host", tcp_peer::run),
    with_peer("udp-peer", "datagrams to another host and back", udp::with_peer),
];

/// The workload of this name.
pub fn find(name: &str) -> Option<&'static Workload> {
    TABLE.iter().find(|workload| workload.name == name)
}
