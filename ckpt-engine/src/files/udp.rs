//! Sockets of UDP and its like, and raw sockets. What waits in UDP sockets is sent again inside
//! the VE's own network, as if it came from its senders.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

use ckpt_format::files::{Corked, Datagram, Kind, UdpSocket};

use super::{
    Source, address, corked,
    find::{Object, Refusal},
    multicast,
    options::{self, Family},
    packet,
    rebuild::RebuildError,
    socket::Network,
    waiting_error::{self, Waiting},
};
use crate::sys::{
    descriptor::{self, Count, count},
    socket::{self, Along},
};

/// What kind of socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Variety {
    pub(super) v6: bool,
    pub(super) raw: bool,
    pub(super) protocol: i32,
}

impl Variety {
    /// What waits can be read, and delivered again.
    fn has_queue(self) -> bool {
        !self.raw && matches!(self.protocol, libc::IPPROTO_UDP | libc::IPPROTO_UDPLITE)
    }
}

/// Refuses what never can be moved.
pub(super) fn check(object: &Object, network: &Network, variety: Variety) -> Result<(), Refusal> {
    network.groups().of_socket(object.fd(), variety.v6).map(drop)
}

/// Reads a socket. The second value makes its queue readable again.
pub(super) fn capture(
    source: &Source<'_>,
    object: &Object,
    network: &Network,
    variety: Variety,
) -> Result<(Kind, Option<Seen>), Refusal> {
    let fd = object.fd();
    let Variety { v6, raw, protocol } = variety;
    let local = address::local(fd)?;
    let Queue { datagrams: queue, error, error_taken } = match variety.has_queue() {
        true => Queue::read(fd)?,
        false => Queue::default(),
    };
    let corked = match variety.has_queue() && count(fd, Count::Outstanding)? > 0 {
        true => corked(source, object, variety)?,
        false => None,
    };
    let has_empty = queue.iter().any(|datagram| datagram.data.is_empty());
    let remote = address::remote(fd)?;
    let seen = match local {
        Some(local) if has_empty || error_taken => Some(Seen {
            socket: Some(fd.try_clone_to_owned()?),
            network: network.namespace()?,
            local,
            remote,
            protocol,
            has_empty,
            error: if error_taken { error } else { 0 },
        }),
        _ => None,
    };
    let kind = Kind::Udp(Box::new(UdpSocket {
        v6,
        raw,
        protocol,
        local,
        remote: match remote {
            // Without a port this is not told.
            None if raw => network.remote("raw", object)?,
            remote => remote,
        },
        queue,
        error,
        corked,
        groups: network.groups().of_socket(fd, v6)?,
        options: options::capture(fd, Family::Datagram { v6, protocol, raw })?,
    }));
    Ok((kind, seen))
}

/// What is written of a datagram that is not sent yet. One that waits for its receiver's address
/// looks the same from outside: on a host where neither can be read, it counts as that one unless
/// the socket says otherwise.
fn corked(
    source: &Source<'_>,
    object: &Object,
    variety: Variety,
) -> Result<Option<Corked>, Refusal> {
    corked::read(source, object, variety.v6).or_else(|error| {
        let corks = options::number(object.fd(), libc::SOL_UDP, libc::UDP_CORK)? != 0;
        if !corks && !corked::are_seen() {
            return Ok(None);
        }
        Err(Refusal::new(
            format!("a datagram that is written in several parts and not yet sent ({error})"),
            "try again when the program has sent it",
        ))
    })
}

/// A queue that is not as it was once somebody has looked ahead in it: the kernel shows empty
/// datagrams once only, and the error that waits before all others is taken. Unless the VE never
/// runs here again, all datagrams are taken out and delivered anew when this is dropped, and the
/// error is told again.
#[derive(Debug)]
pub(super) struct Seen {
    socket: Option<OwnedFd>,
    network: OwnedFd,
    local: SocketAddr,
    remote: Option<SocketAddr>,
    protocol: i32,
    has_empty: bool,
    error: i32,
}

impl Seen {
    /// The socket will not be used again.
    pub(super) fn seal(mut self) {
        self.socket = None;
    }

