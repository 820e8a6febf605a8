//! Many connections, most of them alike.

use std::{
    fs,
    io::{Read, Write},
    net::{Shutdown, TcpListener, TcpStream},
    os::fd::{AsFd, AsRawFd},
    time::{Duration, Instant},
};

use ckpt_format::files::{File, FileId, Kind, SocketOption, TcpState};
use nix::fcntl::{FcntlArg, FdFlag, fcntl};

use super::{
    super::{
        options::{self, Family, Stage},
        testing::{Child, new_network},
    },
    capture::{Info, QUIET_MS},
    tests::{move_over, pattern, stream},
    told::REST_US,
};
use crate::{
    files::Captured,
    sys::descriptor::{self, Change},
};

/// What a new socket is set to, by its number: several kinds, so that neighbours differ.
fn change(server: &TcpStream, number: usize) {
    let set = |level, name| options::set(server.as_fd(), level, name, 1).unwrap();
    if number % 2 == 1 {
        set(libc::SOL_SOCKET, libc::SO_KEEPALIVE);
    }
    if number % 3 == 1 {
        set(libc::IPPROTO_TCP, libc::TCP_NODELAY);
    }
    if number % 7 == 1 {
        options::set(server.as_fd(), libc::IPPROTO_IP, libc::IP_TOS, 16).unwrap();
    }
    if number == 5 {
        let filter = [6, 0, 0, 0, 0xff, 0xff, 0, 0];
        crate::sys::socket::attach_filter(server.as_fd(), &filter).unwrap();
    }
    if number % 5 == 1 {
        fcntl(server, FcntlArg::F_SETFD(FdFlag::empty())).unwrap();
    }
}

fn options_of(file: &File) -> &[SocketOption] {
    let Kind::Tcp(tcp) = &file.kind else { panic!("{file:?} is no TCP socket") };
    &tcp.options
}

#[test]
fn each_has_its_own_options_and_flags() {
    new_network();
    let listener = TcpListener::bind("127.0.0.1:7000").unwrap();
    let clients: Vec<_> = (0..100).map(|_| TcpStream::connect("127.0.0.1:7000").unwrap()).collect();
    let servers: Vec<_> = clients.iter().map(|_| listener.accept().unwrap().0).collect();
    servers.iter().enumerate().for_each(|(number, server)| change(server, number));
    let asked: Vec<_> = servers
        .iter()
        .map(|server| {
            let family = Family::Tcp { v6: false, stage: Stage::Connected };
            options::capture(server.as_fd(), family).unwrap()
        })
        .collect();
    let fds: Vec<_> = servers.iter().map(AsFd::as_fd).collect();
    let child = Child::holding(&fds);

    // This is when the running kernel is looked at.
    assert_eq!(super::super::check(&child.source()), []);
    let seen = super::Seen::of(child.pid, servers.len(), None);
    let captured = child.capture();
    for (number, server) in servers.iter().enumerate() {
        let table = &captured.tables[&7];
        let entry = table.iter().find(|entry| entry.fd == server.as_raw_fd()).unwrap();
        let FileId(place) = entry.file;
        let file = &captured.files.files[place as usize];
        assert_eq!(options_of(file), asked[number], "{number}");
        assert_eq!(entry.close_on_exec, number % 5 != 1, "{number}");
        let inode = descriptor::status(server.as_fd()).unwrap().inode;
        let told = seen.told(server.as_raw_fd(), inode);
        assert_eq!(told.map(|it| it.closes), Some(number % 5 != 1), "{number} is seen");
    }
}

/// How many segments have left this network.
fn sent() -> u64 {
    let table = fs::read_to_string("/proc/thread-self/net/snmp").unwrap();
    let mut lines = table.lines().filter(|line| line.starts_with("Tcp:"));
    let (names, values) = (lines.next().unwrap(), lines.next().unwrap());
    let place = names.split(' ').position(|name| name == "OutSegs").unwrap();
    values.split(' ').nth(place).unwrap().parse().unwrap()
}

#[test]
fn of_a_quiet_connection_nothing_is_heard() {
    new_network();
    let listener = TcpListener::bind("127.0.0.1:7000").unwrap();
    for (quiet, ask) in [(true, false), (false, false), (true, true)] {
        let mut client = TcpStream::connect("127.0.0.1:7000").unwrap();
        let (mut server, _) = listener.accept().unwrap();
        client.write_all(b"question").unwrap();
        server.read_exact(&mut [0; 8]).unwrap();
        server.write_all(b"answer").unwrap();
        client.read_exact(&mut [0; 6]).unwrap();
        while quiet && Info::of(server.as_fd()).unwrap().silent_ms < QUIET_MS {
            std::thread::yield_now();
        }
        let child = Child::holding(&[server.as_fd()]);
        let number = server.as_raw_fd();
        drop(server);
        let captured = child.capture();
        let copy = move_over(captured, child);
        let mut server = stream(&copy, number);
        let before = sent();
        copy.rebuilt.release(ask);
        assert_eq!(sent() == before, quiet && !ask);
        client.write_all(b"more").unwrap();
        let mut text = [0; 4];
        server.read_exact(&mut text).unwrap();
        assert_eq!(&text, b"more");
    }
}

