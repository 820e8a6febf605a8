//! Which options of a TCP socket show in what the kernel keeps about it.
//!
//! Found out on the running kernel: each option of a socket of ours is set to several values. An
//! option counts as seen if every value that the socket answers with is kept in other bytes than the
//! one before. Whatever is not seen is asked, of every socket.

use std::{
    collections::HashSet,
    io,
    net::{Ipv4Addr, Ipv6Addr, SocketAddr},
    ops::RangeInclusive,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
};

use ckpt_format::files::{TcpClosing, TcpConnection};
use nix::fcntl::{FcntlArg, FdFlag, fcntl};

use super::{
    super::{
        address,
        options::{self, FILTER, Family, Stage},
    },
    Info, TCP,
    capture::connection,
    look::{Look, Opened, Sight},
    rebuild,
    record::Record,
    told::Reference,
};
use crate::{
    container::host_clocks,
    sys::{
        descriptor::{self, Change, Query, Status},
        socket,
    },
};

/// Level and name of options.
pub(super) type Names = HashSet<(i32, i32)>;

/// What the kernel makes a switch of its own for, which nobody puts back. It is left alone, and
/// believed to be in the member of this name.
const FOR_EVER: [((i32, i32), &str); 3] = [
    ((libc::IPPROTO_IP, libc::IP_MINTTL), "min_ttl"),
    ((libc::IPPROTO_IPV6, libc::IPV6_MINHOPCOUNT), "min_hopcount"),
    ((TCP, TCP_TX_DELAY), "tcp_tx_delay"),
];
const TCP_TX_DELAY: i32 = 37;

/// The options that are seen.
pub(super) fn seen(look: &Look, v6: bool) -> io::Result<Names> {
    let mut seen = Names::new();
    for (level, name, size) in (Family::Tcp { v6, stage: Stage::Connected }).names() {
        let for_ever = FOR_EVER.iter().find(|it| it.0 == (level, name));
        let is_seen = match for_ever {
            Some((_, member)) => look.has(member),
            None => is_seen(look, v6, (level, name), size)?,
        };
        if is_seen {
            seen.insert((level, name));
        }
    }
    if is_filter_seen(look, v6)? {
        seen.insert(FILTER);
    }
    Ok(seen)
}

fn is_seen(look: &Look, v6: bool, (level, name): (i32, i32), size: usize) -> io::Result<bool> {
    let socket = fresh(v6)?;
    let fd = socket.as_fd();
    let answer = || {
        let mut value = vec![0; size];
        let length = socket::option(fd, level, name, &mut value).ok()?;
        value.truncate(length);
        Some(value)
    };
    let Some(mut before) = answer() else { return Ok(true) };
    // What can be set to nothing, not even to what it is, has no other value on any socket.
    let mut fixed = is_refused(socket::set_option(fd, level, name, &before));
    let mut bytes = kept(look, fd)?;
    let mut changed = false;
    for value in values(level, name, size) {
        // Not everything is a value of every option.
        let set = socket::set_option(fd, level, name, &value);
        if set.is_err() {
            fixed &= is_refused(set);
            continue;
        }
        fixed = false;
        let Some(after) = answer().filter(|after| *after != before) else { continue };
        let now = kept(look, fd)?;
        if now == bytes {
            return Ok(false);
        }
        (before, bytes, changed) = (after, now, true);
    }
    Ok(changed || fixed)
}

fn is_refused(set: io::Result<()>) -> bool {
    let refused = [Some(libc::EINVAL), Some(libc::ENOPROTOOPT)];
    set.is_err_and(|error| refused.contains(&error.raw_os_error()))
}

fn is_filter_seen(look: &Look, v6: bool) -> io::Result<bool> {
    /// A program that takes everything.
    const TAKE_ALL: [u8; 8] = [6, 0, 0, 0, 0xff, 0xff, 0, 0];
    let socket = fresh(v6)?;
    let before = kept(look, socket.as_fd())?;
    socket::attach_filter(socket.as_fd(), &TAKE_ALL)?;
    Ok(kept(look, socket.as_fd())? != before)
}

fn fresh(v6: bool) -> io::Result<OwnedFd> {
    let domain = if v6 { libc::AF_INET6 } else { libc::AF_INET };
    socket::socket(domain, libc::SOCK_STREAM, libc::IPPROTO_TCP)
}

/// What is kept about a socket of ours.
fn kept(look: &Look, fd: BorrowedFd<'_>) -> io::Result<Vec<u8>> {
    Ok(sight(look, fd)?.options)
}

fn sight(look: &Look, fd: BorrowedFd<'_>) -> io::Result<Sight> {
    opened(look, fd)?.socket.ok_or_else(|| io::ErrorKind::NotFound.into())
}

