//! Making TCP sockets.

use std::{
    io,
    net::{Ipv4Addr, SocketAddr},
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

use ckpt_format::files::{SocketOption, TcpConnection, TcpSocket, TcpState};

use super::{
    super::{
        address,
        options::{self},
        rebuild::RebuildError,
    },
    Queue, REPAIR_OFF, REPAIR_OFF_UNHEARD, REPAIR_ON, TCP, fin, select, set_repair, signature,
};
use crate::sys::{
    descriptor::{self, Change, Query},
    socket::{self, Along, End},
};

/// The largest piece put into a queue at once, in bytes: one buffer of the kernel holds it.
const PIECE: usize = 48 << 10;

fn failed(source: io::Error) -> RebuildError {
    RebuildError::Kernel { object: "TCP socket", source }
}

/// A connection that is complete but for what would be heard outside.
#[derive(Debug)]
pub(in super::super) struct Connection {
    reuse: i32,
    /// Those that are set at the end, if any are.
    options: Vec<SocketOption>,
    step: Step,
}

/// What the end of repair mode sends to the peer, which learns so that it can go on. It is a packet and
/// its answer, in the blackout: where it would tell neither end anything, none is sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Probe {
    Sent,
    /// Nothing can be withheld.
    ToUncertainPeer,
    /// The peer's end is acknowledged anew, which tells it as much. A peer that is gone answers with
    /// a reset, which must not come before its end.
    Never,
}

#[derive(Debug)]
enum Step {
    /// connect(2) is called again.
    Connect(SocketAddr),
    /// Repair mode ends, what was never sent is sent, and what was closed is closed.
    GoOn { unsent: Vec<u8>, close: bool, closed_by_peer: Option<fin::Fin>, probe: Probe },
}

/// Makes a socket up to its name, and listens. Listeners come before connections, which share
/// their ports.
pub(in super::super) fn bind(tcp: &TcpSocket) -> Result<OwnedFd, RebuildError> {
    let domain = if tcp.v6 { libc::AF_INET6 } else { libc::AF_INET };
    let protocol = if tcp.multipath { libc::IPPROTO_MPTCP } else { libc::IPPROTO_TCP };
    let fd = match socket::socket(domain, libc::SOCK_STREAM, protocol) {
        // A kernel without MPTCP: then as TCP, which every client of it speaks.
        Err(_) if tcp.multipath => socket::socket(domain, libc::SOCK_STREAM, libc::IPPROTO_TCP),
        other => other,
    };
    let fd = fd.map_err(failed)?;
    if tcp.multipath {
        options::rebuild_own(fd.as_fd(), &tcp.options).map_err(failed)?;
    } else {
        options::rebuild(fd.as_fd(), &tcp.options).map_err(failed)?;
    }
    let named = match tcp.state {
        TcpState::Closed | TcpState::Listening { .. } => {
            if !tcp.multipath {
                options::rebuild_buffers(fd.as_fd(), &tcp.options).map_err(failed)?;
            }
            tcp.local
        }
        TcpState::Connecting { .. } => tcp.local,
        TcpState::Connected(_) | TcpState::Finished { .. } => None,
    };
    if let Some(local) = named {
        socket::bind(fd.as_fd(), &address::encode_inet(&local)).map_err(failed)?;
    }
    if let TcpState::Listening { backlog, .. } = tcp.state {
        socket::listen(fd.as_fd(), backlog).map_err(failed)?;
    }
    Ok(fd)
}

/// What the connections of a network need not be given.
#[derive(Debug)]
pub(in super::super) struct Usual {
    /// The congestion control of fresh sockets.
    congestion: Vec<u8>,
}

impl Usual {
    /// Of the calling thread's network.
    pub(in super::super) fn here() -> Result<Self, RebuildError> {
        let fresh = socket::socket(libc::AF_INET, libc::SOCK_STREAM, libc::IPPROTO_TCP);
        let mut congestion = vec![0; 16];
        let asked = fresh.and_then(|fresh| {
            socket::option(fresh.as_fd(), TCP, libc::TCP_CONGESTION, &mut congestion)
        });
        congestion.truncate(asked.map_err(failed)?);
        Ok(Self { congestion })
    }

    fn has(&self, option: &SocketOption) -> bool {
        match (option.level, option.name) {
            (TCP, libc::TCP_CONGESTION) => option.value == self.congestion,
            // It is set when repair mode has ended, which clears it.
            (libc::SOL_SOCKET, libc::SO_REUSEADDR) => true,
            _ => false,
        }
    }
}

