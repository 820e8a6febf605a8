//! Socket options that are set again with one setsockopt(2) each.
//!
//! Only what differs from a fresh socket travels: most sockets have two or three such options.

use std::{io, os::fd::BorrowedFd};

use ckpt_format::files::SocketOption;

use crate::sys::socket;

/// One option: level, name, how many bytes, and what a fresh socket has in the first four bytes
/// (the others are zero, or all ones for -1).
struct Entry(i32, i32, usize, i32);

const SOL: i32 = libc::SOL_SOCKET;
const IP: i32 = libc::IPPROTO_IP;
const IP6: i32 = libc::IPPROTO_IPV6;
const TCP: i32 = libc::IPPROTO_TCP;
const TIMEVAL: usize = 16;
/// The longest of all, in bytes.
const LONGEST: usize = 40;

const SO_PASSPIDFD: i32 = 76;
const SO_PASSRIGHTS: i32 = 83;
const SO_BUF_LOCK: i32 = 72;
const SO_MAX_PACING_RATE: i32 = 47;
const SO_ZEROCOPY: i32 = 60;
const SO_TXTIME: i32 = 61;
const SO_TIMESTAMP_NEW: i32 = 63;
const SO_TIMESTAMPNS_NEW: i32 = 64;
const SO_RCVMARK: i32 = 75;
const SO_RCVPRIORITY: i32 = 82;
const SO_WIFI_STATUS: i32 = 41;
const SO_NOFCS: i32 = 43;
const SO_SELECT_ERR_QUEUE: i32 = 45;
const SO_PREFER_BUSY_POLL: i32 = 69;
const IP_CHECKSUM: i32 = 23;
const IP_RECVFRAGSIZE: i32 = 25;
const IP_RECVERR_RFC4884: i32 = 26;
const IPV6_RECVERR_RFC4884: i32 = 31;
const IPV6_AUTOFLOWLABEL: i32 = 70;
const IP_MULTICAST_ALL: i32 = 49;
const IP_UNICAST_IF: i32 = 50;
const IP_LOCAL_PORT_RANGE: i32 = 51;
const IPV6_CHECKSUM: i32 = 7;
const IPV6_MULTICAST_ALL: i32 = 29;
const IPV6_HDRINCL: i32 = 36;
const IPV6_UNICAST_IF: i32 = 76;
const IPV6_RECVFRAGSIZE: i32 = 77;
const TCP_NOTSENT_LOWAT: i32 = 25;
const TCP_FASTOPEN_NO_COOKIE: i32 = 34;
const TCP_INQ: i32 = 36;
const TCP_TX_DELAY: i32 = 37;
const TCP_RTO_MAX_MS: i32 = 44;
const UDP_ENCAP: i32 = 100;
const UDP_NO_CHECK6_TX: i32 = 101;
const UDP_NO_CHECK6_RX: i32 = 102;
const SOL_UDPLITE: i32 = 136;
const UDPLITE_SEND_CSCOV: i32 = 10;
const UDPLITE_RECV_CSCOV: i32 = 11;
const SOL_RAW: i32 = 255;
const ICMP_FILTER: i32 = 1;
const ICMPV6_FILTER: i32 = 1;
const PACKET_TX_HAS_OFF: i32 = 19;
const PACKET_IGNORE_OUTGOING: i32 = 23;

/// A packet filter, whose value is its program.
pub(super) const FILTER: (i32, i32) = (SOL, libc::SO_ATTACH_FILTER);

/// The sizes of the buffers, and whether the program has fixed them.
pub(super) const BUFFERS: [i32; 3] = [libc::SO_SNDBUF, libc::SO_RCVBUF, SO_BUF_LOCK];

/// With this a connection has a label of its own in each packet.
pub(super) const FLOW_LABELS: (i32, i32) = (IP6, libc::IPV6_FLOWINFO_SEND);

