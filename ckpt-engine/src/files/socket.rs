//! Sockets: which protocol they speak, and in which order they are made.

use std::{
    collections::{BTreeMap, btree_map::Entry},
    io,
    net::SocketAddr,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    sync::{Arc, Mutex, PoisonError},
};

use ckpt_format::files::{File, Kind, SocketOption, TcpSocket, TcpState};

use super::{
    Source,
    capture::Capture,
    find::{Object, Refusal},
    frames, multicast, netlink, options,
    rebuild::{Rebuild, RebuildError, set_status},
    table, tcp, udp, unix,
};
use crate::{
    beside,
    sys::{descriptor, namespace::in_network_of, socket},
};

/// The protocols whose sockets can be moved.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Protocol {
    Tcp { v6: bool, multipath: bool },
    Datagram(udp::Variety),
    Packet,
    Unix { socket_type: i32 },
    Netlink { protocol: i32 },
}

/// One network of the VE, and what it tells about sockets.
#[derive(Debug)]
pub(super) struct Network {
    /// Its number in [`Namespaces`](ckpt_format::container::Namespaces).
    pub(super) number: u32,
    /// `SO_NETNS_COOKIE`.
    cookie: u64,
    namespace: OwnedFd,
    packet: frames::Entries,
    groups: multicast::Groups,
    netlink: netlink::Owned,
    diagnosis: OwnedFd,
    /// Which TCP listeners sign what they send, once somebody has asked; held by whoever asks.
    signatures: Mutex<Option<Arc<tcp::Signatures>>>,
}

impl Network {
    /// Reads a network, and the unix sockets in it.
    fn read(number: u32, namespace: OwnedFd) -> io::Result<(Self, unix::Diagnosis)> {
        let inside = || {
            const NETLINK_SOCK_DIAG: i32 = 4;
            let diagnosis = socket::socket(libc::AF_NETLINK, libc::SOCK_RAW, NETLINK_SOCK_DIAG)?;
            Ok((diagnosis, multicast::Groups::here()?, netlink::Owned::here()))
        };
        let (diagnosis, groups, netlink) = in_network_of(namespace.as_fd(), inside)?;
        let unix = unix::dump(diagnosis.as_fd())?;
        // A kernel without it has no packet sockets, or tells nothing about them.
        let packet = frames::dump(diagnosis.as_fd()).unwrap_or_default();
        let cookie = cookie(diagnosis.as_fd())?;
        let signatures = Mutex::default();
        Ok((
            Self { number, cookie, namespace, packet, groups, netlink, diagnosis, signatures },
            unix,
        ))
    }

    fn tables(&self, names: [&str; 2]) -> io::Result<[table::Table; 2]> {
        in_network_of(self.namespace.as_fd(), || {
            let read = |name| table::Table::read(&format!("/proc/thread-self/net/{name}"));
            // Without IPv6 the second one is not there.
            Ok([read(names[0])?, read(names[1]).unwrap_or_default()])
        })
    }

    /// The address that a socket is connected to, where getpeername(2) does not tell.
    pub(super) fn remote(&self, protocol: &str, object: &Object) -> io::Result<Option<SocketAddr>> {
        let tables = self.tables([protocol, &format!("{protocol}6")])?;
        let of_inode =
            |table: &table::Table| table.of_inode(object.status.inode).map(table::Line::remote);
        Ok(tables.iter().find_map(of_inode).flatten())
    }

    /// Whether a handshake with a listener at this address has begun and not ended.
    pub(super) fn is_handshaking(&self, local: &SocketAddr) -> io::Result<bool> {
        const SYN_RECEIVED: u8 = 3;
        // An IPv6 socket has IPv4 clients, too, which are listed with both.
        let tables = self.tables(["tcp", "tcp6"])?;
        Ok(tables.iter().flat_map(table::Table::lines).any(|line| {
            line.state() == Some(SYN_RECEIVED)
                && line.local().is_some_and(|found| found.port() == local.port())
        }))
    }

    /// The multicast groups that somebody in the network has joined.
    pub(super) fn groups(&self) -> &multicast::Groups {
        &self.groups
    }

    /// The keys with which TCP listeners sign.
    pub(super) fn signatures(&self) -> io::Result<Arc<tcp::Signatures>> {
        let mut known = self.signatures.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(signatures) = &*known {
            return Ok(signatures.clone());
        }
        let read = match tcp::Signatures::of_listeners(self.diagnosis.as_fd()) {
            // A kernel that has no such list.
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => {
                tracing::warn!("the kernel does not tell whether TCP sockets sign (INET_TCP_DIAG)");
                tcp::Signatures::default()
            }
            read => read?,
        };
        Ok(known.insert(Arc::new(read)).clone())
    }

