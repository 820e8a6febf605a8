//! Connections that a program has closed and that still send.
//!
//! close(2) returns at once: what was written, and the end of it, the kernel sends by itself
//! (tcp(7)), to a slow client for minutes. No process has such a socket any more, so nobody can put
//! it into repair mode or peek into its queue; what it is like, and what waits in it, is read from
//! the kernel's own records. On the target it is made like every other connection, and closed when
//! it has been let go.
//!
//! One that has nothing left to send is not read: its peer has everything.

use std::{
    fs, io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV6},
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    sync::{Mutex, OnceLock, PoisonError},
};

use ckpt_format::files::{TcpClosing, TcpConnection, TcpSocket, TcpState};
use nix::time::{ClockId, clock_gettime};

use super::{
    super::pieces::{PIECES_MAX, Pieces, number, short, word},
    CLOSING, FIN_WAIT1, LAST_ACK,
};
use crate::{
    btf::Types,
    sys::{
        bpf::{
            self,
            code::{
                ADD, COPY, Code, EXIT, IF_EQUAL, LOAD, SET, STORE, STORE_REGISTER, UNLESS_EQUAL,
                helper,
            },
        },
        namespace::in_network_of,
    },
};

/// `TCPHDR_FIN`
const FIN: u8 = 1;

/// Where everything is in the running kernel: bytes from the beginning of a socket or of a piece.
#[derive(Clone, Copy, Debug)]
struct Places {
    socket: usize,
    family: usize,
    state: usize,
    number: usize,
    remote_port: usize,
    local4: usize,
    remote4: usize,
    local6: usize,
    remote6: usize,
    device: usize,
    /// What a program has of it.
    holder: usize,
    waiting: usize,
    sent: usize,
    unacknowledged: usize,
    next: usize,
    written: usize,
    received: usize,
    window: [usize; 5],
    /// Bits of what was negotiated.
    timestamps: usize,
    selective: usize,
    scales: usize,
    segment: usize,
    clock: usize,
    in_microseconds: Option<usize>,
    sequence: usize,
    flags: usize,
}

impl Places {
    fn find(types: &Types) -> io::Result<Self> {
        let at = |structure: &str, member: &str| {
            types.offset(structure, member).map(|offset| offset as usize)
        };
        let [common, sock] = ["sock_common", "sock"];
        let tcp = |member| at("tcp_sock", member);
        let negotiated = tcp("rx_opt")?;
        let bit = |member: &str| {
            Ok::<_, io::Error>(8 * negotiated + types.bit("tcp_options_received", member)? as usize)
        };
        let cb = at("sk_buff", "cb")?;
        Ok(Self {
            socket: types.size("tcp_sock")? as usize,
            family: at(common, "skc_family")?,
            state: at(common, "skc_state")?,
            number: at(common, "skc_num")?,
            remote_port: at(common, "skc_dport")?,
            local4: at(common, "skc_rcv_saddr")?,
            remote4: at(common, "skc_daddr")?,
            local6: at(common, "skc_v6_rcv_saddr")?,
            remote6: at(common, "skc_v6_daddr")?,
            device: at(common, "skc_bound_dev_if")?,
            holder: at(sock, "sk_socket")?,
            waiting: at(sock, "sk_write_queue")?,
            sent: at(sock, "tcp_rtx_queue")?,
            unacknowledged: tcp("snd_una")?,
            next: tcp("snd_nxt")?,
            written: tcp("write_seq")?,
            received: tcp("rcv_nxt")?,
            window: [
                tcp("snd_wl1")?,
                tcp("snd_wnd")?,
                tcp("max_window")?,
                tcp("rcv_wnd")?,
                tcp("rcv_wup")?,
            ],
            timestamps: bit("tstamp_ok")?,
            selective: bit("sack_ok")?,
            scales: bit("wscale_ok")?,
            segment: negotiated + at("tcp_options_received", "mss_clamp")?,
            clock: tcp("tsoffset")?,
            in_microseconds: types.bit("tcp_sock", "tcp_usec_ts").ok().map(|bit| bit as usize),
            sequence: cb + at("tcp_skb_cb", "seq")?,
            flags: cb + at("tcp_skb_cb", "tcp_flags")?,
        })
    }
}

/// Finds them and reads them.
struct Reader {
    pieces: Pieces,
    places: Places,
    /// Of the program that is shown connections.
    link: OwnedFd,
}

impl Reader {
    fn new() -> io::Result<Self> {
        let types = Types::read()?;
        let places = Places::find(&types)?;
        let pieces = Pieces::find(&types)?;
        let program = bpf::load_for_tasks(&program(&places), types.function("bpf_iter_tcp")?)?;
        let link = bpf::link_to_tasks(program.as_fd())?;
        Ok(Self { pieces, places, link })
    }
}