const COMMON: &[Entry] = &[
    Entry(SOL, libc::SO_REUSEADDR, 4, 0),
    Entry(SOL, libc::SO_KEEPALIVE, 4, 0),
    Entry(SOL, libc::SO_PRIORITY, 4, 0),
    Entry(SOL, libc::SO_LINGER, 8, 0),
    Entry(SOL, libc::SO_OOBINLINE, 4, 0),
    Entry(SOL, libc::SO_RCVLOWAT, 4, 1),
    Entry(SOL, libc::SO_RCVTIMEO, TIMEVAL, 0),
    Entry(SOL, libc::SO_SNDTIMEO, TIMEVAL, 0),
    Entry(SOL, libc::SO_MARK, 4, 0),
    Entry(SOL, libc::SO_TIMESTAMP, 4, 0),
    Entry(SOL, libc::SO_TIMESTAMPNS, 4, 0),
    Entry(SOL, SO_TIMESTAMP_NEW, 4, 0),
    Entry(SOL, SO_TIMESTAMPNS_NEW, 4, 0),
    Entry(SOL, libc::SO_TIMESTAMPING, 8, 0),
    Entry(SOL, libc::SO_LOCK_FILTER, 4, 0),
    Entry(SOL, libc::SO_PEEK_OFF, 4, -1),
    Entry(SOL, libc::SO_BROADCAST, 4, 0),
    Entry(SOL, libc::SO_NO_CHECK, 4, 0),
    Entry(SOL, SO_WIFI_STATUS, 4, 0),
    Entry(SOL, SO_NOFCS, 4, 0),
    Entry(SOL, SO_SELECT_ERR_QUEUE, 4, 0),
];

const INET: &[Entry] = &[
    Entry(SOL, libc::SO_REUSEPORT, 4, 0),
    Entry(SOL, libc::SO_DONTROUTE, 4, 0),
    // The name of a device, empty without one.
    Entry(SOL, libc::SO_BINDTODEVICE, 16, 0),
    Entry(SOL, libc::SO_BUSY_POLL, 4, 0),
    Entry(SOL, SO_PREFER_BUSY_POLL, 4, 0),
    Entry(SOL, SO_MAX_PACING_RATE, 8, -1),
    Entry(SOL, SO_ZEROCOPY, 4, 0),
    Entry(SOL, SO_TXTIME, 8, 0),
    Entry(SOL, SO_RCVMARK, 4, 0),
    Entry(SOL, SO_RCVPRIORITY, 4, 0),
    Entry(IP, libc::IP_OPTIONS, 40, 0),
    Entry(IP, libc::IP_RECVOPTS, 4, 0),
    Entry(IP, libc::IP_RETOPTS, 4, 0),
    Entry(IP, libc::IP_RECVTOS, 4, 0),
    Entry(IP, libc::IP_RECVTTL, 4, 0),
    Entry(IP, libc::IP_RECVORIGDSTADDR, 4, 0),
    Entry(IP, libc::IP_MINTTL, 4, 0),
    Entry(IP, IP_RECVFRAGSIZE, 4, 0),
    Entry(IP, IP_UNICAST_IF, 4, 0),
    Entry(IP, libc::IP_TOS, 4, 0),
    Entry(IP, libc::IP_TTL, 4, 64),
    Entry(IP, libc::IP_RECVERR, 4, 0),
    Entry(IP, libc::IP_PKTINFO, 4, 0),
    Entry(IP, libc::IP_TRANSPARENT, 4, 0),
    Entry(IP, libc::IP_MTU_DISCOVER, 4, 1),
    Entry(IP, libc::IP_FREEBIND, 4, 0),
    Entry(IP, libc::IP_BIND_ADDRESS_NO_PORT, 4, 0),
    Entry(IP, IP_LOCAL_PORT_RANGE, 4, 0),
    Entry(IP, IP_RECVERR_RFC4884, 4, 0),
];

/// Those that matter before there is a connection only.
const BEFORE_CONNECTION: &[Entry] = &[
    Entry(TCP, libc::TCP_DEFER_ACCEPT, 4, 0),
    Entry(TCP, libc::TCP_FASTOPEN, 4, 0),
    Entry(TCP, libc::TCP_FASTOPEN_CONNECT, 4, 0),
    Entry(TCP, TCP_FASTOPEN_NO_COOKIE, 4, 0),
];

/// Those that a connection has values of its own for.
const NEVER_CONNECTED: &[Entry] = &[
    Entry(TCP, libc::TCP_WINDOW_CLAMP, 4, 0),
    Entry(TCP, libc::TCP_MAXSEG, 4, 536),
    Entry(TCP, libc::TCP_SAVE_SYN, 4, 0),
];

