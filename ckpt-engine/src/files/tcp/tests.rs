//! Connections in a network of their own; the client stays while the server's end is captured,
//! killed and rebuilt.

use std::{
    io::{ErrorKind, Read, Write},
    net::{TcpListener, TcpStream},
    os::fd::{AsFd, AsRawFd, RawFd},
};

use crate::{
    files::{
        Captured,
        testing::{Child, Copy, new_network, rebuild},
    },
    sys::descriptor::{Count, count},
};

/// Bytes that tell their place.
pub(super) fn pattern(from: usize, length: usize) -> Vec<u8> {
    (from..from + length).map(|at| (at * 31 % 251) as u8).collect()
}

/// Writes until the connection takes no more.
pub(super) fn write_until_full(stream: &mut TcpStream) -> usize {
    stream.set_nonblocking(true).unwrap();
    let mut written = 0;
    loop {
        match stream.write(&pattern(written, 10_000)) {
            Ok(count) => written += count,
            Err(error) if error.kind() == ErrorKind::WouldBlock => break,
            Err(error) => panic!("{error}"),
        }
    }
    stream.set_nonblocking(false).unwrap();
    written
}

fn pair() -> (TcpListener, TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:7000").unwrap();
    let client = TcpStream::connect("127.0.0.1:7000").unwrap();
    let (server, _) = listener.accept().unwrap();
    (listener, client, server)
}

/// Returns when the other ends have acknowledged everything, ends as well: what is sent while nobody is
/// there would be refused, since nothing holds it here.
fn until_acknowledged(streams: &[&TcpStream]) {
    while streams.iter().any(|it| count(it.as_fd(), Count::Outstanding).unwrap() > 0) {
        std::thread::yield_now();
    }
}

/// Lets the originals die as after a switch, and rebuilds what they had.
pub(super) fn move_over(captured: Captured, child: Child) -> Copy {
    let mut captured = captured;
    std::mem::take(&mut captured.undo).seal();
    drop(child);
    rebuild(&captured)
}

/// The server's end after the switch.
pub(super) fn stream(copy: &Copy, fd: RawFd) -> TcpStream {
    TcpStream::from(copy.of(fd))
}

#[test]
fn a_busy_connection_goes_on_where_it_was() {
    new_network();
    let (listener, mut client, mut server) = pair();
    server.set_nodelay(true).unwrap();
    client.write_all(&pattern(0, 100_000)).unwrap();
    let mut start = [0; 1000];
    server.read_exact(&mut start).unwrap();
    let sent = write_until_full(&mut server);
    // What the client sends while nobody is there would be refused, since nothing holds it here:
    // data once more, or an acknowledgement that is late.
    let counted = |stream: &TcpStream, what| count(stream.as_fd(), what).unwrap();
    while counted(&client, Count::Outstanding) > 0
        || counted(&server, Count::Outstanding) > counted(&server, Count::Unsent)
    {
        std::thread::yield_now();
    }
    let child = Child::holding(&[listener.as_fd(), server.as_fd()]);
    let (fd_listener, fd) = (listener.as_raw_fd(), server.as_raw_fd());
    drop((listener, server));
    let captured = child.capture();
    let copy = move_over(captured, child);
    let listener = TcpListener::from(copy.of(fd_listener));
    let mut server = stream(&copy, fd);
    copy.rebuilt.release(false);

    assert!(server.nodelay().unwrap());
    let mut rest = vec![0; 99_000];
    server.read_exact(&mut rest).unwrap();
    assert_eq!(rest, pattern(1000, 99_000));
    let mut received = vec![0; sent];
    client.read_exact(&mut received).unwrap();
    assert_eq!(received, pattern(0, sent));
    // Both ways go on, and the listener takes new clients.
    client.write_all(b"ping").unwrap();
    server.read_exact(&mut received[..4]).unwrap();
    server.write_all(b"pong").unwrap();
    client.read_exact(&mut received[..4]).unwrap();
    assert_eq!(&received[..4], b"pong");
    let _second = TcpStream::connect("127.0.0.1:7000").unwrap();
    listener.accept().unwrap();
    drop(server);
    assert_eq!(client.read(&mut received).unwrap(), 0);
}

#[test]
fn what_waits_behind_an_urgent_byte_is_not_lost() {
    new_network();
    let (listener, mut client, mut server) = pair();
    client.write_all(b"abc").unwrap();
    let urgent = nix::sys::socket::MsgFlags::MSG_OOB;
    assert_eq!(nix::sys::socket::send(client.as_raw_fd(), b"U", urgent).unwrap(), 1);
    client.write_all(b"def").unwrap();
    let child = Child::holding(&[listener.as_fd(), server.as_fd()]);
    let refused = crate::files::capture(&child.source()).unwrap_err();
    assert!(refused.iter().all(|why| why.object.contains("urgent data")), "{refused:?}");
    // The connection is as before.
    let mut bytes = [0; 9];
    assert_eq!(server.read(&mut bytes).unwrap(), 3);
    assert_eq!(server.read(&mut bytes).unwrap(), 3);
    assert_eq!(&bytes[..3], b"def");
    drop(child.capture());
}

