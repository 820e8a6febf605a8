//! Sockets: which protocol they speak, and in which order they are made.

use std::{
    io,
    net::SocketAddr,
    os::fd::{AsFd, OwnedFd},
    thread,
};

use ckpt_format::files::{Kind, TcpState};

use super::{
    capture::Capture,
    find::{Object, Refusal},
    frames, multicast, netlink, options,
    rebuild::{Rebuild, RebuildError, set_status},
    table, tcp, udp, unix,
};
use crate::sys::{descriptor, socket};

/// The protocols whose sockets can be moved.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Protocol {
    Tcp { v6: bool, multipath: bool },
    Datagram(udp::Variety),
    Packet,
    Unix { socket_type: i32 },
    Netlink { protocol: i32 },
}

/// The VE's network, and what it tells about sockets.
#[derive(Debug)]
pub(super) struct Network {
    /// A process in it.
    host_pid: i32,
    /// `SO_NETNS_COOKIE` of the VE's network.
    cookie: u64,
    namespace: std::fs::File,
    unix: unix::Diagnosis,
    packet: frames::Entries,
    groups: multicast::Groups,
    netlink: netlink::Owned,
}

impl Network {
    /// The network of a process.
    pub(super) fn of(host_pid: i32) -> io::Result<Self> {
        let namespace = std::fs::File::open(format!("/proc/{host_pid}/ns/net"))?;
        // A thread of its own, because it stays in that network.
        let work = || -> io::Result<OwnedFd> {
            descriptor::enter(namespace.as_fd(), libc::CLONE_NEWNET)?;
            const NETLINK_SOCK_DIAG: i32 = 4;
            socket::socket(libc::AF_NETLINK, libc::SOCK_RAW, NETLINK_SOCK_DIAG)
        };
        let diagnosis = thread::scope(|scope| scope.spawn(work).join())
            .unwrap_or_else(|_| Err(io::Error::other("the thread in the VE's network panicked")))?;
        let unix = unix::dump(diagnosis.as_fd())?;
        // A kernel without it has no packet sockets, or tells nothing about them.
        let packet = frames::dump(diagnosis.as_fd()).unwrap_or_default();
        Ok(Self {
            host_pid,
            cookie: cookie(diagnosis.as_fd())?,
            namespace,
            unix,
            packet,
            groups: multicast::Groups::of(host_pid)?,
            netlink: netlink::Owned::of(host_pid),
        })
    }

    fn table(&self, protocol: &str, v6: bool) -> io::Result<table::Table> {
        let six = if v6 { "6" } else { "" };
        table::Table::read(&format!("/proc/{}/net/{protocol}{six}", self.host_pid))
    }

    /// The address that a socket is connected to, where getpeername(2) does not tell.
    pub(super) fn remote(
        &self,
        protocol: &str,
        v6: bool,
        object: &Object,
    ) -> io::Result<Option<SocketAddr>> {
        let table = self.table(protocol, v6)?;
        Ok(table.of_inode(object.status.inode).and_then(|line| line.remote()))
    }

    /// Whether a handshake with a listener at this address has begun and not ended.
    pub(super) fn is_handshaking(&self, local: &SocketAddr) -> io::Result<bool> {
        const SYN_RECEIVED: u8 = 3;
        // An IPv6 socket has IPv4 clients, too, which are listed with both.
        let lists = [self.table("tcp", false)?, self.table("tcp", true).unwrap_or_default()];
        Ok(lists.iter().flat_map(table::Table::lines).any(|line| {
            line.state() == Some(SYN_RECEIVED)
                && line.local().is_some_and(|found| found.port() == local.port())
        }))
    }

    /// The multicast groups that somebody in the network has joined.
    pub(super) fn groups(&self) -> &multicast::Groups {
        &self.groups
    }

    /// The network itself.
    pub(super) fn namespace(&self) -> io::Result<OwnedFd> {
        self.namespace.as_fd().try_clone_to_owned()
    }