/// Makes a socket that has a connection, with these status flags.
pub(in super::super) fn make(
    tcp: &TcpSocket,
    flags: u32,
    usual: &Usual,
) -> Result<(OwnedFd, Option<Connection>), RebuildError> {
    let fd = socket_for(tcp, flags)?;
    let unusual = tcp.options.iter().filter(|option| !usual.has(option));
    options::rebuild(fd.as_fd(), unusual).map_err(failed)?;
    let connection = connect(fd.as_fd(), tcp)?;
    Ok((fd, connection))
}

/// Makes a socket that has a connection before the VE stops, in repair mode, up to what
/// [`complete`] does.
pub(super) fn make_early(
    tcp: &TcpSocket,
    flags: u32,
    usual: &Usual,
) -> Result<OwnedFd, RebuildError> {
    let TcpState::Connected(connection) = &tcp.state else { return Err(RebuildError::Damaged) };
    let local = tcp.local.ok_or(RebuildError::Damaged)?;
    let fd = socket_for(tcp, flags)?;
    let early = tcp.options.iter().filter(|option| !usual.has(option) && !is_keepalive(option));
    let make = || {
        options::rebuild(fd.as_fd(), early)?;
        repair(fd.as_fd(), &local, connection)?;
        options::rebuild_buffers(fd.as_fd(), &tcp.options)
    };
    make().map_err(failed)?;
    Ok(fd)
}

/// The rest of a connection that was made before the VE stopped.
pub(in super::super) fn complete(
    fd: BorrowedFd<'_>,
    tcp: &TcpSocket,
) -> Result<Connection, RebuildError> {
    let TcpState::Connected(connection) = &tcp.state else { return Err(RebuildError::Damaged) };
    if let Some(timestamp) = connection.timestamp {
        options::set(fd, TCP, libc::TCP_TIMESTAMP, timestamp.cast_signed()).map_err(failed)?;
    }
    // It would have asked a peer that cannot answer yet, and given up.
    options::rebuild(fd, tcp.options.iter().filter(|it| is_keepalive(it))).map_err(failed)?;
    going_on(tcp, connection)
}

fn is_keepalive(option: &SocketOption) -> bool {
    (option.level, option.name) == (libc::SOL_SOCKET, libc::SO_KEEPALIVE)
}

fn socket_for(tcp: &TcpSocket, flags: u32) -> Result<OwnedFd, RebuildError> {
    let domain = if tcp.v6 { libc::AF_INET6 } else { libc::AF_INET };
    let kind = libc::SOCK_STREAM | flags.cast_signed() & libc::SOCK_NONBLOCK;
    socket::socket(domain, kind, libc::IPPROTO_TCP).map_err(failed)
}

/// Gives a socket made by [`bind`] its connection.
pub(in super::super) fn connect(
    fd: BorrowedFd<'_>,
    tcp: &TcpSocket,
) -> Result<Option<Connection>, RebuildError> {
    match &tcp.state {
        TcpState::Closed | TcpState::Listening { .. } => Ok(None),
        TcpState::Finished { unread, error } => {
            if let Err(error) = finish(fd, unread, *error) {
                tracing::warn!(%error, "a TCP socket that was closed by both ends is fresh again");
            }
            Ok(None)
        }
        TcpState::Connecting { remote } => Ok(Some(Connection::new(tcp, Step::Connect(*remote)))),
        TcpState::Connected(connection) => {
            let local = tcp.local.ok_or(RebuildError::Damaged)?;
            repair(fd, &local, connection).map_err(failed)?;
            if connection.unsent == 0 {
                options::rebuild_buffers(fd, &tcp.options).map_err(failed)?;
            }
            going_on(tcp, connection).map(Some)
        }
    }
}

fn going_on(tcp: &TcpSocket, connection: &TcpConnection) -> Result<Connection, RebuildError> {
    let local = tcp.local.ok_or(RebuildError::Damaged)?;
    Ok(Connection::new(tcp, go_on(&local, connection).map_err(failed)?))
}