    /// The keys with which a TCP connection signs.
    pub(super) fn signatures_of(&self, ends: tcp::Ends) -> io::Result<Vec<SocketOption>> {
        let _alone = self.signatures.lock().unwrap_or_else(PoisonError::into_inner);
        tcp::of_connection(self.diagnosis.as_fd(), ends)
    }

    /// The network itself.
    pub(super) fn namespace(&self) -> io::Result<OwnedFd> {
        self.namespace.try_clone()
    }
}

/// The networks of the VE.
#[derive(Debug)]
pub(super) struct Networks {
    /// The VE's own first.
    all: Vec<Network>,
    /// A unix socket may have its peer in another one.
    unix: unix::Diagnosis,
}

impl Networks {
    pub(super) fn of(source: &Source<'_>) -> io::Result<Self> {
        let namespaces = namespaces(source.init, &source.networks)?;
        let (mut all, mut unix) = (Vec::new(), unix::Diagnosis::default());
        for (number, namespace) in (0..).zip(namespaces) {
            let (network, sockets) = Network::read(number, namespace)?;
            all.push(network);
            unix.add(sockets);
        }
        Ok(Self { all, unix })
    }

    /// The connections that no process has any more and that still send, each with the number of
    /// its network.
    pub(super) fn orphans(&self) -> io::Result<Vec<(u32, TcpSocket)>> {
        let mut all = Vec::new();
        for network in &self.all {
            for mut orphan in tcp::orphans(network.namespace.as_fd())? {
                if let (Some(local), TcpState::Connected(tcp)) = (orphan.local, &orphan.state) {
                    let ends = tcp::Ends { local, remote: tcp.remote, device: 0, inode: 0 };
                    orphan.options.extend(network.signatures_of(ends)?);
                }
                all.push((network.number, orphan));
            }
        }
        Ok(all)
    }

    /// The unix sockets of all networks.
    pub(super) fn unix(&self) -> &unix::Diagnosis {
        &self.unix
    }

    /// The network that a socket belongs to.
    pub(super) fn of_socket(&self, object: &Object) -> Result<&Network, Refusal> {
        let cookie = cookie(object.fd())?;
        self.all.iter().find(|network| network.cookie == cookie).ok_or_else(|| {
            Refusal::new(
                "a socket of another network than the VE's",
                "end the program, or the command that was started from the host with it",
            )
        })
    }

    /// The network behind a descriptor of its namespace.
    pub(super) fn of_namespace(&self, namespace: BorrowedFd<'_>) -> Result<&Network, Refusal> {
        let wanted = descriptor::status(namespace)?.inode;
        let is = |network: &&Network| {
            let status = descriptor::status(network.namespace.as_fd());
            status.is_ok_and(|status| status.inode == wanted)
        };
        self.all.iter().find(is).ok_or_else(|| {
            Refusal::new(
                "a file of /dev/net/tun of another network than the VE's",
                "end the program, or the command that was started from the host with it",
            )
        })
    }

    /// Which protocol a socket speaks, when it is one that can be moved.
    pub(super) fn protocol(
        &self,
        source: &Source<'_>,
        object: &Object,
        network: &Network,
    ) -> Result<Protocol, Refusal> {
        let fd = object.fd();
        let number = |name| options::number(fd, libc::SOL_SOCKET, name);
        let (domain, kind) = (number(libc::SO_DOMAIN)?, number(libc::SO_TYPE)?);
        let protocol = number(libc::SO_PROTOCOL)?;
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
                udp::check(object, network, variety)?;
                Ok(Protocol::Datagram(variety))
            }
            (libc::AF_PACKET, ..) => {
                frames::check(source, object, &network.packet).map(|()| Protocol::Packet)
            }
            (libc::AF_NETLINK, _, protocol) => {
                netlink::check(object, protocol, &network.netlink)?;
                Ok(Protocol::Netlink { protocol })
            }
            (libc::AF_UNIX, socket_type, _) => Ok(Protocol::Unix { socket_type }),
            _ => Err(unknown(domain, kind, protocol)),
        }
    }
}