const INET6: &[Entry] = &[
    Entry(IP6, libc::IPV6_V6ONLY, 4, 0),
    Entry(IP6, libc::IPV6_TCLASS, 4, 0),
    Entry(IP6, libc::IPV6_UNICAST_HOPS, 4, 64),
    Entry(IP6, libc::IPV6_RECVERR, 4, 0),
    Entry(IP6, libc::IPV6_RECVPKTINFO, 4, 0),
    Entry(IP6, libc::IPV6_MTU_DISCOVER, 4, 1),
    Entry(IP6, libc::IPV6_FLOWINFO_SEND, 4, 0),
    Entry(IP6, libc::IPV6_FLOWINFO, 4, 0),
    Entry(IP6, libc::IPV6_RECVHOPLIMIT, 4, 0),
    Entry(IP6, libc::IPV6_RECVHOPOPTS, 4, 0),
    Entry(IP6, libc::IPV6_RECVRTHDR, 4, 0),
    Entry(IP6, libc::IPV6_RECVDSTOPTS, 4, 0),
    Entry(IP6, libc::IPV6_RECVPATHMTU, 4, 0),
    Entry(IP6, libc::IPV6_DONTFRAG, 4, 0),
    Entry(IP6, libc::IPV6_RECVTCLASS, 4, 0),
    Entry(IP6, libc::IPV6_ADDR_PREFERENCES, 4, 0x500),
    Entry(IP6, libc::IPV6_MINHOPCOUNT, 4, 0),
    Entry(IP6, libc::IPV6_RECVORIGDSTADDR, 4, 0),
    Entry(IP6, libc::IPV6_TRANSPARENT, 4, 0),
    Entry(IP6, IPV6_UNICAST_IF, 4, 0),
    Entry(IP6, IPV6_RECVFRAGSIZE, 4, 0),
    Entry(IP6, libc::IPV6_FREEBIND, 4, 0),
    Entry(IP6, IPV6_RECVERR_RFC4884, 4, 0),
    Entry(IP6, IPV6_AUTOFLOWLABEL, 4, 1),
];

const INET6_DATAGRAM: &[Entry] = &[
    Entry(IP6, libc::IPV6_MULTICAST_IF, 4, 0),
    Entry(IP6, libc::IPV6_MULTICAST_HOPS, 4, 1),
    Entry(IP6, libc::IPV6_MULTICAST_LOOP, 4, 1),
    Entry(IP6, IPV6_MULTICAST_ALL, 4, 1),
];

const STREAM: &[Entry] = &[
    Entry(TCP, libc::TCP_NODELAY, 4, 0),
    Entry(TCP, libc::TCP_CORK, 4, 0),
    Entry(TCP, libc::TCP_KEEPIDLE, 4, 7200),
    Entry(TCP, libc::TCP_KEEPINTVL, 4, 75),
    Entry(TCP, libc::TCP_KEEPCNT, 4, 9),
    Entry(TCP, libc::TCP_LINGER2, 4, 60),
    Entry(TCP, libc::TCP_USER_TIMEOUT, 4, 0),
    Entry(TCP, libc::TCP_SYNCNT, 4, 6),
    Entry(TCP, libc::TCP_THIN_LINEAR_TIMEOUTS, 4, 0),
    Entry(TCP, TCP_NOTSENT_LOWAT, 4, 0),
    Entry(TCP, TCP_INQ, 4, 0),
    Entry(TCP, TCP_TX_DELAY, 4, 0),
    Entry(TCP, TCP_RTO_MAX_MS, 4, 120_000),
    // The name of the congestion control, padded with zeros.
    Entry(TCP, libc::TCP_CONGESTION, 16, 0),
];

const DATAGRAM: &[Entry] = &[
    Entry(SOL, libc::SO_RXQ_OVFL, 4, 0),
    Entry(IP, IP_CHECKSUM, 4, 0),
    Entry(IP, libc::IP_MULTICAST_TTL, 4, 1),
    Entry(IP, libc::IP_MULTICAST_LOOP, 4, 1),
    Entry(IP, IP_MULTICAST_ALL, 4, 1),
    // An address; a device that was chosen by its number is not told.
    Entry(IP, libc::IP_MULTICAST_IF, 4, 0),
];

