//! Connections that were closed and still send. Their clients stay, and are slow.

use std::{
    fs::File,
    io::{Read, Seek, Write},
    net::{Shutdown, TcpListener, TcpStream},
    os::fd::{AsFd, BorrowedFd},
};

use ckpt_format::files::{TcpClosing, TcpConnection, TcpSocket, TcpState};

use super::{
    Info, REPAIR_OFF, REPAIR_ON,
    capture::connection,
    orphans, set_repair,
    tests::{pattern, write_until_full},
    unsent::still_sending,
};
use crate::files::testing::new_network;

fn pair(address: &str) -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind(address).unwrap();
    let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    (client, listener.accept().unwrap().0)
}

/// What repair mode shows of a connection that somebody has.
fn shown(stream: &TcpStream) -> TcpConnection {
    let fd: BorrowedFd<'_> = stream.as_fd();
    set_repair(fd, REPAIR_ON).unwrap();
    let info = Info::of(fd).unwrap();
    let shown = connection(fd, &info, stream.peer_addr().unwrap()).unwrap();
    set_repair(fd, REPAIR_OFF).unwrap();
    shown
}

fn here() -> Vec<TcpSocket> {
    let network = File::open("/proc/thread-self/ns/net").unwrap();
    orphans(network.as_fd()).unwrap()
}

/// The one orphan in the network.
fn the_orphan() -> (TcpSocket, TcpConnection) {
    let mut found = here();
    assert_eq!(found.len(), 1);
    let socket = found.remove(0);
    let TcpState::Connected(connection) = socket.state.clone() else { panic!("{socket:?}") };
    (socket, *connection)
}

fn is_read_as_it_is_shown(address: &str) {
    new_network();
    let (mut client, mut server) = pair(address);
    assert_eq!(here(), [], "somebody has it");
    let sent = write_until_full(&mut server);
    // Until the client takes no more either.
    let quiet = || {
        let seen = shown(&server);
        let [_, window, ..] = seen.window;
        (window < seen.segment_size || seen.unsent > 0).then_some(seen)
    };
    let mut shown = loop {
        if let Some(shown) = quiet() {
            break shown;
        }
    };
    let local = server.local_addr().unwrap();
    drop(server);
    let (socket, mut found) = the_orphan();
    assert_eq!(socket.local, Some(local));
    assert_eq!(socket.v6, local.is_ipv6());
    assert_eq!(found.closing, TcpClosing::ByUs);
    assert!(!found.unacknowledged.is_empty() && found.unsent > 0, "{found:?}");
    let start = sent - found.unacknowledged.len();
    assert!(found.unacknowledged == pattern(start, found.unacknowledged.len()), "from {start}");
    assert!(found.timestamp.take().unwrap().wrapping_sub(shown.timestamp.take().unwrap()) < 10_000);
    // Our FIN is what is new.
    assert_eq!(found.send_sequence, shown.send_sequence.wrapping_add(1));
    (shown.closing, shown.send_sequence) = (found.closing, found.send_sequence);
    // What is sent and not acknowledged changes as long as the client has room.
    for connection in [&mut shown, &mut found] {
        connection.unacknowledged.clear();
        connection.unsent = 0;
        connection.window =
            [connection.window[0], 0, connection.window[2], connection.window[3], 0];
    }
    assert_eq!(found, shown);
    // Nothing was taken.
    let mut received = Vec::new();
    client.read_to_end(&mut received).unwrap();
    assert!(received == pattern(0, sent));
    assert_eq!(here(), [], "all was sent");
}

#[test]
fn a_closed_connection_that_sends_is_read_as_it_is_shown() {
    is_read_as_it_is_shown("127.0.0.1:0");
}

#[test]
fn a_closed_connection_of_ipv6_is_read_as_it_is_shown() {
    is_read_as_it_is_shown("[::1]:0");
}

#[test]
fn what_was_sent_from_a_file_is_read_from_its_pages() {
    new_network();
    let (mut client, server) = pair("127.0.0.1:0");
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(&pattern(0, 4 << 20)).unwrap();
    file.rewind().unwrap();
    server.set_nonblocking(true).unwrap();
    let mut sent = 0;
    while let Ok(count @ 1..) = nix::sys::sendfile::sendfile(&server, &file, None, 100_000) {
        sent += count;
    }
    client.shutdown(Shutdown::Write).unwrap();
    drop(server);
    let (_, found) = the_orphan();
    assert_eq!(found.closing, TcpClosing::ByBoth, "the client has closed before");
    let start = sent - found.unacknowledged.len();
    assert!(found.unacknowledged == pattern(start, found.unacknowledged.len()), "from {start}");
    let mut received = Vec::new();
    client.read_to_end(&mut received).unwrap();
    assert!(received == pattern(0, sent));
}

#[test]
fn what_is_not_taken_yet_is_told_without_being_read() {
    new_network();
    let network = File::open("/proc/thread-self/ns/net").unwrap();
    let told = || still_sending(network.as_fd()).unwrap();
    for address in ["127.0.0.1:0", "[::1]:0"] {
        let (mut client, mut server) = pair(address);
        let sent = write_until_full(&mut server);
        assert_eq!(told(), [""; 0], "somebody has it");
        let (local, remote) = (server.local_addr().unwrap(), server.peer_addr().unwrap());
        drop(server);
        let [one] = &told()[..] else { panic!("{:?}", told()) };
        assert!(one.ends_with(&format!(" bytes from {local} to {remote}")), "{one}");
        let mut received = Vec::new();
        client.read_to_end(&mut received).unwrap();
        assert_eq!(received.len(), sent);
        // The client may still keep its end to itself.
        assert_eq!(told(), [""; 0]);
    }
}