#[test]
fn an_aborted_capture_leaves_the_connection_as_it_was() {
    new_network();
    let (listener, mut client, mut server) = pair();
    client.write_all(b"unread").unwrap();
    let sent = write_until_full(&mut server);
    let child = Child::holding(&[listener.as_fd(), server.as_fd()]);
    let reuse = || {
        let fd = server.as_fd();
        super::options::number(fd, libc::SOL_SOCKET, libc::SO_REUSEADDR).unwrap()
    };
    let before = reuse();
    drop(child.capture());
    assert_eq!(reuse(), before);
    assert_eq!(super::options::number(server.as_fd(), super::TCP, libc::TCP_REPAIR).unwrap(), 0);
    let mut received = vec![0; sent];
    client.read_exact(&mut received).unwrap();
    assert_eq!(received, pattern(0, sent));
    let mut unread = [0; 6];
    server.read_exact(&mut unread).unwrap();
    assert_eq!(&unread, b"unread");
}

#[test]
fn a_capture_whose_daemon_died_is_mended() {
    new_network();
    let (_listener, mut client, mut server) = pair();
    let child = Child::holding(&[server.as_fd()]);
    child.capture().undo.seal();
    assert_eq!(super::super::mend(&child.source()).unwrap(), 1);
    assert_eq!(super::super::mend(&child.source()).unwrap(), 0);
    server.write_all(b"x").unwrap();
    client.read_exact(&mut [0]).unwrap();
}

#[test]
fn closed_ways_stay_closed() {
    use std::net::Shutdown::Write as Writing;
    new_network();
    let (listener, mut by_us, server_by_us) = pair();
    let (mut by_peer, server_by_peer) =
        (TcpStream::connect("127.0.0.1:7000").unwrap(), listener.accept().unwrap().0);
    let (mut by_both, server_by_both) =
        (TcpStream::connect("127.0.0.1:7000").unwrap(), listener.accept().unwrap().0);
    server_by_us.shutdown(Writing).unwrap();
    by_peer.write_all(b"last words").unwrap();
    by_peer.shutdown(Writing).unwrap();
    (&server_by_both).write_all(b"ours").unwrap();
    server_by_both.shutdown(Writing).unwrap();
    by_both.write_all(b"theirs").unwrap();
    by_both.shutdown(Writing).unwrap();
    let servers = [&server_by_us, &server_by_peer, &server_by_both];
    until_acknowledged(&servers);
    until_acknowledged(&[&by_us, &by_peer, &by_both]);
    let fds = servers.map(|server| server.as_fd());
    let child = Child::holding(&fds);
    let numbers = servers.map(|server| server.as_raw_fd());
    drop((server_by_us, server_by_peer, server_by_both));
    let captured = child.capture();
    let copy = move_over(captured, child);
    let [mut server_by_us, mut server_by_peer, mut server_by_both] =
        numbers.map(|number| stream(&copy, number));
    copy.rebuilt.release(false);

    let mut text = String::new();
    by_us.write_all(b"still open").unwrap();
    by_us.shutdown(Writing).unwrap();
    server_by_us.read_to_string(&mut text).unwrap();
    assert_eq!(text, "still open");
    assert_eq!(by_us.read(&mut [0]).unwrap(), 0);

    text.clear();
    server_by_peer.read_to_string(&mut text).unwrap();
    assert_eq!(text, "last words");
    server_by_peer.write_all(b"answer").unwrap();
    drop(server_by_peer);
    text.clear();
    by_peer.read_to_string(&mut text).unwrap();
    assert_eq!(text, "answer");

    text.clear();
    server_by_both.read_to_string(&mut text).unwrap();
    assert_eq!(text, "theirs");
    text.clear();
    by_both.read_to_string(&mut text).unwrap();
    assert_eq!(text, "ours");
}

#[test]
fn the_end_of_what_a_peer_said_that_is_gone_is_no_reset() {
    new_network();
    let (listener, mut client, server) = pair();
    client.write_all(b"last words").unwrap();
    super::options::set(client.as_fd(), super::TCP, libc::TCP_LINGER2, 1).unwrap();
    drop(client);
    // Until the kernel has forgotten it.
    let remains = || {
        let table = std::fs::read_to_string("/proc/thread-self/net/tcp").unwrap();
        table.lines().count() > 3
    };
    while remains() {
        std::thread::yield_now();
    }
    let child = Child::holding(&[listener.as_fd(), server.as_fd()]);
    let fd = server.as_raw_fd();
    drop((listener, server));
    let captured = child.capture();
    let copy = move_over(captured, child);
    let mut server = stream(&copy, fd);
    copy.rebuilt.release(true);
    let mut text = String::new();
    server.read_to_string(&mut text).unwrap();
    assert_eq!(text, "last words");
}

#[test]
fn ipv6_and_fresh_sockets_are_rebuilt() {
    new_network();
    let listener = TcpListener::bind("[::1]:7000").unwrap();
    let mut client = TcpStream::connect("[::1]:7000").unwrap();
    let (server, _) = listener.accept().unwrap();
    let fresh = crate::sys::socket::socket(libc::AF_INET, libc::SOCK_STREAM, 0).unwrap();
    crate::files::options::set(fresh.as_fd(), libc::SOL_SOCKET, libc::SO_KEEPALIVE, 1).unwrap();
    let child = Child::holding(&[server.as_fd(), fresh.as_fd()]);
    let numbers = [server.as_raw_fd(), fresh.as_raw_fd()];
    drop((server, fresh));
    let captured = child.capture();
    let copy = move_over(captured, child);
    let (mut server, fresh) = (stream(&copy, numbers[0]), copy.of(numbers[1]));
    copy.rebuilt.release(false);
    server.write_all(b"six").unwrap();
    let mut text = [0; 3];
    client.read_exact(&mut text).unwrap();
    assert_eq!(&text, b"six");
    let keep = crate::files::options::number(fresh.as_fd(), libc::SOL_SOCKET, libc::SO_KEEPALIVE);
    assert_eq!(keep.unwrap(), 1);
}
