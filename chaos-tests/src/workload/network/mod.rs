//! Links and networks that a program has made.

mod bridges;
mod elsewhere;
mod stacked;
mod wire;

use super::{Area, local};

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
    ],
};