/// What is seen of a descriptor of ours.
fn opened(look: &Look, fd: BorrowedFd<'_>) -> io::Result<Opened> {
    let inode = descriptor::status(fd)?.inode;
    let own = i32::try_from(std::process::id()).map_err(io::Error::other)?;
    let is = |it: &Opened| it.fd == fd.as_raw_fd() && it.inode == inode;
    look.at(own)?.into_iter().find(is).ok_or_else(|| io::ErrorKind::NotFound.into())
}

/// Whether it is seen what execve(2) closes, and which flags a file has.
pub(super) fn are_descriptors_seen(look: &Look) -> io::Result<bool> {
    let (socket, other) = (fresh(false)?, fresh(false)?);
    let told = |socket: &OwnedFd| {
        let told = opened(look, socket.as_fd())?;
        let flags = descriptor::query(socket.as_fd(), Query::GetFlags)?;
        Ok::<_, io::Error>((told.closes, told.flags == flags))
    };
    let before = (told(&socket)?, told(&other)?);
    // A child of ours that inherits it closes it when it ends.
    fcntl(&socket, FcntlArg::F_SETFD(FdFlag::empty()))?;
    descriptor::change(socket.as_fd(), Change::SetFlags, libc::O_NONBLOCK)?;
    Ok(before == ((true, true), (true, true))
        && (told(&socket)?, told(&other)?) == ((false, true), (true, true)))
}

/// Whether it is seen that nobody gets the signals of a file.
pub(super) fn are_owners_seen(look: &Look) -> io::Result<bool> {
    let (signalled, owned) = (fresh(false)?, fresh(false)?);
    let owner = |socket: &OwnedFd| Ok::<_, io::Error>(opened(look, socket.as_fd())?.owner);
    let before = (owner(&signalled)?, owner(&owned)?);
    descriptor::change(signalled.as_fd(), Change::SetSignal, libc::SIGUSR1)?;
    descriptor::change(owned.as_fd(), Change::SetOwner, std::process::id().cast_signed())?;
    Ok(before == (0, 0) && owner(&signalled)? != 0 && owner(&owned)? != 0)
}

/// The status of a socket.
pub(super) fn status() -> io::Result<Status> {
    descriptor::status(fresh(false)?.as_fd())
}

/// Whether the records of connections are what these answer: compared on two of our own that differ
/// in everything, and two that have something in their queues. They are made in repair mode, so that
/// nothing is sent.
pub(super) fn records(look: &Look, v6: bool) -> io::Result<bool> {
    let first = Sample::new(look, v6, 1, b"", b"")?;
    let second = Sample::new(look, v6, 2, b"", b"")?;
    let with_queue = [(&b"unread"[..], &b""[..]), (b"", b"not acknowledged")];
    for (number, (unread, unacknowledged)) in (3..).zip(with_queue) {
        if Sample::new(look, v6, number, unread, unacknowledged)?.record.is_complete() {
            return Ok(false);
        }
    }
    let reference = Reference {
        record: first.record.clone(),
        timestamp: first.asked.timestamp,
        stopped_us: *second.made_us.end(),
    };
    Ok(first.is_told(&reference) && second.is_told(&reference) && first.differs(&second))
}

/// What the clock shows that the kernel notes with each packet of a connection.
fn now_us() -> io::Result<i64> {
    Ok(host_clocks()?.monotonic_ns / 1000)
}

/// A connection of ours, which has never sent anything.
struct Sample {
    /// From the last moment at which there was no connection yet, to the first at which it was there:
    /// nothing has come or gone since.
    made_us: RangeInclusive<i64>,
    asked: TcpConnection,
    record: Record,
    /// Its address, its `SO_REUSEADDR`, and the sizes of its buffers.
    local: SocketAddr,
    reuse: i32,
    buffers: [u32; 3],
}

