//! Datagrams that a program writes in parts (`UDP_CORK`, `MSG_MORE`) and has not sent.
//!
//! Nobody can read such a datagram before it is sent, so it is read from the kernel's own records:
//! what is written of it, and where it will go. On the target the same is written again, with
//! `MSG_MORE`.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV6},
    os::fd::BorrowedFd,
    sync::{Mutex, OnceLock, PoisonError},
};

use ckpt_format::files::{Corked, UdpSocket};

use super::{
    Source, address,
    find::Object,
    options,
    pieces::{Pieces, number, short, word},
};
use crate::{
    btf::Types,
    eye::Eye,
    sys::socket::{self, Along},
};

/// The header of UDP, which the first piece has room for.
const HEADER: u64 = 8;

/// Where everything is in a socket.
#[derive(Clone, Copy, Debug)]
struct Places {
    socket: usize,
    /// `AF_INET` or `AF_INET6`, if there is such a datagram.
    pending: usize,
    /// How long it is so far, with its header.
    len: usize,
    queue: usize,
    /// Options of IP that were given with it.
    options: [usize; 2],
    receivers: [usize; 2],
    ports: [usize; 2],
    device: usize,
}

struct Reader {
    pieces: Pieces,
    places: Places,
}

impl Reader {
    fn find() -> io::Result<Self> {
        let types = Types::read()?;
        // An IPv6 socket begins like one of IPv4.
        let at = |structure: &str, member: &str| {
            types.offset(structure, member).map(|offset| offset as usize)
        };
        let cork = |member: &str| at("inet_sock", &format!("cork.{member}"));
        let places = Places {
            socket: types.size("udp6_sock")? as usize,
            pending: at("udp_sock", "pending")?,
            len: at("udp_sock", "len")?,
            queue: at("sock", "sk_write_queue")?,
            options: [cork("base.opt")?, at("udp6_sock", "inet6.cork.opt")?],
            receivers: [cork("fl.u.ip4.daddr")?, cork("fl.u.ip6.daddr")?],
            ports: [cork("fl.u.ip4.uli.ports.dport")?, cork("fl.u.ip6.uli.ports.dport")?],
            device: cork("fl.u.__fl_common.flowic_oif")?,
        };
        Ok(Self { pieces: Pieces::find(&types)?, places })
    }

    /// What is written in the socket at this address.
    fn corked(&self, address: u64, v6: bool) -> io::Result<Option<Corked>> {
        let at = &self.places;
        let sock = &self.pieces.look.at(&[(address, at.socket)])?[0];
        let place = match word(sock, at.pending).cast_signed() {
            0 => return Ok(None),
            libc::AF_INET => 0,
            libc::AF_INET6 if v6 => 1,
            _ => return Err(io::ErrorKind::InvalidData.into()),
        };
        if number(sock, at.options[place]) != 0 {
            return Err(io::ErrorKind::Unsupported.into());
        }
        let first = number(sock, at.queue);
        let mut data = Vec::new();
        for (index, piece) in self.pieces.ring(address + at.queue as u64, first)?.iter().enumerate()
        {
            let before = self.pieces.before_transport(piece) + if index == 0 { HEADER } else { 0 };
            let bytes = self.pieces.bytes(piece)?;
            let own = usize::try_from(before).ok().and_then(|before| bytes.get(before..));
            data.extend_from_slice(own.ok_or(io::ErrorKind::InvalidData)?);
        }
        if data.len() as u64 + HEADER != u64::from(short(sock, at.len)) {
            return Err(io::ErrorKind::InvalidData.into());
        }
        let port = u16::from_be(short(sock, at.ports[place]));
        let address = at.receivers[place];
        let receiver = if place == 0 {
            let v4 = Ipv4Addr::from_bits(u32::from_be(word(sock, address)));
            // As an IPv6 socket calls it.
            let ip = if v6 { v4.to_ipv6_mapped().into() } else { IpAddr::V4(v4) };
            SocketAddr::new(ip, port)
        } else {
            let mut bytes = [0; 16];
            bytes.copy_from_slice(&sock[address..address + 16]);
            let ip = Ipv6Addr::from(bytes);
            let within_link = ip.is_unicast_link_local() || ip.octets()[..2] == [0xff, 0x02];
            let scope = if within_link { word(sock, at.device) } else { 0 };
            SocketAddrV6::new(ip, port, 0, scope).into()
        };
        Ok(Some(Corked { receiver, data }))
    }
}

fn reader() -> Option<&'static Mutex<Reader>> {
    static READER: OnceLock<Option<Mutex<Reader>>> = OnceLock::new();
    READER.get_or_init(|| Reader::find().map(Mutex::new).ok()).as_ref()
}

/// Whether such datagrams can be read on this host.
pub(super) fn are_seen() -> bool {
    reader().is_some()
}

/// What a program has written and not sent in a socket of UDP or UDP-Lite.
pub(super) fn read(source: &Source<'_>, object: &Object, v6: bool) -> io::Result<Option<Corked>> {
    let reader = reader().ok_or(io::ErrorKind::Unsupported)?;
    let &(place, fd) = object.holders.first().ok_or(io::ErrorKind::NotFound)?;
    let eye = Eye::on(source.processes[place].host_pid)?;
    let address = eye.socket(fd, object.status.inode)?;
    reader.lock().unwrap_or_else(PoisonError::into_inner).corked(address, v6)
}

/// Writes it again.
pub(super) fn write(fd: BorrowedFd<'_>, corked: &Corked, udp: &UdpSocket) -> io::Result<()> {
    options::make_room(fd, corked.data.len(), 0)?;
    let receiver = address::encode_inet(&corked.receiver);
    let along = Along { receiver: &receiver, ..Along::default() };
    let written = socket::send(fd, &corked.data, &along, libc::MSG_MORE | libc::MSG_DONTWAIT)?;
    if written != corked.data.len() {
        return Err(io::ErrorKind::WriteZero.into());
    }
    options::rebuild_buffers(fd, &udp.options)
}
