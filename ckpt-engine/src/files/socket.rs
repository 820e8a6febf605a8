//! Sockets: which protocol they speak, and in which order they are made.

use std::{
    io,
    os::fd::{AsFd, OwnedFd},
    thread,
};

use ckpt_format::files::Kind;

use super::{
    capture::Capture,
    find::{Object, Refusal},
    multicast, netlink, options,
    rebuild::{Rebuild, RebuildError, set_status},
    tcp, udp, unix,
};
use crate::sys::{descriptor, socket};

/// The protocols whose sockets can be moved.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Protocol {
    Tcp { v6: bool },
    Udp { v6: bool },
    Unix { socket_type: i32 },
    Netlink { protocol: i32 },
}

/// The VE's network, and what it tells about sockets.
#[derive(Debug)]
pub(super) struct Network {
    /// `SO_NETNS_COOKIE` of the VE's network.
    cookie: u64,
    namespace: std::fs::File,
    unix: unix::Diagnosis,
    groups: multicast::Groups,
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
        let groups = multicast::Groups::of(host_pid)?;
        Ok(Self { cookie: cookie(diagnosis.as_fd())?, namespace, unix, groups })
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
        match (domain, kind, protocol) {
            (libc::AF_INET | libc::AF_INET6, libc::SOCK_STREAM, libc::IPPROTO_TCP) => {
                tcp::check(object)?;
                Ok(Protocol::Tcp { v6: domain == libc::AF_INET6 })
            }
            (libc::AF_INET | libc::AF_INET6, libc::SOCK_DGRAM, libc::IPPROTO_UDP) => {
                let v6 = domain == libc::AF_INET6;
                self.groups.check(object, v6)?;
                Ok(Protocol::Udp { v6 })
            }
            (libc::AF_NETLINK, _, protocol) => {
                netlink::check(protocol).map(|()| Protocol::Netlink { protocol })
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
        (libc::AF_PACKET, _) => "a packet socket (a sniffer, or a DHCP client)".to_owned(),
        (libc::AF_VSOCK, _) => "a socket to the hypervisor (vsock)".to_owned(),
        (libc::AF_ALG, _) => "a socket of the kernel's cryptography".to_owned(),
        (libc::AF_INET | libc::AF_INET6, libc::SOCK_RAW) => {
            format!("a raw socket of protocol {protocol} (such as ping)")
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
        Protocol::Tcp { v6 } => {
            let object = &capture.found.objects[place];
            let (kind, repaired) = tcp::capture(object, capture.source.init, v6)?;
            capture.undo.connections.extend(repaired);
            Ok(kind)
        }
        Protocol::Udp { v6 } => {
            let object = &capture.found.objects[place];
            let (kind, seen) = udp::capture(object, &capture.network, v6)?;
            capture.undo.datagrams.extend(seen);
            Ok(kind)
        }
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
        Protocol::Unix { .. } => unix::check(&capture.network.unix, &capture.found, object),
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
    for file in &rebuild.files.files {
        if let Kind::Udp(udp) = &file.kind {
            udp::fill(udp)?;
        }
    }
    unix::rebuild(rebuild)
}