    fn renew(&self, socket: BorrowedFd<'_>) -> io::Result<()> {
        let queue = if self.has_empty { take_all(socket)? } else { Vec::new() };
        // On a thread of its own, because it stays in the VE's network.
        let work = || -> io::Result<()> {
            descriptor::enter(self.network.as_fd(), libc::CLONE_NEWNET)?;
            queue.iter().try_for_each(|datagram| deliver(self.local, self.protocol, datagram))?;
            tell_error(self.local, self.remote, self.protocol, self.error)
        };
        std::thread::scope(|scope| scope.spawn(work).join())
            .unwrap_or_else(|_| Err(io::Error::other("the thread in the VE's network panicked")))
    }
}

impl Drop for Seen {
    fn drop(&mut self) {
        if let Some(socket) = self.socket.take()
            && let Err(error) = self.renew(socket.as_fd())
        {
            tracing::warn!(%error, "datagrams of a VE are lost");
        }
    }
}

/// Takes out what waits.
fn take_all(socket: BorrowedFd<'_>) -> io::Result<Vec<Datagram>> {
    let mut buffer = vec![0; 1 << 16];
    let mut queue = Vec::new();
    loop {
        match take(socket, &mut buffer, libc::MSG_DONTWAIT) {
            Err(error) if error.raw_os_error() == Some(libc::ECONNREFUSED) => {}
            Err(error) if is_end(&error) => return Ok(queue),
            other => queue.push(other?),
        }
    }
}

fn take(fd: BorrowedFd<'_>, buffer: &mut [u8], flags: i32) -> io::Result<Datagram> {
    let received = socket::receive(fd, buffer, flags)?;
    let sender = address::decode_inet(&received.sender)?;
    Ok(Datagram { sender, data: buffer[..received.length].to_vec() })
}

/// What waits in a socket.
#[derive(Debug, Default)]
struct Queue {
    datagrams: Vec<Datagram>,
    /// The error that is told before them; 0 for none.
    error: i32,
    /// It had to be taken out to see them.
    error_taken: bool,
}

impl Queue {
    fn read(fd: BorrowedFd<'_>) -> io::Result<Self> {
        let peek = libc::MSG_PEEK | libc::MSG_DONTWAIT;
        // Most queues are empty, which one call tells: not a look ahead, which would hide an empty
        // datagram from the next one.
        let Waiting { error, readable } = waiting_error::waiting(fd)?;
        if !readable {
            return Ok(Self { error, ..Self::default() });
        }
        let before = options::number(fd, libc::SOL_SOCKET, libc::SO_PEEK_OFF)?;
        options::set(fd, libc::SOL_SOCKET, libc::SO_PEEK_OFF, 0)?;
        let mut buffer = vec![0; 1 << 16];
        let mut datagrams = Vec::new();
        let end = loop {
            match take(fd, &mut buffer, peek) {
                Ok(datagram) => datagrams.push(datagram),
                // The socket's own error: told once, before the first datagram.
                Err(told) if error != 0 && told.raw_os_error() == Some(error) => {}
                Err(error) => break error,
            }
        };
        options::set(fd, libc::SOL_SOCKET, libc::SO_PEEK_OFF, before)?;
        match is_end(&end) {
            true => Ok(Self { datagrams, error, error_taken: error != 0 }),
            false => Err(end),
        }
    }
}

fn is_end(error: &io::Error) -> bool {
    error.raw_os_error() == Some(libc::EAGAIN)
}

fn failed(source: io::Error) -> RebuildError {
    RebuildError::Kernel { object: "UDP socket", source }
}

pub(super) fn rebuild(udp: &UdpSocket) -> Result<OwnedFd, RebuildError> {
    make(udp).map_err(failed)
}

