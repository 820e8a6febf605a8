//! Sockets of every family.

mod both_ways;
mod corked;
mod datagrams;
mod errors;
mod netlink;
mod peeking;
mod plain;
mod queues;
mod senders;
mod sniffers;
mod tcp;
mod tcp_kinds;
mod tcp_peer;
mod tcp_signed;
mod tcp_states;
mod udp;
mod unix;
mod unix_kinds;
mod urgent;

use super::{Area, local, with_peer};

pub(super) const AREA: Area = Area {
    name: "sockets",
    workloads: &[
        local("unix", "unix sockets of each type with data and descriptors in flight", unix::run),
        local(
            "unix-credentials",
            "messages with the credentials of their sender",
            unix_kinds::credentials,
        ),
        local("unix-peer", "whom a socket shows as its peer", unix_kinds::peer),
        local("unix-backlog", "clients that wait for a unix listener", unix_kinds::backlog),
        local("unix-renamed", "a listener whose node was renamed", unix_kinds::renamed),
        local("unix-unlinked", "a receiver whose node is gone", unix_kinds::unlinked),
        local("unix-names", "abstract names, chosen and given by the kernel", unix_kinds::names),
        local("unix-pidfd", "pidfds in flight", unix_kinds::pidfd),
        local(
            "unix-nested",
            "a socket in its own queue, a queue within a queue",
            unix_kinds::nested,
        ),
        local("unix-pipe", "a pipe whose other end is in flight", unix_kinds::pipe),
        local("unix-blocked", "a sender that waits for its receiver", unix_kinds::blocked_sender),
        local("unix-senders", "one receiver of many senders with names", unix_kinds::senders),
        local("unix-dead-peer", "data of a peer that has gone", unix_kinds::dead_peer),
        local("unix-half", "a unix connection closed in one direction", unix_kinds::half),
        local("unix-packets", "packets over a connection by name", unix_kinds::packets),
        local("unix-last-packets", "packets before the end of a way", unix_kinds::last_packets),
        local("unix-offsets", "a file in flight that shares its offset", unix_kinds::offsets),
        local("unix-urgent", "an urgent byte that nobody has read", urgent::unix),
        local("unix-options", "options of unix sockets", unix_kinds::options),
        local("tcp", "connections inside with unread data, half-closed ones, a listener", tcp::run),
        local("backlog", "connections that wait to be accepted", tcp::backlog),
        local("backlog-many", "a hundred of them, with data", queues::many),
        local("backlog-closed", "clients that have gone before they are accepted", queues::closed),
        local("backlog-v6", "waiting connections of IPv6, and of both", queues::six),
        local("backlog-group", "waiting connections of listeners with one name", queues::group),
        local("tcp-one-way", "one way of a connection closed for ever", tcp_states::one_way),
        local("tcp-last-words", "a connection closed with data on its way", tcp_states::last_words),
        local("tcp-orphan", "a connection that nobody has and that sends", tcp_states::orphan),
        local("tcp-both-closed", "closed by both ends with data unread", tcp_states::both_closed),
        local("tcp-finished", "closed by both ends, and kept", tcp_states::finished),
        local("tcp-connecting", "a connection that takes long to be made", tcp_states::connecting),
        local("tcp-bound", "a socket that only has a name", tcp_states::bound),
        local("tcp-keepalive", "keepalive and its times", tcp_kinds::keepalive),
        local("peek-places", "places from which sockets look ahead", peeking::run),
        local("tcp-options", "options of a connection", tcp_kinds::options),
        local("tcp-options-v6", "options of IPv6", tcp_kinds::options6),
        local("tcp-signed", "segments signed with keys, and a listener for them", tcp_signed::run),
        local("tcp-congestion", "a chosen congestion control", tcp_kinds::congestion),
        local("tcp-buffers", "buffers of fixed sizes, full both ways", tcp_kinds::buffers),
        local("tcp-low-water", "readable from so many bytes on", tcp_kinds::low_water),
        local("tcp-timeout", "reads that end after a while", tcp_kinds::timeout),
        local("tcp-dual-stack", "a listener for IPv4 and IPv6", tcp_kinds::dual_stack),
        local("tcp-device", "sockets bound to a device", tcp_kinds::device),
        local("tcp-listener", "what a listener hands on", tcp_kinds::listener_options),
        local("tcp-deferred", "clients that count when they speak", tcp_kinds::deferred),
        local("tcp-group", "listeners with one name", tcp_kinds::group),
        local("tcp-many", "two hundred connections", tcp_kinds::many),
        local("tcp-multipath", "a listener for MPTCP", tcp_kinds::multipath),
        local("tcp-blocked", "a writer that waits for its reader", tcp_kinds::blocked_writer),
        local("socket-errors", "errors that wait until somebody asks", errors::run),
        local("udp", "datagrams inside, some unread", udp::run),
        local("udp-v6", "datagrams of IPv6", datagrams::six),
        local("udp-empty", "empty datagrams", datagrams::empty),
        local("udp-large", "datagrams of 60 KB", datagrams::large),
        local("udp-lite", "datagrams of UDP-Lite", datagrams::lite),
        local("udp-corked", "datagrams that are written in parts", corked::run),
        local("udp-device", "a receiver bound to a device", datagrams::device),
        local("udp-filter", "a socket filter", datagrams::filter),
        local("udp-strangers", "a connected socket hears nobody else", datagrams::strangers),
        local("udp-group", "receivers with one name", datagrams::group),
        local("udp-multicast", "a member of a multicast group", datagrams::multicast),
        local("udp-multicast-v6", "the same with IPv6", datagrams::multicast6),
        local("udp-options", "options of datagram sockets", datagrams::options),
        local("raw-echo", "a raw socket that pings, with a filter", datagrams::raw_echo),
        local("raw-echo-v6", "the same with IPv6", datagrams::raw_echo6),
        local("raw-protocol", "a protocol of its own over IP", datagrams::raw_protocol),
        local("frames", "a packet socket for one kind of frame", datagrams::frames),
        local("sniffer-v1", "a sniffer with a ring of frames", sniffers::first),
        local("sniffer-v2", "the same with the second version of it", sniffers::second),
        local("sniffer-blocks", "a sniffer with a ring of blocks, as tcpdump", sniffers::blocks),
        local("sniffer-group", "sniffers that share frames out among them", sniffers::fanout),
        local("ring-sender", "senders with a ring of frames", senders::alone),
        local("ring-both", "a socket with a ring for each way", senders::both_ways),
        local("netlink", "lists of links and addresses", netlink::lists),
        local("netlink-waiting", "an answer of the kernel that waits to be read", netlink::waiting),
        local("netlink-single", "answers about one thing", netlink::single),
        local("netlink-groups", "groups of netlink sockets", netlink::groups),
        local("netlink-generic", "questions to generic netlink", netlink::generic),
        local("socket-diagnosis", "the list of unix sockets", netlink::diagnosis),
        with_peer("tcp-peer", "streams, unread and unsent data with another host", tcp_peer::run),
        with_peer("tcp-parcels", "what was closed at once, to another host", tcp_peer::parcels),
        with_peer("udp-peer", "datagrams to another host and back", udp::with_peer),
    ],
};
