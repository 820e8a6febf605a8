//! Sockets of every family.

mod tcp;
mod tcp_peer;
mod udp;
mod unix;

use super::{Area, local, with_peer};

pub(super) const AREA: Area = Area {
    name: "sockets",
    workloads: &[
        local("unix", "unix sockets of each type with data and descriptors in flight", unix::run),
        local("tcp", "connections inside with unread data, half-closed ones, a listener", tcp::run),
        local("backlog", "connections that wait to be accepted", tcp::backlog),
        local("udp", "datagrams inside, some unread", udp::run),
        with_peer("tcp-peer", "streams, unread and unsent data with another host", tcp_peer::run),
        with_peer("udp-peer", "datagrams to another host and back", udp::with_peer),
    ],
};
