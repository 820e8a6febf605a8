//! Links and networks that a program has made.

mod bridges;
mod elsewhere;
mod sets;
mod stacked;
mod tables;
mod tunnels;
mod wire;

use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};

use super::mounts::table::is_machine_of_others;
use super::outcome::Failure;
use super::{Area, local};
use wire::Wire;

pub(super) const AREA: Area = Area {
    name: "network",
    workloads: &[
        local("pair", "a pair of links into a named network with a server", elsewhere::pair),
        local("named-network", "a named network that no process is in", elsewhere::empty),
        local("sockets-elsewhere", "sockets of all kinds in another network", elsewhere::sockets),
        local("network-settings", "routes, rules and settings there", elsewhere::settings),
        local("network-files", "a /sys of another network", elsewhere::files),
        local("bridge", "a bridge between two networks, with settings", bridges::run),
        local("stacked", "links that stand on other links", stacked::run),
        local("ip-sets", "sets of ipset with counters and times, and a rule", sets::run),
        local("tables", "tables of iptables, ip6tables and arptables with counters", tables::run),
        local("tunnel", "a tun link, whose packets a program answers", tunnels::tunnel),
        local("tap-filter", "a tap with a filter", tunnels::filter),
        local("taps", "taps with several queues, at rest, and without a program", tunnels::taps),
    ],
};

/// On a machine that others use a workload has a network and mounts of its own, which go with it.
fn stand_apart() -> Result<(), Failure> {
    if !is_machine_of_others()? {
        return Ok(());
    }
    unshare(CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWNS)?;
    let none = None::<&str>;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none)?;
    for (kind, place) in [("tmpfs", "/run"), ("sysfs", "/sys")] {
        mount(Some(kind), place, Some(kind), MsFlags::empty(), none)?;
    }
    Wire::open()?.up("lo")
}
