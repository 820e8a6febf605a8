//! Keys of TCP sockets, in a network of their own.

use std::{
    net::{SocketAddr, TcpListener, TcpStream},
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
};

use ckpt_format::files::{File, Kind, SocketOption};

use super::{
    signature::{option, without},
    tests::move_over,
};
use crate::{
    files::{
        Captured, address,
        testing::{Child, new_network},
    },
    sys::socket,
};

/// A key for a network of peers, as the kernel tells it (`struct tcp_diag_md5sig`), as an option.
fn key(peer: [u8; 4], prefix: u8, v6: bool) -> SocketOption {
    let mut told = vec![libc::AF_INET as u8, prefix, 6, 0];
    told.extend(peer);
    told.resize(20, 0);
    told.extend(*b"secret");
    told.resize(100, 0);
    option(&told, v6).unwrap()
}

fn sign(fd: BorrowedFd<'_>, key: &SocketOption) {
    socket::set_option(fd, key.level, key.name, &key.value).unwrap();
}

fn signed(domain: i32, keys: &[SocketOption]) -> OwnedFd {
    let fd = socket::socket(domain, libc::SOCK_STREAM, 0).unwrap();
    keys.iter().for_each(|key| sign(fd.as_fd(), key));
    fd
}

fn bind(fd: BorrowedFd<'_>, name: &str) {
    let name: SocketAddr = name.parse().unwrap();
    socket::bind(fd, &address::encode_inet(&name)).unwrap();
}

/// The keys of the sockets that were captured, in the order of their numbers.
fn keys(captured: &Captured) -> Vec<Vec<SocketOption>> {
    let is_key = |option: &&SocketOption| (option.level, option.name) == (libc::IPPROTO_TCP, 32);
    let of = |file: &File| match &file.kind {
        Kind::Tcp(tcp) => tcp.options.iter().filter(is_key).cloned().collect(),
        other => panic!("{other:?}"),
    };
    captured.tables[&7].iter().map(|it| of(&captured.files.files[it.file.0 as usize])).collect()
}

#[test]
fn keys_of_listeners_and_connections_come_along() {
    new_network();
    let [near, far] = [key([127, 0, 0, 1], 32, false), key([10, 0, 0, 0], 8, false)];
    let mapped = key([192, 0, 2, 0], 24, true);
    let listener = signed(libc::AF_INET, &[near.clone(), far.clone()]);
    bind(listener.as_fd(), "127.0.0.1:0");
    socket::listen(listener.as_fd(), 5).unwrap();
    let listener = TcpListener::from(listener);
    let name = listener.local_addr().unwrap();
    let client = signed(libc::AF_INET, std::slice::from_ref(&near));
    socket::connect(client.as_fd(), &address::encode_inet(&name)).unwrap();
    let server = listener.accept().unwrap().0;
    let six = signed(libc::AF_INET6, std::slice::from_ref(&mapped));
    bind(six.as_fd(), "[::]:0");
    socket::listen(six.as_fd(), 5).unwrap();
    let plain = TcpListener::bind("127.0.0.1:0").unwrap();
    let all = [listener.as_fd(), server.as_fd(), six.as_fd(), plain.as_fd()];
    let child = Child::holding(&all);
    let numbers = all.map(|fd| fd.as_raw_fd());
    drop((listener, server, six, plain));
    let captured = child.capture();
    let mut found = keys(&captured);
    found.iter_mut().for_each(|keys| keys.sort_by(|a, b| a.value.cmp(&b.value)));
    let mut listed = vec![near.clone(), far];
    listed.sort_by(|a, b| a.value.cmp(&b.value));
    assert_eq!(found, [listed, vec![near], vec![mapped], Vec::new()]);
    // They are what the copies have.
    let copy = move_over(captured, child);
    let copies = numbers.map(|number| copy.of(number));
    let child = Child::holding(&copies.each_ref().map(AsFd::as_fd));
    let mut again = keys(&child.capture());
    again.iter_mut().for_each(|keys| keys.sort_by(|a, b| a.value.cmp(&b.value)));
    assert_eq!(again, found);
}

#[test]
fn clients_that_wait_for_a_listener_with_keys_are_waited_for() {
    new_network();
    let near = key([127, 0, 0, 1], 32, false);
    let listener = signed(libc::AF_INET, std::slice::from_ref(&near));
    bind(listener.as_fd(), "127.0.0.1:0");
    socket::listen(listener.as_fd(), 5).unwrap();
    let listener = TcpListener::from(listener);
    let client = signed(libc::AF_INET, std::slice::from_ref(&near));
    let name = address::encode_inet(&listener.local_addr().unwrap());
    socket::connect(client.as_fd(), &name).unwrap();
    let child = Child::holding(&[listener.as_fd()]);
    let refused = crate::files::capture(&child.source()).unwrap_err();
    assert!(refused[0].object.contains("not yet accepted"), "{refused:?}");
    // It has not lost the client.
    assert!(listener.accept().is_ok());
}

#[test]
fn a_connection_is_without_its_keys_for_a_moment_only() {
    new_network();
    let near = key([127, 0, 0, 1], 32, false);
    let listener = signed(libc::AF_INET, std::slice::from_ref(&near));
    bind(listener.as_fd(), "127.0.0.1:0");
    socket::listen(listener.as_fd(), 5).unwrap();
    let tell = |fd: BorrowedFd<'_>| {
        let child = Child::holding(&[fd]);
        keys(&child.capture()).remove(0)
    };
    let options = [near.clone()];
    let within = without(listener.as_fd(), &options, || Ok(tell(listener.as_fd()))).unwrap();
    assert_eq!(within, []);
    assert_eq!(tell(listener.as_fd()), options);
}

#[test]
fn one_that_signs_is_found_among_many_that_do_not() {
    new_network();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let name = listener.local_addr().unwrap();
    let clients: Vec<_> = (0..100).map(|_| TcpStream::connect(name).unwrap()).collect();
    let servers: Vec<_> = clients.iter().map(|_| listener.accept().unwrap().0).collect();
    let near = key([127, 0, 0, 1], 32, false);
    sign(servers[40].as_fd(), &near);
    let fds: Vec<_> = servers.iter().map(AsFd::as_fd).collect();
    let child = Child::holding(&fds);
    // This is when the running kernel is looked at.
    assert_eq!(crate::files::check(&child.source()), []);
    let captured = child.capture_at_rest();
    let place = servers.iter().filter(|it| it.as_raw_fd() < servers[40].as_raw_fd()).count();
    for (number, keys) in keys(&captured).into_iter().enumerate() {
        let expected: &[SocketOption] =
            if number == place { std::slice::from_ref(&near) } else { &[] };
        assert_eq!(keys, expected, "{number}");
    }
}
