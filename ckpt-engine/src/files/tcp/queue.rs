//! Connections that nobody has accepted yet.
//!
//! The kernel tells hardly anything about them before they are accepted, and accepting them takes
//! them out of the listener's queue. So they are accepted from outside, read like any other
//! connection, and put back into the queue: on the target when the listener is rebuilt, and on
//! the source when the VE goes on there.
//!
//! They are put back by packets that we send to the VE ourselves, through its loopback device and
//! in the name of the client: an acknowledgement as the last step of the handshake, then what the
//! client has sent. A handshake that was never begun is none, so a small program at the loopback
//! device vouches for it (`bpf_sk_assign_tcp_reqsk`, made for servers that check SYN cookies of
//! their own; Linux 6.9). It says what was negotiated; both sequence numbers are those of the
//! acknowledgement. What comes out differs in nothing from the connection that was accepted.

use std::{
    io,
    net::{IpAddr, SocketAddr},
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
    thread,
};

use ckpt_format::files::{TcpConnection, WaitingConnection};

use nix::{
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sched::{CpuSet, sched_getaffinity, sched_getcpu, sched_setaffinity},
    unistd::Pid,
};

use super::{
    super::{address, options, packet},
    CLOSE_WAIT, ESTABLISHED, Info, REPAIR_ON, SYN_RECEIVED,
    capture::connection,
    set_repair,
};
use crate::sys::{
    bpf::{self, MapKind},
    descriptor,
    socket::{self, Along},
};

/// Marks our packets.
const MARK: i32 = 0x4665_7272;
/// The size of `struct bpf_tcp_req_attrs`.
const NEGOTIATED: usize = 20;
/// How much goes into one packet, in bytes. Small enough that the kernel widens the window of a
/// connection that nobody reads from.
const PIECE: usize = 8 << 10;
/// The interface number of the loopback device, in every network.
const LOOPBACK: u32 = 1;

/// What puts connections into the queues of one network, whose processes stand still: while it is
/// there the loopback device delivers nothing else.
#[derive(Debug)]
pub(in super::super) struct Door {
    listener: OwnedFd,
    negotiated: OwnedFd,
    raw: [Option<OwnedFd>; 2],
    /// The program works as long as this is open.
    _attached: OwnedFd,
}

impl Door {
    /// For the network of the calling thread.
    pub(in super::super) fn here() -> io::Result<Self> {
        let listener = bpf::map(MapKind::Sockets, 8)?;
        let negotiated = bpf::map(MapKind::Array, NEGOTIATED as u32)?;
        let program = bpf::load(&program(
            negotiated.as_fd(),
            listener.as_fd(),
            crate::btf::assign_request()?,
        ))?;
        let attached = bpf::attach_to_ingress(program.as_fd(), LOOPBACK)?;
        let raw = [IpAddr::from([127, 0, 0, 1]), IpAddr::from([0; 16])].map(|kind| {
            // Without IPv6 there is no such socket, and nobody who needs it.
            let raw = packet::raw_socket(kind).ok()?;
            options::set(raw.as_fd(), libc::SOL_SOCKET, libc::SO_MARK, MARK).ok()?;
            Some(raw)
        });
        Ok(Self { listener, negotiated, raw, _attached: attached })
    }

    /// For another network.
    pub(super) fn to(network: BorrowedFd<'_>) -> io::Result<Self> {
        // A thread of its own, because it stays in that network.
        let work = || {
            descriptor::enter(network, libc::CLONE_NEWNET)?;
            Self::here()
        };
        thread::scope(|scope| scope.spawn(work).join())
            .unwrap_or_else(|_| Err(io::Error::other("the thread in the VE's network panicked")))
    }

    /// Puts a connection at the end of a listener's queue, with what it has received.
    pub(in super::super) fn put(
        &self,
        listener: BorrowedFd<'_>,
        waiting: &WaitingConnection,
    ) -> io::Result<()> {
        let before = Info::of(listener)?.waiting;
        let tcp = &waiting.connection;
        bpf::set_entry(self.negotiated.as_fd(), &negotiated(waiting))?;
        let number = u64::try_from(listener.as_raw_fd()).map_err(io::Error::other)?;
        bpf::set_entry(self.listener.as_fd(), &number.to_ne_bytes())?;
        let chosen = Chosen::among_its_group(listener)?;
        let sent = self.send(waiting, packet::ACK, tcp.receive_start(), &[]);
        drop(chosen);
        // From here on our packets find the connection by themselves.
        bpf::clear_entry(self.listener.as_fd())?;
        sent?;
        if Info::of(listener)?.waiting != before + 1 {
            return Err(io::Error::other("the kernel has not taken the connection"));
        }
        let mut sequence = tcp.receive_start();
        for piece in tcp.unread.chunks(PIECE) {
            self.send(waiting, packet::ACK, sequence, piece)?;
            sequence = sequence.wrapping_add(piece.len() as u32);
        }
        if tcp.closed_by_peer() {
            self.send(waiting, packet::ACK | packet::FIN, sequence, &[])?;
        }
        Ok(())
    }