const UDP: &[Entry] = &[
    Entry(libc::SOL_UDP, libc::UDP_CORK, 4, 0),
    Entry(libc::SOL_UDP, UDP_ENCAP, 4, 0),
    Entry(libc::SOL_UDP, UDP_NO_CHECK6_TX, 4, 0),
    Entry(libc::SOL_UDP, UDP_NO_CHECK6_RX, 4, 0),
    Entry(libc::SOL_UDP, libc::UDP_SEGMENT, 4, 0),
    Entry(libc::SOL_UDP, libc::UDP_GRO, 4, 0),
];

const UDP_LITE: &[Entry] = &[
    Entry(libc::SOL_UDP, libc::UDP_CORK, 4, 0),
    Entry(SOL_UDPLITE, UDPLITE_SEND_CSCOV, 4, 0),
    Entry(SOL_UDPLITE, UDPLITE_RECV_CSCOV, 4, 0),
];

const RAW: &[Entry] = &[
    Entry(IP, libc::IP_HDRINCL, 4, 0),
    Entry(IP, libc::IP_NODEFRAG, 4, 0),
    Entry(SOL_RAW, ICMP_FILTER, 4, 0),
];

const RAW6: &[Entry] = &[
    Entry(libc::SOL_ICMPV6, ICMPV6_FILTER, 32, 0),
    Entry(IP6, IPV6_HDRINCL, 4, 0),
    Entry(SOL_RAW, IPV6_CHECKSUM, 4, -1),
];

const PACKET: &[Entry] = &[
    Entry(libc::SOL_PACKET, libc::PACKET_VERSION, 4, 0),
    Entry(libc::SOL_PACKET, libc::PACKET_RESERVE, 4, 0),
    Entry(libc::SOL_PACKET, libc::PACKET_AUXDATA, 4, 0),
    Entry(libc::SOL_PACKET, libc::PACKET_ORIGDEV, 4, 0),
    Entry(libc::SOL_PACKET, libc::PACKET_LOSS, 4, 0),
    Entry(libc::SOL_PACKET, PACKET_TX_HAS_OFF, 4, 0),
    Entry(libc::SOL_PACKET, libc::PACKET_VNET_HDR, 4, 0),
    Entry(libc::SOL_PACKET, libc::PACKET_TIMESTAMP, 4, 0),
    Entry(libc::SOL_PACKET, libc::PACKET_QDISC_BYPASS, 4, 0),
    Entry(libc::SOL_PACKET, PACKET_IGNORE_OUTGOING, 4, 0),
    Entry(SOL, libc::SO_RXQ_OVFL, 4, 0),
];

const UNIX: &[Entry] = &[
    Entry(SOL, libc::SO_PASSCRED, 4, 0),
    Entry(SOL, libc::SO_PASSSEC, 4, 0),
    Entry(SOL, SO_PASSPIDFD, 4, 0),
    Entry(SOL, SO_PASSRIGHTS, 4, 1),
];

const NETLINK: &[Entry] = &[
    Entry(SOL, libc::SO_PASSCRED, 4, 0),
    Entry(libc::SOL_NETLINK, libc::NETLINK_PKTINFO, 4, 0),
    Entry(libc::SOL_NETLINK, libc::NETLINK_BROADCAST_ERROR, 4, 0),
    Entry(libc::SOL_NETLINK, libc::NETLINK_NO_ENOBUFS, 4, 0),
    Entry(libc::SOL_NETLINK, libc::NETLINK_LISTEN_ALL_NSID, 4, 0),
    Entry(libc::SOL_NETLINK, libc::NETLINK_CAP_ACK, 4, 0),
    Entry(libc::SOL_NETLINK, libc::NETLINK_EXT_ACK, 4, 0),
    Entry(libc::SOL_NETLINK, libc::NETLINK_GET_STRICT_CHK, 4, 0),
];

/// How far a TCP socket has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stage {
    Fresh,
    Connecting,
    Connected,
}

/// Which options a socket has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Family {
    Tcp {
        v6: bool,
        stage: Stage,
    },
    /// UDP and its like, and raw sockets.
    Datagram {
        v6: bool,
        protocol: i32,
        raw: bool,
    },
    Unix,
    Netlink,
    Packet,
}