    /// The unix sockets of the network.
    pub(super) fn unix(&self) -> &unix::Diagnosis {
        &self.unix
    }

    /// Which protocol a socket speaks, when it is one that can be moved.
    pub(super) fn protocol(&self, object: &Object) -> Result<Protocol, Refusal> {
        let fd = object.fd();
        let number = |name| options::number(fd, libc::SOL_SOCKET, name);
        let (domain, kind) = (number(libc::SO_DOMAIN)?, number(libc::SO_TYPE)?);
        let protocol = number(libc::SO_PROTOCOL)?;
        if domain != libc::AF_UNIX && cookie(fd)? != self.cookie {
            return Err(Refusal::new(
                "a socket of another network than the VE's",
                "end the program, or the command that was started from the host with it",
            ));
        }
        let v6 = domain == libc::AF_INET6;
        match (domain, kind, protocol) {
            (libc::AF_INET | libc::AF_INET6, libc::SOCK_STREAM, libc::IPPROTO_TCP) => {
                tcp::check(object)?;
                Ok(Protocol::Tcp { v6, multipath: false })
            }
            (libc::AF_INET | libc::AF_INET6, libc::SOCK_STREAM, libc::IPPROTO_MPTCP) => {
                tcp::check_multipath(object)?;
                Ok(Protocol::Tcp { v6, multipath: true })
            }
            (libc::AF_INET | libc::AF_INET6, libc::SOCK_DGRAM | libc::SOCK_RAW, _) => {
                let variety = udp::Variety { v6, raw: kind == libc::SOCK_RAW, protocol };
                udp::check(object, self, variety)?;
                Ok(Protocol::Datagram(variety))
            }
            (libc::AF_PACKET, ..) => frames::check(object, &self.packet).map(|()| Protocol::Packet),
            (libc::AF_NETLINK, _, protocol) => {
                netlink::check(object, protocol, &self.netlink)?;
                Ok(Protocol::Netlink { protocol })
            }
            (libc::AF_UNIX, socket_type, _) => Ok(Protocol::Unix { socket_type }),
            _ => Err(unknown(domain, kind, protocol)),
        }
    }
}

fn cookie(fd: std::os::fd::BorrowedFd<'_>) -> io::Result<u64> {
    const SO_NETNS_COOKIE: i32 = 71;
    let mut cookie = [0; 8];
    socket::option(fd, libc::SOL_SOCKET, SO_NETNS_COOKIE, &mut cookie)?;
    Ok(u64::from_ne_bytes(cookie))
}

fn unknown(domain: i32, kind: i32, protocol: i32) -> Refusal {
    let what = match (domain, kind) {
        (libc::AF_VSOCK, _) => "a socket to the hypervisor (vsock)".to_owned(),
        (libc::AF_ALG, _) => "a socket of the kernel's cryptography".to_owned(),
        (libc::AF_XDP, _) => "a socket for frames that go past the kernel (XDP)".to_owned(),
        (libc::AF_KEY, _) => "a socket for IPsec keys".to_owned(),
        (libc::AF_INET | libc::AF_INET6, _) if protocol == libc::IPPROTO_SCTP => {
            "an SCTP socket".to_owned()
        }
        _ => format!("a socket of family {domain}, type {kind}, protocol {protocol}"),
    };
    Refusal::new(what, "end the program")
}

/// Whether it is a TCP socket, in whatever network.
pub(super) fn is_tcp(object: &Object) -> bool {
    let is = |name, value| {
        options::number(object.fd(), libc::SOL_SOCKET, name).is_ok_and(|found| found == value)
    };
    object.file_type() == libc::S_IFSOCK
        && (is(libc::SO_DOMAIN, libc::AF_INET) || is(libc::SO_DOMAIN, libc::AF_INET6))
        && is(libc::SO_PROTOCOL, libc::IPPROTO_TCP)
}

