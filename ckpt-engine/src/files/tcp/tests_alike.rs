//! Many connections, most of them alike.

use std::{
    net::{TcpListener, TcpStream},
    os::fd::{AsFd, AsRawFd},
};

use ckpt_format::files::{File, FileId, Kind, SocketOption};
use nix::fcntl::{FcntlArg, FdFlag, fcntl};

use super::super::{
    options::{self, Family, Stage},
    testing::{Child, new_network},
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