fn reader() -> Option<&'static Mutex<Reader>> {
    static READER: OnceLock<Option<Mutex<Reader>>> = OnceLock::new();
    let new = || match Reader::new() {
        Ok(reader) => Some(Mutex::new(reader)),
        Err(error) => {
            tracing::info!(%error, "what programs have closed and is still being sent is not seen");
            None
        }
    };
    READER.get_or_init(new).as_ref()
}

/// Finds out what takes long, before there is a hurry.
pub(in super::super) fn prepare() {
    reader();
}

/// The connections in a network that have no program any more and something to send.
pub(in super::super) fn orphans(network: BorrowedFd<'_>) -> io::Result<Vec<TcpSocket>> {
    if !are_any()? {
        return Ok(Vec::new());
    }
    let Some(reader) = reader() else {
        for what in super::unsent::still_sending(network)? {
            tracing::warn!(what, "a closed connection that still sends is lost in a move");
        }
        return Ok(Vec::new());
    };
    let reader = reader.lock().unwrap_or_else(PoisonError::into_inner);
    let found = in_network_of(network, || bpf::read_all(reader.link.as_fd()))?;
    found.chunks_exact(8).map(|address| reader.socket(number(address, 0))).collect()
}

/// Whether they can be read on this host.
pub(super) fn are_seen() -> bool {
    reader().is_some()
}

/// Whether there are any on the host: the kernel counts them (proc_pid_net(5), `sockstat`).
pub(super) fn are_any() -> io::Result<bool> {
    let text = fs::read_to_string("/proc/self/net/sockstat")?;
    let line = text.lines().find_map(|line| line.strip_prefix("TCP:"));
    let mut words = line.unwrap_or_default().split_whitespace();
    let count = words.find(|word| *word == "orphan").and_then(|_| words.next());
    Ok(count.is_none_or(|count| count != "0"))
}

impl Reader {
    fn socket(&self, address: u64) -> io::Result<TcpSocket> {
        let at = &self.places;
        let sock = &self.pieces.look.at(&[(address, at.socket)])?[0];
        let v6 = i32::from(short(sock, at.family)) == libc::AF_INET6;
        let closing = match sock[at.state] {
            FIN_WAIT1 => TcpClosing::ByUs,
            _ => TcpClosing::ByBoth,
        };
        let word = |place| word(sock, place);
        let bit = |place: usize| sock[place / 8] >> (place % 8) & 1 != 0;
        let [from, next, written] = [at.unacknowledged, at.next, at.written].map(word);
        let unacknowledged = self.queue(address, sock, from)?;
        // The last one is no byte, but our FIN.
        if unacknowledged.len() as u64 != u64::from(written.wrapping_sub(from).wrapping_sub(1)) {
            return Err(io::Error::other("a closed TCP connection that lacks a part of its queue"));
        }
        let scales = sock[at.scales / 8 + 1];
        let connection = TcpConnection {
            remote: self.end(sock, v6, [at.remote4, at.remote6], {
                u16::from_be(short(sock, at.remote_port))
            }),
            closing,
            quiet: false,
            unread: Vec::new(),
            receive_sequence: word(at.received),
            unsent: written.wrapping_sub(next).saturating_sub(1),
            unacknowledged,
            send_sequence: written,
            segment_size: short(sock, at.segment).into(),
            window_scale: bit(at.scales).then_some((scales & 15, scales >> 4)),
            selective_acknowledgement: bit(at.selective),
            timestamp: bit(at.timestamps).then(|| self.timestamp(sock)).transpose()?,
            window: at.window.map(word),
        };
        Ok(TcpSocket {
            v6,
            multipath: false,
            local: Some(self.end(sock, v6, [at.local4, at.local6], short(sock, at.number))),
            state: TcpState::Connected(Box::new(connection)),
            options: Vec::new(),
        })
    }

    fn end(&self, sock: &[u8], v6: bool, places: [usize; 2], port: u16) -> SocketAddr {
        let [v4_place, v6_place] = places;
        if !v6 {
            let address = Ipv4Addr::from_bits(u32::from_be(word(sock, v4_place)));
            return (IpAddr::V4(address), port).into();
        }
        let mut bytes = [0; 16];
        bytes.copy_from_slice(&sock[v6_place..v6_place + 16]);
        let address = Ipv6Addr::from(bytes);
        let device = word(sock, self.places.device);
        let scope = if address.is_unicast_link_local() { device } else { 0 };
        SocketAddrV6::new(address, port, 0, scope).into()
    }