pub(super) fn repair(
    fd: BorrowedFd<'_>,
    local: &SocketAddr,
    tcp: &TcpConnection,
) -> io::Result<()> {
    let (sent, unsent) = tcp.split().ok_or(io::ErrorKind::InvalidData)?;
    let room = if tcp.unacknowledged.is_empty() { 0 } else { sent.len() + unsent.len() };
    options::make_room(fd, room, tcp.unread.len())?;
    set_repair(fd, REPAIR_ON)?;
    for (queue, sequence) in
        [(Queue::Send, tcp.send_start()), (Queue::Receive, tcp.receive_start())]
    {
        select(fd, queue)?;
        options::set(fd, TCP, libc::TCP_QUEUE_SEQ, sequence.cast_signed())?;
    }
    socket::bind(fd, &address::encode_inet(local))?;
    socket::connect(fd, &address::encode_inet(&tcp.remote))?;
    negotiated(fd, tcp)?;
    fill(fd, Queue::Receive, &tcp.unread)?;
    fill(fd, Queue::Send, sent)?;
    if tcp.closed_by_us() && unsent.is_empty() {
        // In repair mode our FIN counts as sent, and nothing is sent.
        select(fd, Queue::Send)?;
        socket::shutdown(fd, libc::SHUT_WR)?;
    }
    // Outside of repair mode it means nothing which queue is selected.
    window(fd, tcp)
}

fn negotiated(fd: BorrowedFd<'_>, tcp: &TcpConnection) -> io::Result<()> {
    const SEGMENT_SIZE: u32 = 2;
    const WINDOW_SCALE: u32 = 3;
    const SELECTIVE_ACKNOWLEDGEMENT: u32 = 4;
    const TIMESTAMP: u32 = 8;
    let mut pairs = vec![(SEGMENT_SIZE, tcp.segment_size)];
    if let Some((sending, receiving)) = tcp.window_scale {
        pairs.push((WINDOW_SCALE, u32::from(sending) | u32::from(receiving) << 16));
    }
    if tcp.selective_acknowledgement {
        pairs.push((SELECTIVE_ACKNOWLEDGEMENT, 0));
    }
    if tcp.timestamp.is_some() {
        pairs.push((TIMESTAMP, 0));
    }
    let bytes: Vec<u8> = pairs
        .into_iter()
        .flat_map(|(option, value)| [option.to_ne_bytes(), value.to_ne_bytes()])
        .flatten()
        .collect();
    socket::set_option(fd, TCP, libc::TCP_REPAIR_OPTIONS, &bytes)?;
    if let Some(timestamp) = tcp.timestamp {
        options::set(fd, TCP, libc::TCP_TIMESTAMP, timestamp.cast_signed())?;
    }
    Ok(())
}

fn fill(fd: BorrowedFd<'_>, queue: Queue, data: &[u8]) -> io::Result<()> {
    if data.is_empty() {
        return Ok(());
    }
    select(fd, queue)?;
    let mut rest = data;
    while !rest.is_empty() {
        let piece = &rest[..rest.len().min(PIECE)];
        let sent = socket::send(fd, piece, &Along::default(), libc::MSG_DONTWAIT)?;
        rest = &rest[sent..];
    }
    Ok(())
}

fn window(fd: BorrowedFd<'_>, tcp: &TcpConnection) -> io::Result<()> {
    let [mut wl1, window, largest, receive_window, mut wup] = tcp.window;
    if tcp.closed_by_peer() {
        // The peer's FIN is not received yet here; the kernel refuses what lies behind.
        let received = tcp.receive_sequence.wrapping_sub(1);
        (wl1, wup) = (received, received);
    }
    let fields = [wl1, window, largest, receive_window, wup];
    let bytes: Vec<u8> = fields.iter().flat_map(|field| field.to_ne_bytes()).collect();
    socket::set_option(fd, TCP, libc::TCP_REPAIR_WINDOW, &bytes)
}

fn go_on(local: &SocketAddr, tcp: &TcpConnection) -> io::Result<Step> {
    let (_, unsent) = tcp.split().ok_or(io::ErrorKind::InvalidData)?;
    let closed_by_peer = if tcp.closed_by_peer() { Some(fin::Fin::new(local, tcp)?) } else { None };
    let close = tcp.closed_by_us() && !unsent.is_empty();
    let probe = match tcp.quiet {
        true => Probe::ToUncertainPeer,
        false if tcp.closed_by_peer() && tcp.unacknowledged.is_empty() => Probe::Never,
        false => Probe::Sent,
    };
    Ok(Step::GoOn { unsent: unsent.to_vec(), close, closed_by_peer, probe })
}