    fn send(
        &self,
        waiting: &WaitingConnection,
        flags: u8,
        sequence: u32,
        data: &[u8],
    ) -> io::Result<()> {
        let packet = packet::tcp(&waiting.local, &waiting.connection, flags, sequence, data);
        let to = packet::on_the_wire(waiting.local.ip());
        let raw = self.raw[usize::from(to.is_ipv6())].as_ref();
        let receiver = address::encode_inet(&SocketAddr::from((to, 0)));
        let along = Along { receiver: &receiver, ..Along::default() };
        let raw = raw.ok_or(io::ErrorKind::Unsupported)?;
        socket::send(raw.as_fd(), &packet, &along, libc::MSG_DONTWAIT).map(drop)
    }
}

/// A listener of several with one name (`SO_REUSEPORT`), for which the kernel chooses among them by
/// chance: as long as this is there it prefers one of them.
struct Chosen<'a> {
    listener: BorrowedFd<'a>,
    processors: CpuSet,
}

impl<'a> Chosen<'a> {
    fn among_its_group(listener: BorrowedFd<'a>) -> io::Result<Option<Self>> {
        let level = libc::SOL_SOCKET;
        if options::number(listener, level, libc::SO_REUSEPORT)? == 0 {
            return Ok(None);
        }
        // The kernel prefers the one for the processor that it works on: where we send from.
        let this = Pid::from_raw(0);
        let chosen = Self { listener, processors: sched_getaffinity(this)? };
        let processor = sched_getcpu()?;
        let mut only = CpuSet::new();
        only.set(processor)?;
        sched_setaffinity(this, &only)?;
        let number = i32::try_from(processor).map_err(io::Error::other)?;
        options::set(listener, level, libc::SO_INCOMING_CPU, number)?;
        Ok(Some(chosen))
    }
}

impl Drop for Chosen<'_> {
    fn drop(&mut self) {
        let nobody = options::set(self.listener, libc::SOL_SOCKET, libc::SO_INCOMING_CPU, -1);
        let anywhere = sched_setaffinity(Pid::from_raw(0), &self.processors);
        if nobody.is_err() || anywhere.is_err() {
            tracing::warn!(?nobody, ?anywhere, "a listener prefers a processor");
        }
    }
}

/// Connections taken out of the queue of a listener. They are put back when this is dropped.
#[derive(Debug)]
pub(in super::super) struct Taken {
    listener: Option<OwnedFd>,
    door: Door,
    connections: Vec<(OwnedFd, WaitingConnection)>,
}

impl Taken {
    /// Accepts all that wait for a listener, unless they could not be put back.
    pub(super) fn from(listener: BorrowedFd<'_>, network: BorrowedFd<'_>) -> io::Result<Self> {
        let door = Door::to(network)?;
        let mut taken =
            Self { listener: Some(listener.try_clone_to_owned()?), door, connections: Vec::new() };
        while is_readable(listener)? {
            let fd = socket::accept(listener)?;
            let info = Info::of(fd.as_fd())?;
            // One that was reset meanwhile has nothing left to be told.
            if matches!(info.state, ESTABLISHED | SYN_RECEIVED | CLOSE_WAIT) {
                let waiting = waiting(fd.as_fd(), &info)?;
                taken.connections.push((fd, waiting));
            }
        }
        Ok(taken)
    }

    /// What was found.
    pub(super) fn waiting(&self) -> Vec<WaitingConnection> {
        self.connections.iter().map(|(_, waiting)| waiting.clone()).collect()
    }

    /// The listener will not be used again.
    pub(in super::super) fn seal(mut self) {
        self.listener = None;
    }
}

impl Drop for Taken {
    fn drop(&mut self) {
        let Some(listener) = self.listener.take() else { return };
        for (fd, waiting) in self.connections.drain(..) {
            // In repair mode, so nobody hears of it.
            drop(fd);
            if let Err(error) = self.door.put(listener.as_fd(), &waiting) {
                let client = waiting.connection.remote;
                tracing::error!(%error, %client, "a waiting TCP connection is lost");
            }
        }
    }
}

fn is_readable(fd: BorrowedFd<'_>) -> io::Result<bool> {
    let mut readable = [PollFd::new(fd, PollFlags::POLLIN)];
    Ok(poll(&mut readable, PollTimeout::ZERO)? > 0)
}

fn waiting(fd: BorrowedFd<'_>, info: &Info) -> io::Result<WaitingConnection> {
    let local = address::local(fd)?.ok_or(io::ErrorKind::NotConnected)?;
    let remote = address::remote(fd)?.ok_or(io::ErrorKind::NotConnected)?;
    set_repair(fd, REPAIR_ON)?;
    Ok(WaitingConnection { local, connection: connection(fd, info, remote)? })
}