/// All networks of a VE with this first process, whose own is the first.
fn namespaces(init: i32, others: &[BorrowedFd<'_>]) -> io::Result<Vec<OwnedFd>> {
    let own = std::fs::File::open(format!("/proc/{init}/ns/net"))?;
    let others = others.iter().map(|other| other.try_clone_to_owned());
    std::iter::once(Ok(OwnedFd::from(own))).chain(others).collect()
}

/// What a VE with these networks still sends of connections that no process has any more, in words:
/// where the kernel lets nobody read it, a move loses it.
pub fn unsent(init: i32, networks: &[BorrowedFd<'_>]) -> io::Result<Vec<String>> {
    let mut all = Vec::new();
    for network in namespaces(init, networks)? {
        all.extend(tcp::unsent(network.as_fd())?);
    }
    Ok(all)
}

/// The cookie of each network of the VE, its own first.
pub(super) fn cookies(source: &Source<'_>) -> io::Result<Vec<u64>> {
    let own = OwnedFd::from(std::fs::File::open(format!("/proc/{}/ns/net", source.init))?);
    let all = std::iter::once(own.as_fd()).chain(source.networks.iter().copied());
    let fresh = || socket::socket(libc::AF_UNIX, libc::SOCK_STREAM, 0);
    all.map(|network| cookie(in_network_of(network, fresh)?.as_fd())).collect()
}

pub(super) fn cookie(fd: BorrowedFd<'_>) -> io::Result<u64> {
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
            let network = capture.networks.of_socket(object)?;
            let (kind, held) = tcp::capture(object, network, v6, multipath, None)?;
            capture.undo.hold(held);
            Ok(kind)
        }
        Protocol::Datagram(variety) => {
            let object = &capture.found.objects[place];
            let network = capture.networks.of_socket(object)?;
            let (kind, seen) = udp::capture(capture.source, object, network, variety)?;
            capture.undo.datagrams.extend(seen);
            Ok(kind)
        }
        Protocol::Packet => {
            let object = &capture.found.objects[place];
            let network = capture.networks.of_socket(object)?;
            frames::capture(capture.source, object, &network.packet)
        }
        Protocol::Netlink { protocol } => {
            netlink::capture(capture.source, &capture.found.objects[place], protocol)
        }
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
            match unix::check(capture.networks.unix(), &capture.found, object) {
                // It may be in a queue, which is not read before the VE stands still.
                Err(_) if capture.found.any_in_flight() => Ok(()),
                other => other,
            }
        }
        _ => Ok(()),
    }
}

/// Makes all sockets.
pub(super) fn rebuild(rebuild: &mut Rebuild<'_>) -> Result<(), RebuildError> {
    let failed = |source: io::Error| RebuildError::Kernel { object: "socket", source };
    let files = rebuild.files;
    for (place, file) in files.files.iter().enumerate() {
        if let Kind::Packet(packet) = &file.kind
            && packet.rings().next().is_some()
        {
            rebuild.enter_network(file.network)?;
            rebuild.made[place] = Some(frames::make(packet)?);
        }
    }
    for (place, file) in files.files.iter().enumerate() {
        if has_connection(&file.kind) {
            continue;
        }
        if matches!(file.kind, Kind::Tcp(_) | Kind::Udp(_) | Kind::Packet(_) | Kind::Netlink(_)) {
            rebuild.enter_network(file.network)?;
        }
        let fd = match &file.kind {
            Kind::Tcp(tcp) => bind(rebuild, tcp)?,
            Kind::Udp(udp) => udp::rebuild(udp)?,
            Kind::Packet(packet) => {
                let made = match rebuild.made[place].take() {
                    Some(made) => made,
                    None => frames::make(packet)?,
                };
                frames::complete(made.as_fd(), packet)?;
                made
            }
            Kind::Netlink(netlink) => netlink::rebuild(netlink)?,
            _ => continue,
        };
        set_status(fd.as_fd(), file.flags).map_err(failed)?;
        rebuild.made[place] = Some(fd);
    }
    // Connections come after listeners, whose ports they share.
    connect(rebuild)?;
    wait(rebuild)?;
    for (place, file) in files.files.iter().enumerate() {
        let Kind::Udp(udp) = &file.kind else { continue };
        rebuild.enter_network(file.network)?;
        if let Some(fd) = &rebuild.made[place] {
            udp::fill(fd.as_fd(), udp)?;
        }
    }
    unix::rebuild(rebuild)
}

/// Makes a TCP socket up to its name. One that wants its port alone gets it before the connections
/// that share the port with it.
fn bind(rebuild: &mut Rebuild<'_>, tcp: &TcpSocket) -> Result<OwnedFd, RebuildError> {
    match tcp::bind(tcp) {
        Err(RebuildError::Kernel { source, .. })
            if source.kind() == io::ErrorKind::AddrInUse
                && tcp.local.is_some_and(|it| rebuild.early.give_way(it.port())) =>
        {
            tcp::bind(tcp)
        }
        other => other,
    }
}