impl Connection {
    fn new(tcp: &TcpSocket, step: Step) -> Self {
        let is_reuse = |option: &SocketOption| {
            (option.level, option.name) == (libc::SOL_SOCKET, libc::SO_REUSEADDR)
        };
        let reuse = i32::from(tcp.options.iter().any(is_reuse));
        let is_later = match &step {
            Step::Connect(_) => true,
            Step::GoOn { unsent, .. } => !unsent.is_empty(),
        };
        let options = if is_later { tcp.options.clone() } else { Vec::new() };
        Self { reuse, options, step }
    }

    /// Lets the connection go on.
    pub(in super::super) fn release(&self, fd: BorrowedFd<'_>, ask: bool) -> io::Result<()> {
        match &self.step {
            Step::Connect(remote) => {
                options::rebuild_buffers(fd, &self.options)?;
                begin_to_connect(fd, remote)
            }
            Step::GoOn { unsent, close, closed_by_peer, probe } => {
                let unheard = match probe {
                    Probe::Sent => false,
                    Probe::ToUncertainPeer => !ask,
                    Probe::Never => true,
                };
                set_repair(fd, if unheard { REPAIR_OFF_UNHEARD } else { REPAIR_OFF })?;
                // The end of repair mode has cleared it.
                if self.reuse != 0 {
                    options::set(fd, libc::SOL_SOCKET, libc::SO_REUSEADDR, self.reuse)?;
                }
                if let Some(fin) = closed_by_peer {
                    // It is not signed.
                    signature::without(fd, &self.options, || fin.deliver())?;
                }
                if unsent.is_empty() {
                    return Ok(());
                }
                fill_unsent(fd, unsent)?;
                if *close {
                    socket::shutdown(fd, libc::SHUT_WR)?;
                }
                options::rebuild_buffers(fd, &self.options)
            }
        }
    }
}

fn begin_to_connect(fd: BorrowedFd<'_>, remote: &SocketAddr) -> io::Result<()> {
    let flags = descriptor::query(fd, Query::GetFlags)?;
    descriptor::change(fd, Change::SetFlags, flags | libc::O_NONBLOCK)?;
    let connected = socket::connect(fd, &address::encode_inet(remote));
    descriptor::change(fd, Change::SetFlags, flags)?;
    match connected {
        Err(error) if error.raw_os_error() == Some(libc::EINPROGRESS) => Ok(()),
        other => other,
    }
}

fn fill_unsent(fd: BorrowedFd<'_>, unsent: &[u8]) -> io::Result<()> {
    let mut rest = unsent;
    while !rest.is_empty() {
        let sent = socket::send(fd, rest, &Along::default(), libc::MSG_DONTWAIT)?;
        rest = &rest[sent..];
    }
    Ok(())
}

/// Makes a socket that has been closed by both ends, or has lost its peer: by a short life inside
/// the VE. An error that nothing there can cause becomes a reset.
fn finish(fd: BorrowedFd<'_>, unread: &[u8], error: i32) -> io::Result<()> {
    let listener = socket::socket(libc::AF_INET, libc::SOCK_STREAM, 0)?;
    let anywhere = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
    socket::bind(listener.as_fd(), &address::encode_inet(&anywhere))?;
    if error != libc::ECONNREFUSED {
        socket::listen(listener.as_fd(), 1)?;
    }
    let mut name = address::decode_inet(&socket::address(listener.as_fd(), End::Local)?)?;
    if let (SocketAddr::V4(v4), Ok(own)) = (name, socket::address(fd, End::Local))
        && matches!(address::decode_inet(&own)?, SocketAddr::V6(_))
    {
        name = (v4.ip().to_ipv6_mapped(), v4.port()).into();
    }
    if error == libc::ECONNREFUSED {
        return begin_to_connect(fd, &name);
    }
    socket::connect(fd, &address::encode_inet(&name))?;
    let peer = socket::accept(listener.as_fd())?;
    options::make_room(peer.as_fd(), unread.len(), 0)?;
    options::make_room(fd, 0, unread.len())?;
    fill_unsent(peer.as_fd(), unread)?;
    if error == 0 {
        drop(peer);
        return socket::shutdown(fd, libc::SHUT_WR);
    }
    if error == libc::EPIPE {
        socket::shutdown(peer.as_fd(), libc::SHUT_WR)?;
    }
    // Closed at once, whatever is on its way.
    let linger = [1i32.to_ne_bytes(), 0i32.to_ne_bytes()].concat();
    socket::set_option(peer.as_fd(), libc::SOL_SOCKET, libc::SO_LINGER, &linger)
}