impl Family {
    fn entries(self) -> impl Iterator<Item = &'static Entry> {
        let when = |condition: bool, entries: &'static [Entry]| {
            if condition { entries } else { &[] }
        };
        let lists: [&[Entry]; 5] = match self {
            Self::Tcp { v6, stage } => {
                let before = when(stage != Stage::Connected, BEFORE_CONNECTION);
                let never = when(stage == Stage::Fresh, NEVER_CONNECTED);
                [INET, when(v6, INET6), STREAM, before, never]
            }
            Self::Datagram { v6, protocol, raw } => {
                let own = match (protocol, raw) {
                    (libc::IPPROTO_UDP, false) => UDP,
                    (libc::IPPROTO_UDPLITE, false) => UDP_LITE,
                    // The kernel computes this checksum itself, and lets nobody change that.
                    (libc::IPPROTO_ICMPV6, true) => &RAW6[..2],
                    (_, true) if v6 => RAW6,
                    (_, true) => RAW,
                    _ => &[],
                };
                [INET, when(v6, INET6), DATAGRAM, when(v6, INET6_DATAGRAM), own]
            }
            Self::Unix => [UNIX, &[], &[], &[], &[]],
            Self::Netlink => [NETLINK, &[], &[], &[], &[]],
            Self::Packet => [PACKET, &[], &[], &[], &[]],
        };
        // IP_TOS also sets the priority, so the common ones come last.
        lists.into_iter().flatten().chain(COMMON)
    }

    /// The level, the name and the size of each.
    pub(super) fn names(self) -> impl Iterator<Item = (i32, i32, usize)> {
        self.entries().map(|&Entry(level, name, size, _)| (level, name, size))
    }
}

/// Reads the options that differ from those of a fresh socket, and the sizes of its buffers.
pub(super) fn capture(fd: BorrowedFd<'_>, family: Family) -> io::Result<Vec<SocketOption>> {
    capture_like(fd, family, &[], |_, _| false)
}

/// Like [`capture`] for a socket that has some options, those that `is_known` names, as another one
/// whose options are `known`. The sizes of the buffers are its own.
pub(super) fn capture_like(
    fd: BorrowedFd<'_>,
    family: Family,
    known: &[SocketOption],
    is_known: impl Fn(i32, i32) -> bool,
) -> io::Result<Vec<SocketOption>> {
    let like = |level, name| known.iter().find(|it| (it.level, it.name) == (level, name)).cloned();
    let mut options = Vec::new();
    for entry in family.entries() {
        options.extend(match is_known(entry.0, entry.1) {
            true => like(entry.0, entry.1),
            false => ask(fd, entry),
        });
    }
    if is_known(FILTER.0, FILTER.1) {
        options.extend(like(FILTER.0, FILTER.1));
    } else {
        let filter = socket::filter(fd)?;
        if !filter.is_empty() {
            options.push(SocketOption { level: FILTER.0, name: FILTER.1, value: filter });
        }
    }
    for name in BUFFERS {
        let mut value = [0u8; 4];
        socket::option(fd, SOL, name, &mut value)?;
        options.push(SocketOption { level: SOL, name, value: value.to_vec() });
    }
    Ok(options)
}

/// Options as [`capture`] gives them, of a socket with other buffers.
pub(super) fn with_buffers(options: &[SocketOption], buffers: [u32; 3]) -> Vec<SocketOption> {
    let mut all: Vec<_> = options.iter().filter(|option| !is_buffer(option)).cloned().collect();
    all.extend(BUFFERS.into_iter().zip(buffers).map(|(name, value)| SocketOption {
        level: SOL,
        name,
        value: value.to_ne_bytes().to_vec(),
    }));
    all
}

/// An option, if it differs from that of a fresh socket.
fn ask(fd: BorrowedFd<'_>, &Entry(level, name, size, fresh): &Entry) -> Option<SocketOption> {
    let mut value = [0u8; LONGEST];
    // Not every kernel and every socket has every option.
    let length = socket::option(fd, level, name, &mut value[..size]).ok()?.min(size);
    let mut unset = [if fresh == -1 { 0xff } else { 0 }; LONGEST];
    unset[..4].copy_from_slice(&fresh.to_ne_bytes());
    let value = value[..length].to_vec();
    (value != unset[..length]).then_some(SocketOption { level, name, value })
}

fn is_buffer(option: &SocketOption) -> bool {
    option.level == SOL && BUFFERS.contains(&option.name)
}

