//! Connections that are made before the processes that have them stop.

use std::{
    collections::HashMap,
    io::{Read, Write},
    net::{TcpListener, TcpStream},
    os::fd::{AsFd, AsRawFd, OwnedFd},
    time::Duration,
};

use ckpt_format::files::{File, Kind, TcpEnds};

use super::{
    super::{
        Target,
        options::{self, Family, Stage},
        testing::{Child, Copy, new_network, rebuild_in},
    },
    Early, Resting,
};
use crate::sys::{descriptor, socket};

const COUNT: usize = 40;
/// What becomes of some of them after they were told.
const TALKS: usize = 3;
const IS_CHANGED: usize = 4;

/// Both ends of connections, which move together.
struct Ends {
    listeners: [OwnedFd; 2],
    clients: Vec<TcpStream>,
    servers: Vec<TcpStream>,
}

impl Ends {
    fn new() -> Self {
        let listener = TcpListener::bind("127.0.0.1:7000").unwrap();
        // It wants its port alone.
        let strict = TcpListener::bind("127.0.0.1:7001").unwrap();
        options::set(strict.as_fd(), libc::SOL_SOCKET, libc::SO_REUSEADDR, 0).unwrap();
        let mut ends = Self {
            listeners: [OwnedFd::from(listener), strict.into()],
            clients: Vec::new(),
            servers: Vec::new(),
        };
        for number in 0..COUNT {
            let place = usize::from(number % 10 == 9);
            let listener = TcpListener::from(ends.listeners[place].try_clone().unwrap());
            let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
            let (server, _) = listener.accept().unwrap();
            client.set_nodelay(number % 3 == 1).unwrap();
            if number % 2 == 1 {
                options::set(server.as_fd(), libc::SOL_SOCKET, libc::SO_KEEPALIVE, 1).unwrap();
            }
            exchange(&client, &server, number as u8);
            server.set_nonblocking(number % 7 == 1).unwrap();
            ends.clients.push(client);
            ends.servers.push(server);
        }
        ends
    }

    fn fds(&self) -> Vec<std::os::fd::BorrowedFd<'_>> {
        let streams = self.clients.iter().chain(&self.servers).map(AsFd::as_fd);
        self.listeners.iter().map(AsFd::as_fd).chain(streams).collect()
    }
}

/// Says something in both directions.
fn exchange(client: &TcpStream, server: &TcpStream, byte: u8) {
    for (mut from, to) in [(client, server), (server, client)] {
        from.write_all(&[byte; 100]).unwrap();
        to.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        let (mut received, mut to) = ([0; 100], to);
        let mut read = 0;
        while read < 100 {
            match to.read(&mut received[read..]) {
                Ok(count) if count > 0 => read += count,
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {
                    assert!(is_nonblocking(to), "nothing is heard");
                }
                other => panic!("{other:?}"),
            }
        }
        assert_eq!(received, [byte; 100]);
    }
}

fn is_nonblocking(stream: &TcpStream) -> bool {
    let flags = descriptor::query(stream.as_fd(), descriptor::Query::GetFlags).unwrap();
    flags & libc::O_NONBLOCK != 0
}

/// Looks until all of them rest.
fn told(child: &Child) -> (Resting, Early, OwnedFd) {
    assert_eq!(super::super::check(&child.source()), []);
    let mut resting = Resting::default();
    let mut early = Early::default();
    let target = target_network();
    let mut count = 0;
    while count < 2 * COUNT {
        let told = resting.look(&child.source());
        count += told.rest.len();
        count -= told.wake.len();
        early.learn(told, 0, target.as_fd(), &[]);
    }
    assert_eq!(early.made().count(), 2 * COUNT);
    (resting, early, target)
}

/// A network as [`new_network`] makes it, which this thread is not in.
fn target_network() -> OwnedFd {
    let made = std::thread::spawn(|| {
        new_network();
        std::fs::File::open("/proc/thread-self/ns/net").unwrap().into()
    });
    made.join().unwrap()
}

fn inode(fd: std::os::fd::BorrowedFd<'_>) -> u64 {
    descriptor::status(fd).unwrap().inode
}

fn copied(copy: &Copy, streams: &[TcpStream]) -> Vec<TcpStream> {
    streams.iter().map(|it| copy.of(it.as_raw_fd()).into()).collect()
}