impl Sample {
    fn new(
        look: &Look,
        v6: bool,
        number: u8,
        unread: &[u8],
        unacknowledged: &[u8],
    ) -> io::Result<Self> {
        let loopback = if v6 { Ipv6Addr::LOCALHOST.into() } else { Ipv4Addr::LOCALHOST.into() };
        let end = |port: u16| SocketAddr::new(loopback, port + u16::from(number));
        let own = u32::from(number) << 24;
        let wanted = TcpConnection {
            remote: end(9),
            closing: TcpClosing::Open,
            quiet: false,
            unread: unread.to_vec(),
            receive_sequence: own | 0x11_2233,
            unsent: 0,
            unacknowledged: unacknowledged.to_vec(),
            send_sequence: own | 0x44_5566,
            segment_size: 1000 + u32::from(number),
            window_scale: (number != 1).then_some((number, number + 4)),
            selective_acknowledgement: number != 1,
            timestamp: Some(own),
            window: [own | 0x11_2200, 5000, 7000, 9000 - u32::from(number), own | 0x11_2230],
        };
        let socket = fresh(v6)?;
        let fd = socket.as_fd();
        let before_us = now_us()?;
        rebuild::repair(fd, &end(60_000), &wanted)?;
        let made_us = before_us..=now_us()?;
        for name in [libc::SO_SNDBUFFORCE, libc::SO_RCVBUFFORCE].iter().take(usize::from(number)) {
            options::set(fd, libc::SOL_SOCKET, *name, 100_000 + i32::from(number))?;
        }
        let number = |name| options::number(fd, libc::SOL_SOCKET, name);
        let mut buffers = [0; 3];
        for (size, name) in buffers.iter_mut().zip(options::BUFFERS) {
            *size = number(name)?.cast_unsigned();
        }
        let local = address::local(fd)?.ok_or(io::ErrorKind::NotConnected)?;
        let remote = address::remote(fd)?.ok_or(io::ErrorKind::NotConnected)?;
        let reuse = number(libc::SO_REUSEADDR)?;
        let record = sight(look, fd)?.record.ok_or(io::ErrorKind::Unsupported)?;
        let asked = connection(fd, &Info::of(fd)?, remote)?;
        Ok(Self { made_us, asked, record, local, reuse, buffers })
    }

    /// Whether its record tells what it has answered, which is not at the same time.
    fn is_told(&self, reference: &Reference) -> bool {
        const APART: u32 = 5_000_000;
        let Some(told) = reference.connection(&self.record) else { return false };
        let (told_at, asked_at) = (told.timestamp.unwrap_or(0), self.asked.timestamp.unwrap_or(0));
        TcpConnection { timestamp: None, ..told }
            == TcpConnection { timestamp: None, ..self.asked.clone() }
            && told_at.wrapping_sub(asked_at).cast_signed().unsigned_abs() < APART
            && self.record.is_repaired()
            && self.made_us.contains(&self.record.active_us)
            && (self.record.local, self.record.reuse(), self.record.buffers())
                == (self.local, self.reuse, self.buffers)
    }

    /// Whether it has answered nothing that the other one has.
    fn differs(&self, other: &Self) -> bool {
        let (own, others) = (&self.asked, &other.asked);
        own.remote != others.remote
            && own.receive_sequence != others.receive_sequence
            && own.send_sequence != others.send_sequence
            && own.segment_size != others.segment_size
            && own.window_scale != others.window_scale
            && own.selective_acknowledgement != others.selective_acknowledgement
            && own.timestamp != others.timestamp
            && own.window != others.window
            && self.buffers.iter().zip(other.buffers).all(|(own, others)| *own != others)
    }
}

/// What to try: some of it is a value of each option.
fn values(level: i32, name: i32, size: usize) -> Vec<Vec<u8>> {
    match (level, name) {
        (libc::SOL_SOCKET, libc::SO_BINDTODEVICE) => vec![b"lo\0".to_vec(), b"\0".to_vec()],
        (TCP, libc::TCP_CONGESTION) => vec![b"reno".to_vec(), b"cubic".to_vec()],
        (libc::IPPROTO_IP, libc::IP_OPTIONS) => vec![vec![1; 4], Vec::new()],
        _ => {
            // The last one is the number of the first interface, as packets have it.
            let numbers = [1, 0, 2, 5, 16, 32, 1000, 2000, 1i32.to_be()];
            let padded = |number: i32, again: i32| {
                let mut value = number.to_ne_bytes().to_vec();
                if size > 4 {
                    value.extend(again.to_ne_bytes());
                }
                value.resize(size, 0);
                value
            };
            numbers.into_iter().flat_map(|it| [padded(it, 0), padded(it, it)]).collect()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nearly_all_options_are_seen() {
        let look = Look::new().unwrap();
        assert!(are_descriptors_seen(&look).unwrap());
        for v6 in [false, true] {
            let seen = seen(&look, v6).unwrap();
            let all = Family::Tcp { v6, stage: Stage::Connected }.names();
            let missing: Vec<_> = all.filter(|it| !seen.contains(&(it.0, it.1))).collect();
            assert_eq!(missing, [], "IPv6 {v6}, not seen");
            assert!(seen.contains(&FILTER));
            assert!(seen.contains(&(libc::SOL_SOCKET, libc::SO_KEEPALIVE)));
        }
    }
}