fn make(udp: &UdpSocket) -> io::Result<OwnedFd> {
    let domain = if udp.v6 { libc::AF_INET6 } else { libc::AF_INET };
    let kind = if udp.raw { libc::SOCK_RAW } else { libc::SOCK_DGRAM };
    let made = socket::socket(domain, kind, udp.protocol)?;
    let fd = made.as_fd();
    options::rebuild(fd, &udp.options)?;
    options::rebuild_buffers(fd, &udp.options)?;
    // The port of a raw socket is its protocol, and no name of its own.
    let local = udp.local.filter(|local| !udp.raw || !local.ip().is_unspecified());
    if let Some(local) = local {
        // A connect(2) without a bind(2) has chosen the address; then it is bound to nothing
        // by name, but the port must be the same.
        socket::bind(fd, &address::encode_inet(&local))?;
    }
    if let Some(remote) = udp.remote {
        socket::connect(fd, &address::encode_inet(&remote))?;
    }
    multicast::rebuild(fd, &udp.groups)?;
    Ok(made)
}

/// Delivers what waited, once all sockets have their names.
pub(super) fn fill(fd: BorrowedFd<'_>, udp: &UdpSocket) -> Result<(), RebuildError> {
    if let Some(corked) = &udp.corked {
        corked::write(fd, corked, udp).map_err(failed)?;
    }
    let Some(local) = udp.local else { return Ok(()) };
    if udp.queue.is_empty() && udp.error == 0 {
        return Ok(());
    }
    let device = udp
        .options
        .iter()
        .find(|option| (option.level, option.name) == (libc::SOL_SOCKET, libc::SO_BINDTODEVICE));
    let bind_to = |name: &[u8]| {
        socket::set_option(fd, libc::SOL_SOCKET, libc::SO_BINDTODEVICE, name).map_err(failed)
    };
    // Ours come in by the loopback device.
    if device.is_some() {
        bind_to(b"lo\0")?;
    }
    for datagram in &udp.queue {
        deliver(local, udp.protocol, datagram).map_err(failed)?;
    }
    tell_error(local, udp.remote, udp.protocol, udp.error).map_err(failed)?;
    device.map_or(Ok(()), |device| bind_to(&device.value))
}

/// The number of the protocol on the wire.
fn number(protocol: i32) -> u8 {
    if protocol == libc::IPPROTO_UDPLITE { packet::UDP_LITE } else { packet::UDP }
}

fn tell_error(
    local: SocketAddr,
    remote: Option<SocketAddr>,
    protocol: i32,
    error: i32,
) -> io::Result<()> {
    match error {
        0 => Ok(()),
        error => waiting_error::tell(local, remote, number(protocol), error),
    }
}

fn deliver(local: SocketAddr, protocol: i32, datagram: &Datagram) -> io::Result<()> {
    let from = packet::on_the_wire(datagram.sender.ip());
    let to = match packet::on_the_wire(local.ip()) {
        // Bound to all addresses: any own address of the sender's kind leads there.
        to if to.is_unspecified() => match from {
            IpAddr::V4(_) => IpAddr::V4(Ipv4Addr::LOCALHOST),
            IpAddr::V6(_) => IpAddr::V6(Ipv6Addr::LOCALHOST),
        },
        // It would go out to the others of the group, too.
        to if to.is_multicast() => {
            tracing::warn!(%local, "a waiting datagram for a group is lost");
            return Ok(());
        }
        to => to,
    };
    let mut bytes = datagram.sender.port().to_be_bytes().to_vec();
    bytes.extend(local.port().to_be_bytes());
    let length = u16::try_from(datagram.data.len() + 8).map_err(io::Error::other)?;
    // UDP-Lite says here how much its checksum covers: 0 is all.
    let lite = protocol == libc::IPPROTO_UDPLITE;
    bytes.extend(if lite { [0; 2] } else { length.to_be_bytes() });
    bytes.extend([0; 2]);
    bytes.extend(&datagram.data);
    let packet = packet::build(from, to, number(protocol), 6, bytes);
    let raw = packet::raw_socket(to)?;
    let receiver = address::encode_inet(&(to, 0).into());
    let along = Along { receiver: &receiver, ..Along::default() };
    match socket::send(raw.as_fd(), &packet, &along, libc::MSG_DONTWAIT) {
        // UDP may lose: a datagram that was larger than the loopback device takes is lost.
        Err(error) if error.raw_os_error() == Some(libc::EMSGSIZE) => {
            tracing::warn!(bytes = length, "a large waiting datagram is lost");
            Ok(())
        }
        other => other.map(drop),
    }
}
