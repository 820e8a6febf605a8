//! Many connections, most of them alike.

use std::{
    fs,
    io::{Read, Write},
    net::{TcpListener, TcpStream},
    os::fd::{AsFd, AsRawFd},
};

use ckpt_format::files::{File, FileId, Kind, SocketOption};
use nix::fcntl::{FcntlArg, FdFlag, fcntl};

use super::{
    super::{
        options::{self, Family, Stage},
        testing::{Child, new_network},
    },
    capture::{Info, QUIET_MS},
    tests::{move_over, stream},
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
    let seen = super::Seen::of(child.pid, servers.len());
    let captured = child.capture();
    for (number, server) in servers.iter().enumerate() {
        let table = &captured.tables[&7];
        let entry = table.iter().find(|entry| entry.fd == server.as_raw_fd()).unwrap();
        let FileId(place) = entry.file;
        let file = &captured.files.files[place as usize];
        assert_eq!(options_of(file), asked[number], "{number}");
        assert_eq!(entry.close_on_exec, number % 5 != 1, "{number}");
        let inode = crate::sys::descriptor::status(server.as_fd()).unwrap().inode;
        let closes = seen.closes(server.as_raw_fd(), inode);
        assert_eq!(closes, Some(number % 5 != 1), "{number} is seen");
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