/// `struct bpf_tcp_req_attrs`.
fn negotiated(waiting: &WaitingConnection) -> [u8; NEGOTIATED] {
    let tcp: &TcpConnection = &waiting.connection;
    let v4 = packet::on_the_wire(waiting.local.ip()).is_ipv4();
    // The smallest that the kernel takes; a client that accepts less gets it by path MTU.
    let least = if v4 { 536 } else { 1220 };
    let segment = u16::try_from(tcp.segment_size).unwrap_or(u16::MAX).max(least);
    let (sending, receiving) = tcp.window_scale.unwrap_or((0, 0));
    let mut bytes = [0; NEGOTIATED];
    // No timestamp of the client: the next one that comes is taken whatever it is. Then ours.
    bytes[4..8].copy_from_slice(&tcp.timestamp.unwrap_or(0).to_ne_bytes());
    bytes[8..10].copy_from_slice(&segment.to_ne_bytes());
    bytes[10] = receiving;
    bytes[11] = sending;
    bytes[13] = u8::from(tcp.window_scale.is_some());
    bytes[14] = u8::from(tcp.selective_acknowledgement);
    bytes[15] = u8::from(tcp.timestamp.is_some());
    bytes
}

/// One instruction: code, target and source register, offset, constant.
fn instruction(code: u8, target: u8, source: u8, offset: i16, constant: i32) -> u64 {
    let constant = u64::from(constant.cast_unsigned());
    let offset = u64::from(offset.cast_unsigned());
    u64::from(code) | u64::from(source << 4 | target) << 8 | offset << 16 | constant << 32
}

/// The program: for a packet with our mark it looks up the listener and what was negotiated, and
/// gives the packet a request of that listener. All other packets are dropped: what the new
/// connections acknowledge goes to clients that may not be there yet, and whoever is not there
/// answers with a reset.
fn program(negotiated: BorrowedFd<'_>, listener: BorrowedFd<'_>, assign: i32) -> Vec<u64> {
    const MOVE: u8 = 0xbf;
    const MOVE_CONSTANT: u8 = 0xb7;
    const ADD_CONSTANT: u8 = 0x07;
    const LOAD_WORD: u8 = 0x61;
    const STORE_WORD: u8 = 0x62;
    const LOAD_LONG: u8 = 0x18;
    const IF_EQUAL: u8 = 0x15;
    const UNLESS_EQUAL: u8 = 0x55;
    const CALL: u8 = 0x85;
    const EXIT: u8 = 0x95;
    const MAP: u8 = 1;
    const FUNCTION_OF_THE_KERNEL: u8 = 2;
    const LOOK_UP: i32 = 1;
    const RELEASE: i32 = 86;
    const AS_TCP: i32 = 137;
    /// Where the mark is in `struct __sk_buff`.
    const AT_MARK: i16 = 8;
    /// What a classifier returns to let the packet pass, or not.
    const PASS: i32 = -1;
    const DROP: i32 = 2;
    let plain = |code, target, source, constant| instruction(code, target, source, 0, constant);
    let look_up = |map: BorrowedFd<'_>| {
        [
            plain(LOAD_LONG, 1, MAP, map.as_raw_fd()),
            0,
            plain(MOVE, 2, 10, 0),
            plain(ADD_CONSTANT, 2, 0, -4),
            plain(CALL, 0, 0, LOOK_UP),
        ]
    };
    let mut program = vec![
        plain(MOVE, 6, 1, 0),
        instruction(LOAD_WORD, 1, 6, AT_MARK, 0),
        instruction(UNLESS_EQUAL, 1, 0, 27, MARK),
        instruction(STORE_WORD, 10, 0, -4, 0),
    ];
    program.extend(look_up(negotiated));
    program.extend([instruction(IF_EQUAL, 0, 0, 18, 0), plain(MOVE, 7, 0, 0)]);
    program.extend(look_up(listener));
    program.extend([
        instruction(IF_EQUAL, 0, 0, 11, 0),
        plain(MOVE, 8, 0, 0),
        plain(MOVE, 1, 8, 0),
        plain(CALL, 0, 0, AS_TCP),
        instruction(IF_EQUAL, 0, 0, 5, 0),
        plain(MOVE, 2, 0, 0),
        plain(MOVE, 1, 6, 0),
        plain(MOVE, 3, 7, 0),
        plain(MOVE_CONSTANT, 4, 0, NEGOTIATED as i32),
        plain(CALL, 0, FUNCTION_OF_THE_KERNEL, assign),
        plain(MOVE, 1, 8, 0),
        plain(CALL, 0, 0, RELEASE),
        plain(MOVE_CONSTANT, 0, 0, PASS),
        plain(EXIT, 0, 0, 0),
        plain(MOVE_CONSTANT, 0, 0, DROP),
        plain(EXIT, 0, 0, 0),
    ]);
    program
}
