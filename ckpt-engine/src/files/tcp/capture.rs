//! Reading TCP sockets.

use std::{
    io,
    net::SocketAddr,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    sync::Arc,
};

use ckpt_format::files::{Kind, SocketOption, TcpClosing, TcpConnection, TcpSocket, TcpState};

use super::{
    super::{
        address,
        find::{Object, Refusal},
        options::{self, Family, Stage},
        socket::Network,
        waiting_error,
    },
    CLOSE, CLOSE_WAIT, CLOSING, ESTABLISHED, FIN_WAIT1, FIN_WAIT2, Group, LAST_ACK, LISTEN, Queue,
    REPAIR_OFF, REPAIR_ON, SYN_SENT, TCP, Taken,
    look::Sight,
    record::Record,
    select, set_repair,
    signature::Ends,
    told::Reference,
};
use crate::sys::{
    descriptor::{Count, count},
    socket,
};

/// The first part of `struct tcp_info`.
#[derive(Clone, Copy, Debug)]
pub(super) struct Info {
    pub(super) state: u8,
    options: u8,
    /// Of a connection: ours for sending, ours for receiving.
    window_scale: (u8, u8),
    /// Of a listener: how many wait to be accepted, and how many may.
    pub(super) waiting: u32,
    backlog: u32,
    /// How long a connection has received nothing, in ms.
    pub(super) silent_ms: u32,
}

impl Info {
    const TIMESTAMPS: u8 = 1;
    const SELECTIVE_ACKNOWLEDGEMENT: u8 = 2;
    const WINDOW_SCALE: u8 = 4;

    pub(super) fn of(fd: BorrowedFd<'_>) -> io::Result<Self> {
        let mut bytes = [0u8; 56];
        let length = socket::option(fd, TCP, libc::TCP_INFO, &mut bytes)?;
        if length < bytes.len() {
            return Err(io::ErrorKind::InvalidData.into());
        }
        Ok(Self {
            state: bytes[0],
            options: bytes[5],
            window_scale: (bytes[6] & 15, bytes[6] >> 4),
            waiting: word(&bytes, 24),
            backlog: word(&bytes, 28),
            silent_ms: word(&bytes, 52),
        })
    }

    fn has(&self, option: u8) -> bool {
        self.options & option != 0
    }
}

fn word(bytes: &[u8], at: usize) -> u32 {
    let mut word = [0; 4];
    word.copy_from_slice(&bytes[at..at + 4]);
    u32::from_ne_bytes(word)
}

/// Refuses what never can be moved; a state that passes by itself is refused by [`capture`] only.
pub(in super::super) fn check(object: &Object) -> Result<(), Refusal> {
    let mut protocol = [0u8; 16];
    let length = socket::option(object.fd(), TCP, libc::TCP_ULP, &mut protocol).unwrap_or(0);
    if length > 0 && protocol[0] != 0 {
        let end = protocol.iter().position(|&byte| byte == 0).unwrap_or(length);
        let name = String::from_utf8_lossy(&protocol[..end]).into_owned();
        return Err(Refusal::new(
            format!("a TCP connection that the kernel handles with {name}"),
            "switch kernel TLS off in the program",
        ));
    }
    // Its keys and counters are told to nobody.
    if socket::option(object.fd(), TCP, TCP_AO_INFO, &mut [0; 48]).is_ok() {
        return Err(Refusal::new(
            "a TCP connection with authentication (TCP-AO)",
            "use TCP_MD5SIG, or end the program",
        ));
    }
    Ok(())
}

const TCP_AO_INFO: i32 = 40;

/// Refuses an MPTCP socket that has a connection: its data cannot be read from outside, and the
/// keys of its paths cannot be set.
pub(in super::super) fn check_multipath(object: &Object) -> Result<(), Refusal> {
    if address::remote(object.fd())?.is_none() {
        return Ok(());
    }
    Err(Refusal::new(
        "an MPTCP connection",
        "close it, or let the program use TCP (sysctl net.mptcp.enabled=0 in the VE)",
    ))
}

/// A connection of the VE in repair mode, which ends when this is dropped.
#[derive(Debug)]
pub(in super::super) struct Repaired {
    fd: Option<Arc<OwnedFd>>,
    /// `SO_REUSEADDR`, which the end of repair mode clears.
    reuse: i32,
    /// Whether the kernel's record has told all about it.
    pub(in super::super) is_told: bool,
}

impl Repaired {
    fn new(object: &Object) -> io::Result<Self> {
        let reuse = options::number(object.fd(), libc::SOL_SOCKET, libc::SO_REUSEADDR)?;
        Self::with(object, reuse, false)
    }