    /// What `TCP_TIMESTAMP` would tell (net/ipv4/tcp.c, `do_tcp_getsockopt`).
    fn timestamp(&self, sock: &[u8]) -> io::Result<u32> {
        let at = &self.places;
        let now = clock_gettime(ClockId::CLOCK_MONOTONIC)?;
        let nanoseconds = now.tv_sec() as u64 * 1_000_000_000 + now.tv_nsec() as u64;
        let is_fine = at.in_microseconds.is_some_and(|bit| sock[bit / 8] >> (bit % 8) & 1 != 0);
        let ticks = nanoseconds / if is_fine { 1_000 } else { 1_000_000 };
        let told = (ticks as u32).wrapping_add(word(sock, at.clock));
        Ok(if is_fine { told | 1 } else { told & !1 })
    }

    /// The bytes from a sequence number on.
    fn queue(&self, address: u64, sock: &[u8], from: u32) -> io::Result<Vec<u8>> {
        let mut pieces = self.sent(number(sock, self.places.sent))?;
        let place = address + self.places.waiting as u64;
        pieces.extend(self.pieces.ring(place, number(sock, self.places.waiting))?);
        pieces.sort_unstable_by_key(|piece| self.sequence(piece).wrapping_sub(from).cast_signed());
        let mut bytes = Vec::new();
        let mut next = from;
        for piece in &pieces {
            let begin = self.sequence(piece);
            let read = self.pieces.bytes(piece)?;
            // The beginning of the first one can be acknowledged.
            let known = next.wrapping_sub(begin) as usize;
            let rest = read.get(known..).ok_or(io::ErrorKind::InvalidData)?;
            bytes.extend_from_slice(rest);
            let fin = u32::from(piece[self.places.flags] & FIN);
            next = begin.wrapping_add(read.len() as u32).wrapping_add(fin);
        }
        Ok(bytes)
    }

    fn sequence(&self, piece: &[u8]) -> u32 {
        word(piece, self.places.sequence)
    }

    /// What was sent and not acknowledged: a tree (include/linux/rbtree_types.h), whose nodes are
    /// the beginnings of pieces.
    fn sent(&self, root: u64) -> io::Result<Vec<Vec<u8>>> {
        let mut all = Vec::new();
        let mut coming = vec![root];
        coming.retain(|node| *node != 0);
        while !coming.is_empty() {
            let wanted: Vec<_> =
                coming.iter().map(|node| (*node, self.pieces.piece_len())).collect();
            let found = self.pieces.look.at(&wanted)?;
            coming = found.iter().flat_map(|node| [number(node, 8), number(node, 16)]).collect();
            coming.retain(|node| *node != 0);
            all.extend(found);
            if all.len() + coming.len() > PIECES_MAX {
                return Err(io::ErrorKind::InvalidData.into());
            }
        }
        Ok(all)
    }
}

/// Tells where the socket of each connection is that sends and has no program.
///
/// Registers: 6 the text to be written, 7 the socket.
fn program(places: &Places) -> Vec<u64> {
    const STATE: i16 = -8;
    const HOLDER: i16 = -16;
    const SELF: i16 = -24;
    let mut code = Code::default();
    code.add(LOAD, 7, 1, 8, 0).add(LOAD, 6, 1, 0, 0).add(LOAD, 6, 6, 0, 0);
    let no_socket = code.jump(IF_EQUAL, 7, 0);
    code.add(STORE, 10, 0, STATE, 0).add(STORE, 10, 0, HOLDER, 0);
    code.add(STORE_REGISTER, 10, 7, SELF, 0);
    code.stack(1, STATE).add(SET, 2, 0, 0, 1).add(COPY, 3, 7, 0, 0);
    code.add(ADD, 3, 0, 0, places.state as i32).call(helper::READ_KERNEL);
    code.add(LOAD, 1, 10, STATE, 0);
    let sends = [FIN_WAIT1, LAST_ACK, CLOSING].map(|it| code.jump(IF_EQUAL, 1, it.into()));
    code.add(SET, 0, 0, 0, 0).add(EXIT, 0, 0, 0, 0);
    sends.into_iter().for_each(|jump| {
        code.land(jump);
    });
    code.stack(1, HOLDER).add(SET, 2, 0, 0, 8).add(COPY, 3, 7, 0, 0);
    code.add(ADD, 3, 0, 0, places.holder as i32).call(helper::READ_KERNEL);
    code.add(LOAD, 1, 10, HOLDER, 0);
    let held = code.jump(UNLESS_EQUAL, 1, 0);
    code.add(COPY, 1, 6, 0, 0).stack(2, SELF).add(SET, 3, 0, 0, 8).call(helper::WRITE);
    code.land(no_socket).land(held);
    code.add(SET, 0, 0, 0, 0).add(EXIT, 0, 0, 0, 0);
    code.finish()
}