#[test]
fn what_rests_is_made_before_and_what_has_changed_is_made_anew() {
    new_network();
    let ends = Ends::new();
    let child = Child::holding(&ends.fds());
    let (mut resting, early, network) = told(&child);
    let before: HashMap<TcpEnds, u64> = early.made().map(|(ends, fd)| (ends, inode(fd))).collect();
    for (_, fd) in early.made() {
        let is_on = options::number(fd, libc::SOL_SOCKET, libc::SO_KEEPALIVE).unwrap();
        assert_eq!(is_on, 0, "it would ask a peer that cannot answer");
    }

    exchange(&ends.clients[TALKS], &ends.servers[TALKS], 0x55);
    options::set(ends.servers[IS_CHANGED].as_fd(), libc::IPPROTO_IP, libc::IP_TTL, 33).unwrap();
    let captured = child.capture_at_rest();
    // From here on nothing of it is in this network.
    let changes = resting.look(&child.source());
    assert_eq!(changes.rest, [], "in repair mode nothing rests");
    assert_eq!(changes.wake.len(), 2 * COUNT);

    let options_of = |streams: &[TcpStream]| -> Vec<_> {
        let family = Family::Tcp { v6: false, stage: Stage::Connected };
        streams.iter().map(|it| options::capture(it.as_fd(), family).unwrap()).collect()
    };
    crate::sys::namespace::join(network.as_fd(), libc::CLONE_NEWNET).unwrap();
    let mut target = Target::new(0).unwrap();
    target.early = early.into();
    let copy = rebuild_in(&captured, target);
    let (clients, servers) = (copied(&copy, &ends.clients), copied(&copy, &ends.servers));
    copy.rebuilt.release(false);

    let mut taken = 0;
    for (number, (client, server)) in clients.iter().zip(&servers).enumerate() {
        let (local, remote) = (server.local_addr().unwrap(), server.peer_addr().unwrap());
        let is_early = before[&TcpEnds { network: 0, local, remote }] == inode(server.as_fd());
        taken += usize::from(is_early);
        // The ports of those that a strict listener has given way to are 7001.
        let is_expected = ![TALKS, IS_CHANGED].contains(&number) && local.port() == 7000;
        assert_eq!(is_early, is_expected, "{number}");
        exchange(client, server, number as u8);
        assert_eq!(is_nonblocking(server), number % 7 == 1, "{number}");
    }
    assert_eq!(taken, COUNT - COUNT / 10 - 2);
    for (originals, copies) in [(&ends.clients, &clients), (&ends.servers, &servers)] {
        let (wanted, found) = (options_of(originals), options_of(copies));
        for (number, (mut wanted, mut found)) in wanted.into_iter().zip(found).enumerate() {
            // Repair mode has set it in the originals; the sizes of buffers follow what is said.
            let own = [libc::SO_REUSEADDR, libc::SO_RCVBUF, libc::SO_SNDBUF];
            for options in [&mut wanted, &mut found] {
                options.retain(|it| it.level != libc::SOL_SOCKET || !own.contains(&it.name));
            }
            assert_eq!(wanted, found, "{number}");
        }
    }
    // As those that were accepted by it.
    for server in &servers {
        let reuse = options::number(server.as_fd(), libc::SOL_SOCKET, libc::SO_REUSEADDR).unwrap();
        assert_eq!(reuse, i32::from(server.local_addr().unwrap().port() == 7000));
    }
}

#[test]
fn what_is_never_taken_is_closed_in_silence() {
    new_network();
    let ends = Ends::new();
    let child = Child::holding(&ends.fds());
    let (_, early, network) = told(&child);
    let address = ends.servers[0].local_addr().unwrap();
    crate::sys::namespace::join(network.as_fd(), libc::CLONE_NEWNET).unwrap();
    // Somebody at the other end would hear of it.
    let peer =
        socket::socket(libc::AF_INET, libc::SOCK_RAW | libc::SOCK_NONBLOCK, libc::IPPROTO_TCP);
    let peer = peer.unwrap();
    drop(early);
    let heard = socket::receive(peer.as_fd(), &mut [0; 100], 0);
    assert_eq!(heard.unwrap_err().kind(), std::io::ErrorKind::WouldBlock);
    // Nor is anything left of them.
    TcpListener::bind(address).unwrap();
}

#[test]
fn a_connection_is_known_by_its_ends() {
    new_network();
    let ends = Ends::new();
    let child = Child::holding(&ends.fds());
    let captured = child.capture_at_rest();
    let is_connection = |file: &&File| TcpEnds::of(file).is_some();
    let all: HashMap<_, _> =
        captured.files.files.iter().filter(is_connection).map(|it| (TcpEnds::of(it), it)).collect();
    assert_eq!(all.len(), 2 * COUNT);
    let is_tcp = |file: &&File| matches!(file.kind, Kind::Tcp(_));
    assert_eq!(captured.files.files.iter().filter(is_tcp).count(), 2 * COUNT + 2);
}