    fn with(object: &Object, reuse: i32, is_told: bool) -> io::Result<Self> {
        set_repair(object.fd(), REPAIR_ON)?;
        Ok(Self { fd: Some(object.fd.clone()), reuse, is_told })
    }

    /// Leaves the connection in repair mode for ever.
    pub(in super::super) fn seal(mut self) {
        self.fd = None;
    }
}

impl Drop for Repaired {
    fn drop(&mut self) {
        let Some(fd) = self.fd.take() else { return };
        // The window probe makes the peer send what it has withheld while we were silent.
        if let Err(error) = end_repair(fd.as_fd(), REPAIR_OFF, self.reuse) {
            tracing::warn!(%error, "a TCP connection is left in repair mode");
        }
    }
}

fn end_repair(fd: BorrowedFd<'_>, how: i32, reuse: i32) -> io::Result<()> {
    set_repair(fd, how)?;
    options::set(fd, libc::SOL_SOCKET, libc::SO_REUSEADDR, reuse)
}

/// Ends the repair mode that a daemon left behind which died during a capture.
/// Whether `SO_REUSEADDR` was set is not known any more; it is, for connections of servers.
pub(in super::super) fn mend(object: &Object) -> io::Result<bool> {
    let fd = object.fd();
    let repaired = options::number(fd, TCP, libc::TCP_REPAIR)? != 0;
    if repaired {
        select(fd, Queue::None)?;
        end_repair(fd, REPAIR_OFF, 1)?;
    }
    Ok(repaired)
}

/// How long a connection that is asked must have received nothing to be quiet, in ms: longer than the
/// kernel puts off an acknowledgement, which is 200 ms (`TCP_DELACK_MAX`), before packets were held.
pub(super) const QUIET_MS: u32 = 500;

/// What [`super::super::Undo`] puts back.
#[derive(Debug)]
pub(in super::super) enum Held {
    Nothing,
    Connection(Repaired),
    Queue(Taken),
}