/// Whether it is a TCP socket that is made in one go, whatever others there are.
fn has_connection(kind: &Kind) -> bool {
    matches!(kind, Kind::Tcp(tcp) if matches!(tcp.state, TcpState::Connected(_)))
}

/// A connection to be made.
struct Wanted<'a> {
    place: usize,
    file: &'a File,
    tcp: &'a TcpSocket,
    /// What is there already.
    early: Option<tcp::Made>,
}

/// Makes the connections: of one network after the other, those of each beside each other.
fn connect(rebuild: &mut Rebuild<'_>) -> Result<(), RebuildError> {
    let files = rebuild.files;
    let mut apart: BTreeMap<u32, Vec<Wanted<'_>>> = BTreeMap::new();
    for (place, file) in files.files.iter().enumerate() {
        let Kind::Tcp(tcp) = &file.kind else { continue };
        if has_connection(&file.kind) {
            let early = rebuild.early.take(file);
            apart.entry(file.network).or_default().push(Wanted { place, file, tcp, early });
            continue;
        }
        rebuild.enter_network(file.network)?;
        if let Some(fd) = &rebuild.made[place] {
            let connection = tcp::connect(fd.as_fd(), tcp)?;
            rebuild.connections.extend(connection.map(|it| (place, it)));
        }
    }
    // Others may have the ends of those that are gone: somebody who waits to be accepted.
    rebuild.early = tcp::Early::default();
    let mut early = 0;
    for (network, sockets) in apart {
        rebuild.enter_network(network)?;
        early += connect_in(rebuild, sockets)?;
    }
    tracing::info!("{early} TCP connections of a VE were there before it stopped");
    Ok(())
}

/// Those of the network that the thread is in. Tells how many were there already.
fn connect_in(rebuild: &mut Rebuild<'_>, wanted: Vec<Wanted<'_>>) -> Result<usize, RebuildError> {
    let complete = |wanted: &Wanted<'_>| match &wanted.early {
        Some(early) if early.is_still(wanted.file) => {
            tcp::complete(early.fd(), wanted.tcp).map(Some)
        }
        _ => Ok(None),
    };
    let completed = beside::each(&wanted, complete);
    let mut anew = Vec::new();
    let mut early = 0;
    for (wanted, completed) in wanted.into_iter().zip(completed) {
        let made = wanted.early.map(tcp::Made::into_parts);
        // Of one that is not as it was the place is free from here on.
        let (fd, told) = made.unzip();
        rebuild.spent.extend(told);
        match completed? {
            Some(connection) => {
                rebuild.made[wanted.place] = fd;
                rebuild.connections.push((wanted.place, connection));
                early += 1;
            }
            None => anew.push((wanted.place, wanted.file.flags, wanted.tcp)),
        }
    }
    if anew.is_empty() {
        return Ok(early);
    }
    let usual = tcp::Usual::here()?;
    let made = beside::each(&anew, |(_, flags, tcp)| tcp::make(tcp, *flags, &usual));
    for ((place, ..), made) in anew.into_iter().zip(made) {
        let (fd, connection) = made?;
        rebuild.made[place] = Some(fd);
        rebuild.connections.extend(connection.map(|it| (place, it)));
    }
    Ok(early)
}

/// Lets connections wait for their listeners, as on the source.
fn wait(rebuild: &mut Rebuild<'_>) -> Result<(), RebuildError> {
    let failed = |source| RebuildError::Kernel { object: "waiting TCP connection", source };
    // One for each network.
    let mut doors = BTreeMap::new();
    let files = rebuild.files;
    for (place, file) in files.files.iter().enumerate() {
        let Kind::Tcp(tcp) = &file.kind else { continue };
        let TcpState::Listening { waiting, .. } = &tcp.state else { continue };
        if waiting.is_empty() {
            continue;
        }
        rebuild.enter_network(file.network)?;
        let door = match doors.entry(file.network) {
            Entry::Occupied(door) => door.into_mut(),
            Entry::Vacant(place) => place.insert(tcp::Door::here().map_err(failed)?),
        };
        let Some(listener) = &rebuild.made[place] else { continue };
        for waiting in waiting {
            door.put(listener.as_fd(), waiting).map_err(failed)?;
        }
    }
    Ok(())
}
