//! Socket options that are set again with one setsockopt(2) each.
//!
//! Only what differs from a fresh socket travels: most sockets have two or three such options.

use std::{io, os::fd::BorrowedFd};

use ckpt_format::files::SocketOption;

use crate::sys::socket;

/// One option: level, name, how many bytes, and what a fresh socket has in the first four bytes
/// (the others are zero).
struct Entry(i32, i32, usize, i32);

const SOL: i32 = libc::SOL_SOCKET;
const IP: i32 = libc::IPPROTO_IP;
const IP6: i32 = libc::IPPROTO_IPV6;
const TCP: i32 = libc::IPPROTO_TCP;
const TIMEVAL: usize = 16;

const SO_PASSPIDFD: i32 = 76;
const SO_BUF_LOCK: i32 = 72;
const IP_LOCAL_PORT_RANGE: i32 = 51;

/// A packet filter, whose value is its program.
const FILTER: (i32, i32) = (SOL, libc::SO_ATTACH_FILTER);

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
];

const INET: &[Entry] = &[
    Entry(SOL, libc::SO_REUSEPORT, 4, 0),
    Entry(SOL, libc::SO_DONTROUTE, 4, 0),
    Entry(IP, libc::IP_TOS, 4, 0),
    Entry(IP, libc::IP_TTL, 4, 64),
    Entry(IP, libc::IP_RECVERR, 4, 0),
    Entry(IP, libc::IP_PKTINFO, 4, 0),
    Entry(IP, libc::IP_TRANSPARENT, 4, 0),
    Entry(IP, libc::IP_MTU_DISCOVER, 4, 1),
];

/// Those that matter before there is a connection only.
const BEFORE_CONNECTION: &[Entry] = &[
    Entry(IP, libc::IP_FREEBIND, 4, 0),
    Entry(IP, libc::IP_BIND_ADDRESS_NO_PORT, 4, 0),
    Entry(IP, IP_LOCAL_PORT_RANGE, 4, 0),
    Entry(TCP, libc::TCP_SYNCNT, 4, 6),
    Entry(TCP, libc::TCP_DEFER_ACCEPT, 4, 0),
    Entry(TCP, libc::TCP_FASTOPEN, 4, 0),
];

const INET6: &[Entry] = &[
    Entry(IP6, libc::IPV6_V6ONLY, 4, 0),
    Entry(IP6, libc::IPV6_TCLASS, 4, 0),
    Entry(IP6, libc::IPV6_UNICAST_HOPS, 4, 64),
    Entry(IP6, libc::IPV6_RECVERR, 4, 0),
    Entry(IP6, libc::IPV6_RECVPKTINFO, 4, 0),
];

const STREAM: &[Entry] = &[
    Entry(TCP, libc::TCP_NODELAY, 4, 0),
    Entry(TCP, libc::TCP_CORK, 4, 0),
    Entry(TCP, libc::TCP_KEEPIDLE, 4, 7200),
    Entry(TCP, libc::TCP_KEEPINTVL, 4, 75),
    Entry(TCP, libc::TCP_KEEPCNT, 4, 9),
    Entry(TCP, libc::TCP_LINGER2, 4, 60),
    Entry(TCP, libc::TCP_USER_TIMEOUT, 4, 0),
    // The name of the congestion control, padded with zeros.
    Entry(TCP, libc::TCP_CONGESTION, 16, 0),
];

const DATAGRAM: &[Entry] = &[
    Entry(SOL, libc::SO_BROADCAST, 4, 0),
    Entry(SOL, libc::SO_NO_CHECK, 4, 0),
    Entry(SOL, libc::SO_RXQ_OVFL, 4, 0),
    Entry(IP, libc::IP_MULTICAST_TTL, 4, 1),
    Entry(IP, libc::IP_MULTICAST_LOOP, 4, 1),
    Entry(IP, libc::IP_RECVTOS, 4, 0),
    Entry(IP, libc::IP_RECVTTL, 4, 0),
];

const UNIX: &[Entry] = &[
    Entry(SOL, libc::SO_PASSCRED, 4, 0),
    Entry(SOL, libc::SO_PASSSEC, 4, 0),
    Entry(SOL, SO_PASSPIDFD, 4, 0),
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

/// Which options a socket has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Family {
    Tcp { v6: bool, connected: bool },
    Udp { v6: bool },
    Unix,
    Netlink,
}

impl Family {
    fn entries(self) -> impl Iterator<Item = &'static Entry> {
        let when = |condition: bool, entries: &'static [Entry]| {
            if condition { entries } else { &[] }
        };
        let (network, version, own, fresh): (&[Entry], &[Entry], &[Entry], &[Entry]) = match self {
            Self::Tcp { v6, connected } => {
                (INET, when(v6, INET6), STREAM, when(!connected, BEFORE_CONNECTION))
            }
            Self::Udp { v6 } => (INET, when(v6, INET6), DATAGRAM, &[]),
            Self::Unix => (&[], &[], UNIX, &[]),
            Self::Netlink => (&[], &[], NETLINK, &[]),
        };
        // IP_TOS also sets the priority, so the common ones come last.
        network.iter().chain(version).chain(own).chain(fresh).chain(COMMON)
    }
}

/// Reads the options that differ from those of a fresh socket, and the sizes of its buffers.
pub(super) fn capture(fd: BorrowedFd<'_>, family: Family) -> io::Result<Vec<SocketOption>> {
    let mut options = Vec::new();
    for &Entry(level, name, size, fresh) in family.entries() {
        let mut value = [0u8; TIMEVAL];
        let length = match socket::option(fd, level, name, &mut value[..size]) {
            Ok(length) => length,
            // Not every kernel and every socket has every option.
            Err(_) => continue,
        };
        let mut unset = [0u8; TIMEVAL];
        unset[..4].copy_from_slice(&fresh.to_ne_bytes());
        if value[..length] != unset[..length] {
            let value = value[..length].to_vec();
            options.push(SocketOption { level, name, value });
        }
    }
    let filter = socket::filter(fd)?;
    if !filter.is_empty() {
        let (level, name) = FILTER;
        options.push(SocketOption { level, name, value: filter });
    }
    for name in [libc::SO_SNDBUF, libc::SO_RCVBUF, SO_BUF_LOCK] {
        let mut value = [0u8; 4];
        socket::option(fd, SOL, name, &mut value)?;
        options.push(SocketOption { level: SOL, name, value: value.to_vec() });
    }
    Ok(options)
}

fn is_buffer(option: &SocketOption) -> bool {
    option.level == SOL && matches!(option.name, libc::SO_SNDBUF | libc::SO_RCVBUF | SO_BUF_LOCK)
}

/// Sets all options but the sizes of the buffers, before the socket is bound.
pub(super) fn rebuild(fd: BorrowedFd<'_>, options: &[SocketOption]) -> io::Result<()> {
    for option in options.iter().filter(|option| !is_buffer(option)) {
        if (option.level, option.name) == FILTER {
            socket::attach_filter(fd, &option.value)?;
            continue;
        }
        let result = socket::set_option(fd, option.level, option.name, &option.value);
        // A congestion control that this kernel does not have is no reason to stop: the
        // connection works with the kernel's own choice.
        if option.level != TCP || option.name != libc::TCP_CONGESTION {
            result?;
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

/// Sets the sizes of the buffers and whether the program has fixed them.
pub(super) fn rebuild_buffers(fd: BorrowedFd<'_>, options: &[SocketOption]) -> io::Result<()> {
    for option in options.iter().filter(|option| is_buffer(option)) {
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