/// What was captured of each of these, by its number.
fn sockets(captured: &Captured, servers: &[TcpStream]) -> Vec<File> {
    let file = |server: &TcpStream| {
        let table = &captured.tables[&7];
        let entry = table.iter().find(|entry| entry.fd == server.as_raw_fd()).unwrap();
        captured.files.files[entry.file.0 as usize].clone()
    };
    servers.iter().map(file).collect()
}

/// Takes out of a connection what repair mode changes, `SO_REUSEADDR`, and what is of the moment when
/// it was asked: the timestamp, and whether it is quiet.
fn take_changing(file: &mut File) -> (bool, u32, bool) {
    let Kind::Tcp(tcp) = &mut file.kind else { panic!("{file:?} is no TCP socket") };
    let before = tcp.options.len();
    tcp.options.retain(|it| (it.level, it.name) != (libc::SOL_SOCKET, libc::SO_REUSEADDR));
    let is_set = tcp.options.len() < before;
    let TcpState::Connected(connection) = &mut tcp.state else { return (is_set, 0, false) };
    let quiet = std::mem::take(&mut connection.quiet);
    (is_set, connection.timestamp.take().unwrap_or(0), quiet)
}

/// A connection that differs from its neighbours, and its client.
fn different(listener: &TcpListener, number: usize) -> (TcpStream, TcpStream) {
    let address = listener.local_addr().unwrap();
    let mut client = TcpStream::connect(address).unwrap();
    let (mut server, _) = listener.accept().unwrap();
    change(&server, number);
    let set = |name, value| options::set(server.as_fd(), libc::SOL_SOCKET, name, value).unwrap();
    if number % 4 == 1 {
        set(libc::SO_RCVBUF, 20_000 + number as i32);
    }
    if number % 6 == 1 {
        set(libc::SO_REUSEADDR, 0);
    }
    for _ in 0..number % 3 {
        client.write_all(&pattern(0, 100 * number)).unwrap();
        server.read_exact(&mut vec![0; 100 * number]).unwrap();
        server.write_all(&pattern(0, 10 * number)).unwrap();
        client.read_exact(&mut vec![0; 10 * number]).unwrap();
    }
    match number {
        20 => client.write_all(b"not read").unwrap(),
        21 => {
            options::set(server.as_fd(), libc::IPPROTO_TCP, libc::TCP_CORK, 1).unwrap();
            server.write_all(b"not sent").unwrap();
        }
        22 => client.shutdown(Shutdown::Write).unwrap(),
        23 => server.shutdown(Shutdown::Write).unwrap(),
        24 => descriptor::change(server.as_fd(), Change::SetSignal, libc::SIGUSR1).unwrap(),
        _ => server.set_nonblocking(number % 9 == 1).unwrap(),
    }
    (client, server)
}

#[test]
fn records_tell_what_connections_answer() {
    new_network();
    for address in ["127.0.0.1:7000", "[::1]:7000"] {
        let listener = TcpListener::bind(address).unwrap();
        let (clients, servers): (Vec<_>, Vec<_>) =
            (0..100).map(|number| different(&listener, number)).unzip();
        // The one that the others of its kind are compared with has received something just now; the
        // others are quiet, and are told so by their records.
        const LIKE_THE_FIRST: usize = 12;
        while Info::of(servers[LIKE_THE_FIRST].as_fd()).unwrap().silent_ms < 2 * QUIET_MS {
            std::thread::yield_now();
        }
        let fds: Vec<_> = servers.iter().map(AsFd::as_fd).collect();
        let child = Child::holding(&fds);
        assert_eq!(super::super::check(&child.source()), []);
        let late = Instant::now();
        (&clients[0]).write_all(b"late").unwrap();
        (&servers[0]).read_exact(&mut [0; 4]).unwrap();
        let told = child.capture_at_rest();
        let at_once = late.elapsed() < Duration::from_micros(REST_US as u64);
        let count = told.undo.connections.iter().filter(|it| it.is_told).count();
        assert!(count > 80, "{address}: {count} are told by their records");
        // Repair mode goes on: nobody hears of it, and nothing changes.
        let asked = child.capture();
        let pairs = sockets(&told, &servers).into_iter().zip(sockets(&asked, &servers));
        for (number, (mut told, mut asked)) in pairs.enumerate() {
            let [told_of, asked_of] = [&mut told, &mut asked].map(take_changing);
            let ((reuse, told_at, quiet), (_, asked_at, is_quiet)) = (told_of, asked_of);
            assert_eq!(told, asked, "{address} {number}");
            assert_eq!(reuse, number % 6 != 1, "{address} {number}");
            let apart = told_at.wrapping_sub(asked_at).cast_signed();
            assert!(apart.abs() < 2000, "{address} {number}: {told_at} {asked_at}");
            assert!(is_quiet || !quiet, "{address} {number}: is not quiet");
            assert!(quiet || number != LIKE_THE_FIRST, "{address} {number}: is quiet");
            assert!(!quiet || number != 0 || !at_once, "{address} {number}: is not quiet");
        }
        assert_eq!(told.tables, asked.tables);
        drop(asked);
        drop(told);
        for (number, server) in servers.iter().enumerate() {
            let reuse = options::number(server.as_fd(), libc::SOL_SOCKET, libc::SO_REUSEADDR);
            assert_eq!(reuse.unwrap(), i32::from(number % 6 != 1), "{number} is as before");
        }
    }
}
