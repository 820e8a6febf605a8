//! Connections that nobody has accepted yet. Their clients stay.

use std::{
    io::{Read, Write},
    net::{Shutdown, SocketAddr, TcpListener, TcpStream},
    os::fd::{AsFd, AsRawFd},
};

use super::tests::{move_over, pattern};
use crate::files::{
    options,
    testing::{Child, new_network},
};

/// Clients of which nobody has been accepted: one that is silent, one that has written, one that
/// has written much, and one that has closed its way.
fn clients(address: &str) -> (TcpListener, [TcpStream; 4]) {
    let listener = TcpListener::bind(address).unwrap();
    let mut clients = [(); 4].map(|()| TcpStream::connect(address).unwrap());
    clients[1].write_all(b"early").unwrap();
    clients[2].write_all(&pattern(0, 40_000)).unwrap();
    clients[3].write_all(b"last").unwrap();
    clients[3].shutdown(Shutdown::Write).unwrap();
    (listener, clients)
}

/// Accepts them and talks with them.
fn serve(listener: &TcpListener, clients: &mut [TcpStream; 4]) {
    let waited = [&b""[..], b"early", &pattern(0, 40_000), b"last"];
    for (client, waited) in clients.iter_mut().zip(waited) {
        let (mut server, address) = listener.accept().unwrap();
        assert_eq!(address, client.local_addr().unwrap(), "in the order of their coming");
        assert_eq!(server.local_addr().unwrap(), client.peer_addr().unwrap());
        assert!(server.nodelay().unwrap(), "as the listener");
        let mut received = vec![0; waited.len()];
        server.read_exact(&mut received).unwrap();
        assert_eq!(received, waited);
        server.write_all(b"answer").unwrap();
        let mut answer = [0; 6];
        client.read_exact(&mut answer).unwrap();
        assert_eq!(&answer, b"answer");
        if client.write_all(b"more").is_ok() {
            client.shutdown(Shutdown::Write).unwrap();
            let mut more = String::new();
            server.read_to_string(&mut more).unwrap();
            assert_eq!(more, "more");
        } else {
            assert_eq!(server.read(&mut [0]).unwrap(), 0, "it has closed its way");
        }
        drop(server);
        assert_eq!(client.read(&mut [0]).unwrap(), 0);
    }
}

fn set_no_delay(listener: &TcpListener) {
    options::set(listener.as_fd(), super::TCP, libc::TCP_NODELAY, 1).unwrap();
}

fn moved(address: &str) {
    new_network();
    let (listener, mut clients) = clients(address);
    set_no_delay(&listener);
    let child = Child::holding(&[listener.as_fd()]);
    let number = listener.as_raw_fd();
    drop(listener);
    let captured = child.capture();
    let copy = move_over(captured, child);
    let listener = TcpListener::from(copy.of(number));
    copy.rebuilt.release(false);
    serve(&listener, &mut clients);
}

#[test]
fn connections_wait_on_after_a_move() {
    moved("127.0.0.1:7000");
}

#[test]
fn those_of_ipv6_too() {
    moved("[::1]:7000");
}

#[test]
fn those_of_a_socket_for_both_too() {
    new_network();
    let listener = TcpListener::bind("[::]:7000").unwrap();
    set_no_delay(&listener);
    let client = TcpStream::connect("127.0.0.1:7000").unwrap();
    let child = Child::holding(&[listener.as_fd()]);
    let number = listener.as_raw_fd();
    drop(listener);
    let copy = move_over(child.capture(), child);
    let listener = TcpListener::from(copy.of(number));
    copy.rebuilt.release(false);
    let (mut server, address) = listener.accept().unwrap();
    assert_eq!(address.port(), client.local_addr().unwrap().port());
    server.write_all(b"x").unwrap();
    (&client).read_exact(&mut [0]).unwrap();
}

#[test]
fn a_capture_in_vain_leaves_them_waiting() {
    new_network();
    let (listener, mut clients) = clients("127.0.0.1:7000");
    set_no_delay(&listener);
    let child = Child::holding(&[listener.as_fd()]);
    let first = child.capture();
    let files = first.files.clone();
    drop(first);
    let second = child.capture();
    let state = |files: &ckpt_format::files::Files| format!("{:?}", files.files[0].kind);
    let without_clock = |text: String| text.replace(char::is_numeric, "");
    assert_eq!(without_clock(state(&second.files)), without_clock(state(&files)));
    drop(second);
    serve(&listener, &mut clients);
}

#[test]
fn every_listener_of_a_group_keeps_its_own() {
    new_network();
    let address: SocketAddr = "127.0.0.1:7000".parse().unwrap();
    let listeners = [(); 2].map(|()| {
        let socket = crate::sys::socket::socket(libc::AF_INET, libc::SOCK_STREAM, 0).unwrap();
        options::set(socket.as_fd(), libc::SOL_SOCKET, libc::SO_REUSEPORT, 1).unwrap();
        let name = crate::files::address::encode_inet(&address);
        crate::sys::socket::bind(socket.as_fd(), &name).unwrap();
        crate::sys::socket::listen(socket.as_fd(), 64).unwrap();
        TcpListener::from(socket)
    });
    let clients: Vec<TcpStream> = (0..40).map(|_| TcpStream::connect(address).unwrap()).collect();
    let waiting = |listener: &TcpListener| super::Info::of(listener.as_fd()).unwrap().waiting;
    let before = [waiting(&listeners[0]), waiting(&listeners[1])];
    assert_eq!(before[0] + before[1], 40);
    let child = Child::holding(&[listeners[0].as_fd(), listeners[1].as_fd()]);
    let numbers = [listeners[0].as_raw_fd(), listeners[1].as_raw_fd()];
    drop(listeners);
    let copy = move_over(child.capture(), child);
    let listeners = numbers.map(|number| TcpListener::from(copy.of(number)));
    copy.rebuilt.release(false);
    assert_eq!([waiting(&listeners[0]), waiting(&listeners[1])], before);
    drop(clients);
}