pub(super) fn capture(
    capture: &mut Capture<'_>,
    place: usize,
    protocol: Protocol,
) -> Result<Kind, Refusal> {
    match protocol {
        Protocol::Tcp { v6, multipath } => {
            let object = &capture.found.objects[place];
            let (kind, held) = tcp::capture(object, &capture.network, v6, multipath)?;
            match held {
                tcp::Held::Nothing => {}
                tcp::Held::Connection(repaired) => capture.undo.connections.push(repaired),
                tcp::Held::Queue(taken) => capture.undo.queues.push(taken),
            }
            Ok(kind)
        }
        Protocol::Datagram(variety) => {
            let object = &capture.found.objects[place];
            let (kind, seen) = udp::capture(object, &capture.network, variety)?;
            capture.undo.datagrams.extend(seen);
            Ok(kind)
        }
        Protocol::Packet => frames::capture(&capture.found.objects[place], &capture.network.packet),
        Protocol::Netlink { protocol } => netlink::capture(&capture.found.objects[place], protocol),
        Protocol::Unix { socket_type } => unix::capture(capture, place, socket_type),
    }
}

/// Refuses a socket whose peer is outside the VE.
pub(super) fn check_peer(
    capture: &Capture<'_>,
    object: &Object,
    protocol: Protocol,
) -> Result<(), Refusal> {
    match protocol {
        Protocol::Unix { .. } => {
            let in_flight = |object: &Object| {
                let info = object.info();
                info.and_then(|info| info.number("scm_fds", 10)).is_ok_and(|count| count > 0)
            };
            match unix::check(&capture.network.unix, &capture.found, object) {
                // It may be in a queue, which is not read before the VE stands still.
                Err(_) if capture.found.objects.iter().any(in_flight) => Ok(()),
                other => other,
            }
        }
        _ => Ok(()),
    }
}

/// Makes all sockets.
pub(super) fn rebuild(rebuild: &mut Rebuild<'_>) -> Result<(), RebuildError> {
    let failed = |source: io::Error| RebuildError::Kernel { object: "socket", source };
    for (place, file) in rebuild.files.files.iter().enumerate() {
        let fd = match &file.kind {
            Kind::Tcp(tcp) => tcp::bind(tcp)?,
            Kind::Udp(udp) => udp::rebuild(udp)?,
            Kind::Packet(packet) => frames::rebuild(packet)?,
            Kind::Netlink(netlink) => netlink::rebuild(netlink)?,
            _ => continue,
        };
        set_status(fd.as_fd(), file.flags).map_err(failed)?;
        rebuild.made[place] = Some(fd);
    }
    // Connections come after listeners, whose ports they share.
    for (place, file) in rebuild.files.files.iter().enumerate() {
        let (Kind::Tcp(tcp), Some(fd)) = (&file.kind, &rebuild.made[place]) else { continue };
        rebuild.connections.extend(tcp::connect(fd.as_fd(), tcp)?);
    }
    wait(rebuild)?;
    for (place, file) in rebuild.files.files.iter().enumerate() {
        if let (Kind::Udp(udp), Some(fd)) = (&file.kind, &rebuild.made[place]) {
            udp::fill(fd.as_fd(), udp)?;
        }
    }
    unix::rebuild(rebuild)
}

/// Lets connections wait for their listeners, as on the source.
fn wait(rebuild: &Rebuild<'_>) -> Result<(), RebuildError> {
    let failed = |source| RebuildError::Kernel { object: "waiting TCP connection", source };
    let mut door = None;
    for (file, made) in rebuild.files.files.iter().zip(&rebuild.made) {
        let (Kind::Tcp(tcp), Some(listener)) = (&file.kind, made) else { continue };
        let TcpState::Listening { waiting, .. } = &tcp.state else { continue };
        for waiting in waiting {
            let door = match &mut door {
                Some(door) => door,
                None => door.insert(tcp::Door::here().map_err(failed)?),
            };
            door.put(listener.as_fd(), waiting).map_err(failed)?;
        }
    }
    Ok(())
}