/// What is set when a socket has its connection: a number of the next message can be asked for
/// only then; a filter that is locked takes no other; and a place in the queue means something
/// when that is filled.
fn is_late(option: &SocketOption) -> bool {
    let late = [libc::SO_TIMESTAMPING, libc::SO_LOCK_FILTER, libc::SO_PEEK_OFF];
    is_buffer(option) || (option.level == SOL && late.contains(&option.name))
}

/// Sets all options but the sizes of the buffers and a few more, before the socket is bound.
pub(super) fn rebuild<'a>(
    fd: BorrowedFd<'_>,
    options: impl IntoIterator<Item = &'a SocketOption>,
) -> io::Result<()> {
    for option in options.into_iter().filter(|option| !is_late(option)) {
        if (option.level, option.name) == FILTER {
            socket::attach_filter(fd, &option.value)?;
            continue;
        }
        let result = socket::set_option(fd, option.level, option.name, &option.value);
        // A congestion control that this kernel does not have is no reason to stop: the
        // connection works with the kernel's own choice.
        let is_choice = (option.level, option.name) == (TCP, libc::TCP_CONGESTION);
        // Nor is what cannot be set and is so already, by a setting of the network.
        if result.is_err() && !is_choice && !has(fd, option) {
            result?;
        }
    }
    Ok(())
}

/// Whether an option has this value.
fn has(fd: BorrowedFd<'_>, option: &SocketOption) -> bool {
    let mut now = vec![0; option.value.len()];
    let length = socket::option(fd, option.level, option.name, &mut now);
    length.is_ok_and(|length| now[..length.min(now.len())] == option.value)
}

/// Like [`rebuild`] and [`rebuild_buffers`] for a socket that shows options of another one behind
/// it, and does not let all of them be set.
pub(super) fn rebuild_own(fd: BorrowedFd<'_>, options: &[SocketOption]) -> io::Result<()> {
    for option in options.chunks(1) {
        match rebuild(fd, option).and_then(|()| rebuild_buffers(fd, option)) {
            Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => {}
            other => other?,
        }
    }
    Ok(())
}

/// Makes room for this much data while the queues are refilled.
pub(super) fn make_room(fd: BorrowedFd<'_>, send: usize, receive: usize) -> io::Result<()> {
    // The kernel counts the memory, which is more than the bytes in it. Two pages for each
    // piece that was a page at least, and never less than a fresh socket has.
    let room = |bytes: usize| i32::try_from(bytes * 3 + (256 << 10)).unwrap_or(i32::MAX / 2);
    if send > 0 {
        socket::set_option(fd, SOL, libc::SO_SNDBUFFORCE, &room(send).to_ne_bytes())?;
    }
    if receive > 0 {
        socket::set_option(fd, SOL, libc::SO_RCVBUFFORCE, &room(receive).to_ne_bytes())?;
    }
    Ok(())
}

/// Sets the sizes of the buffers and whether the program has fixed them, and what else comes
/// late.
pub(super) fn rebuild_buffers(fd: BorrowedFd<'_>, options: &[SocketOption]) -> io::Result<()> {
    for option in options.iter().filter(|option| is_late(option)) {
        if !is_buffer(option) {
            socket::set_option(fd, option.level, option.name, &option.value)?;
            continue;
        }
        let value = integer(option).ok_or(io::ErrorKind::InvalidData)?;
        let (name, value) = match option.name {
            // The kernel doubles what it is told and tells the double.
            libc::SO_SNDBUF => (libc::SO_SNDBUFFORCE, value / 2),
            libc::SO_RCVBUF => (libc::SO_RCVBUFFORCE, value / 2),
            other => (other, value),
        };
        socket::set_option(fd, SOL, name, &value.to_ne_bytes())?;
    }
    Ok(())
}

fn integer(option: &SocketOption) -> Option<i32> {
    Some(i32::from_ne_bytes(option.value.get(..4)?.try_into().ok()?))
}

/// One integer option of a socket.
pub(super) fn number(fd: BorrowedFd<'_>, level: i32, name: i32) -> io::Result<i32> {
    let mut value = [0u8; 4];
    socket::option(fd, level, name, &mut value)?;
    Ok(i32::from_ne_bytes(value))
}

/// Sets one integer option.
pub(super) fn set(fd: BorrowedFd<'_>, level: i32, name: i32, value: i32) -> io::Result<()> {
    socket::set_option(fd, level, name, &value.to_ne_bytes())
}