/// Reads a socket. A connection with others that are `alike` is not asked for what they all have.
pub(in super::super) fn capture(
    object: &Object,
    network: &Network,
    v6: bool,
    multipath: bool,
    alike: Option<(&Group<'_>, &Sight)>,
) -> Result<(Kind, Held), Refusal> {
    let fd = object.fd();
    let info = Info::of(fd)?;
    let local = address::local(fd)?;
    let error = if info.state == CLOSE { waiting_error::waiting(fd)?.error } else { 0 };
    let stage = match info.state {
        LISTEN => Stage::Fresh,
        CLOSE if error == 0 && !was_connected(fd)? => Stage::Fresh,
        SYN_SENT => Stage::Connecting,
        _ => Stage::Connected,
    };
    let mut options = match alike.filter(|_| stage == Stage::Connected) {
        Some((alike, _)) => alike.options_of(object)?,
        None => options::capture(fd, Family::Tcp { v6, stage })?,
    };
    let keys = match info.state {
        state if multipath || state == CLOSE => Vec::new(),
        LISTEN => network.signatures()?.of(object.status.inode),
        // Whoever is seen need not be looked up among thousands.
        _ if alike.is_some_and(|(group, sight)| group.is_unsigned(sight)) => Vec::new(),
        _ => keys_of(object, network, local)?,
    };
    let (state, held) = match info.state {
        // What puts them back is not signed.
        LISTEN if info.waiting > 0 && (multipath || !keys.is_empty()) => {
            return Err(waiting(info.waiting));
        }
        LISTEN => listening(fd, local, network, &info)?,
        CLOSE if stage == Stage::Connected => {
            (TcpState::Finished { unread: finished(fd)?, error }, Held::Nothing)
        }
        CLOSE => (TcpState::Closed, Held::Nothing),
        SYN_SENT => {
            // getpeername(2) does not tell.
            let remote = network.remote("tcp", object)?.ok_or_else(passing)?;
            (TcpState::Connecting { remote }, Held::Nothing)
        }
        ESTABLISHED | FIN_WAIT1 | FIN_WAIT2 | CLOSE_WAIT | LAST_ACK | CLOSING => {
            let repaired = Repaired::new(object)?;
            let remote = address::remote(fd)?.ok_or_else(passing)?;
            let connection = connection(fd, &info, remote)?;
            (TcpState::Connected(Box::new(connection)), Held::Connection(repaired))
        }
        _ => return Err(passing()),
    };
    options.extend(keys);
    let kind = Kind::Tcp(Box::new(TcpSocket { v6, multipath, local, state, options }));
    Ok((kind, held))
}

/// The keys with which a connection signs, or one that is being made.
fn keys_of(
    object: &Object,
    network: &Network,
    local: Option<SocketAddr>,
) -> io::Result<Vec<SocketOption>> {
    let remote = match address::remote(object.fd())? {
        None => network.remote("tcp", object)?,
        remote => remote,
    };
    let (Some(local), Some(remote)) = (local, remote) else { return Ok(Vec::new()) };
    let bound = options::number(object.fd(), libc::SOL_SOCKET, libc::SO_BINDTOIFINDEX);
    let device = bound.unwrap_or(0).cast_unsigned();
    network.signatures_of(Ends { local, remote, device, inode: object.status.inode })
}

/// Reads a connection that was seen: it is asked only for what its record does not tell.
pub(in super::super) fn capture_alike(
    object: &Object,
    group: &Group<'_>,
    sight: &Sight,
) -> Result<(Kind, Held), Refusal> {
    let mut asked = None;
    if let Some(record) = group.record(sight) {
        let reference = group.reference.get_or_init(|| {
            let (reference, read) = ask(object, group, sight, record);
            asked = Some(read);
            reference
        });
        if let Some(read) = asked {
            return read;
        }
        if let Some(socket) = reference.as_ref().and_then(|it| group.socket(object, record, it)) {
            let held = Held::Connection(Repaired::with(object, record.reuse(), true)?);
            return Ok((Kind::Tcp(Box::new(socket)), held));
        }
    }
    capture(object, group.network, group.v6, false, Some((group, sight)))
}

/// Asks the first connection of a group: with it the others are compared, if its record tells what
/// it answers.
fn ask(
    object: &Object,
    group: &Group<'_>,
    sight: &Sight,
    record: &Record,
) -> (Option<Reference>, Result<(Kind, Held), Refusal>) {
    let mut read = capture(object, group.network, group.v6, false, Some((group, sight)));
    let reference = match &mut read {
        Ok((Kind::Tcp(socket), _)) => compare(object, group, record, socket),
        _ => None,
    };
    (reference, read)
}

fn compare(
    object: &Object,
    group: &Group<'_>,
    record: &Record,
    asked: &mut TcpSocket,
) -> Option<Reference> {
    let TcpState::Connected(connection) = &mut asked.state else { return None };
    let (record, timestamp) = (record.clone(), connection.timestamp);
    let reference = Reference { record, timestamp, stopped_us: group.stopped_us? };
    let told = group.socket(object, &reference.record, &reference)?;
    // Only the record tells exactly since when it is quiet.
    let quiet = std::mem::replace(&mut connection.quiet, reference.is_quiet());
    if told == *asked {
        return Some(reference);
    }
    tracing::info!(?told, ?asked, "the records of connections are not believed");
    if let TcpState::Connected(connection) = &mut asked.state {
        connection.quiet = quiet;
    }
    None
}

fn listening(
    fd: BorrowedFd<'_>,
    local: Option<SocketAddr>,
    network: &Network,
    info: &Info,
) -> Result<(TcpState, Held), Refusal> {
    let backlog = info.backlog;
    if options::number(fd, TCP, libc::TCP_DEFER_ACCEPT).unwrap_or(0) > 0
        && network.is_handshaking(&local.ok_or_else(passing)?)?
    {
        return Err(Refusal::new(
            "a TCP client that has connected and said nothing yet (TCP_DEFER_ACCEPT)",
            "try again when it has spoken",
        ));
    }
    if info.waiting == 0 {
        return Ok((TcpState::Listening { backlog, waiting: Vec::new() }, Held::Nothing));
    }
    let taken = Taken::from(fd, network.namespace()?.as_fd()).map_err(|error| {
        let mut refusal = waiting(info.waiting);
        refusal.object = format!("{} ({error})", refusal.object);
        refusal
    })?;
    Ok((TcpState::Listening { backlog, waiting: taken.waiting() }, Held::Queue(taken)))
}

fn passing() -> Refusal {
    Refusal::new("a TCP connection that is just being set up", "try again")
}

fn waiting(count: u32) -> Refusal {
    let what = format!("a TCP listener with {count} connections not yet accepted");
    Refusal::new(what, "try again when the program has accepted them")
}

/// A closed socket that has had a peer says end of file, a fresh one that it is not connected.
fn was_connected(fd: BorrowedFd<'_>) -> io::Result<bool> {
    let mut byte = [0];
    match socket::receive(fd, &mut byte, libc::MSG_PEEK | libc::MSG_DONTWAIT) {
        Ok(_) => Ok(true),
        Err(error) if error.raw_os_error() == Some(libc::ENOTCONN) => Ok(false),
        Err(_) => Ok(true),
    }
}

fn finished(fd: BorrowedFd<'_>) -> io::Result<serde_bytes::ByteBuf> {
    let length = count(fd, Count::Readable).unwrap_or(0);
    Ok(serde_bytes::ByteBuf::from(peek(fd, length as usize)?))
}

pub(super) fn connection(
    fd: BorrowedFd<'_>,
    info: &Info,
    remote: SocketAddr,
) -> io::Result<TcpConnection> {
    let closing = match info.state {
        FIN_WAIT1 | FIN_WAIT2 => TcpClosing::ByUs,
        CLOSE_WAIT => TcpClosing::ByPeer,
        LAST_ACK | CLOSING => TcpClosing::ByBoth,
        _ => TcpClosing::Open,
    };
    let mut window = [0u8; 20];
    socket::option(fd, TCP, libc::TCP_REPAIR_WINDOW, &mut window)?;
    let [a, b, c, d, e] = [0, 4, 8, 12, 16].map(|at| word(&window, at));
    let timestamp =
        if info.has(Info::TIMESTAMPS) { Some(number(fd, libc::TCP_TIMESTAMP)?) } else { None };
    let outstanding = count(fd, Count::Outstanding)? as usize;
    let unsent_sequence = count(fd, Count::Unsent)?;
    let readable = readable(fd)?;
    let (receive_sequence, unread) = queue(fd, Queue::Receive, readable)?;
    // The peer's FIN can be counted as a byte.
    let ended = usize::from(matches!(closing, TcpClosing::ByPeer | TcpClosing::ByBoth));
    if unread.len() + ended < readable {
        return Err(io::Error::other("a TCP connection with urgent data in it"));
    }
    let (send_sequence, unacknowledged) = queue(fd, Queue::Send, outstanding)?;
    select(fd, Queue::None)?;
    // Our FIN has a sequence number too, which is no byte of the queue.
    let fin = u32::from(matches!(closing, TcpClosing::ByUs | TcpClosing::ByBoth));
    let quiet = closing == TcpClosing::Open
        && unread.is_empty()
        && unacknowledged.is_empty()
        // The last acknowledgement went out before packets were held, and not just now.
        && e == receive_sequence
        && info.silent_ms >= QUIET_MS;
    Ok(TcpConnection {
        remote,
        closing,
        quiet,
        unread,
        receive_sequence,
        unsent: unsent_sequence.saturating_sub(fin),
        unacknowledged,
        send_sequence,
        segment_size: number(fd, libc::TCP_MAXSEG)?,
        window_scale: info.has(Info::WINDOW_SCALE).then_some(info.window_scale),
        selective_acknowledgement: info.has(Info::SELECTIVE_ACKNOWLEDGEMENT),
        timestamp,
        window: [a, b, c, d, e],
    })
}

/// How much waits to be read, also behind an urgent byte (`MSG_OOB`). The kernel counts and peeks only
/// as far as there, and neither that byte nor its place can be put back.
fn readable(fd: BorrowedFd<'_>) -> io::Result<usize> {
    let (level, name) = (libc::SOL_SOCKET, libc::SO_OOBINLINE);
    let before = options::number(fd, level, name)?;
    if before == 0 {
        options::set(fd, level, name, 1)?;
    }
    let readable = count(fd, Count::Readable);
    if before == 0 {
        options::set(fd, level, name, 0)?;
    }
    Ok(readable? as usize)
}

fn number(fd: BorrowedFd<'_>, name: i32) -> io::Result<u32> {
    Ok(options::number(fd, TCP, name)?.cast_unsigned())
}

fn queue(fd: BorrowedFd<'_>, queue: Queue, length: usize) -> io::Result<(u32, Vec<u8>)> {
    select(fd, queue)?;
    let sequence = number(fd, libc::TCP_QUEUE_SEQ)?;
    Ok((sequence, peek(fd, length)?))
}

fn peek(fd: BorrowedFd<'_>, length: usize) -> io::Result<Vec<u8>> {
    let mut data = vec![0; length];
    if length == 0 {
        return Ok(data);
    }
    let flags = libc::MSG_PEEK | libc::MSG_DONTWAIT;
    // From Linux 6.9 on a program can have a place from which it peeks, which goes on with ours.
    let (level, name) = (libc::SOL_SOCKET, libc::SO_PEEK_OFF);
    let before = options::number(fd, level, name).ok().filter(|&place| place >= 0);
    if before.is_some() {
        options::set(fd, level, name, -1)?;
    }
    let received = socket::receive(fd, &mut data, flags);
    if let Some(place) = before {
        options::set(fd, level, name, place)?;
    }
    let received = match received {
        // A queue that holds nothing but a FIN.
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => 0,
        other => other?.length,
    };
    data.truncate(received);
    Ok(data)
}
