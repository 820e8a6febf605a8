//! Unix sockets of a process, rebuilt and used.

use std::{
    fs::File,
    io::{IoSlice, Read, Write},
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
        unix::{
            fs::PermissionsExt,
            net::{UnixDatagram, UnixListener, UnixStream},
        },
    },
};

use crate::{
    files::{
        Target, options,
        testing::{Child, new_network, rebuild, rebuild_in},
    },
    sys::socket::{self, Along},
};

fn send_with(fd: BorrowedFd<'_>, data: &[u8], rights: &[BorrowedFd<'_>]) {
    let along = Along { rights, ..Along::default() };
    assert_eq!(socket::send(fd, data, &along, 0).unwrap(), data.len());
}

#[test]
fn a_stream_keeps_its_data_and_the_descriptors_at_their_bytes() {
    let (near, far) = UnixStream::pair().unwrap();
    let (reader, writer) = nix::unistd::pipe().unwrap();
    (&near).write_all(b"AAA").unwrap();
    (&near).write_all(b"BB").unwrap();
    send_with(near.as_fd(), b"CC", &[writer.as_fd()]);
    (&near).write_all(b"DDDD").unwrap();
    near.shutdown(std::net::Shutdown::Write).unwrap();
    let child = Child::holding(&[near.as_fd(), far.as_fd(), reader.as_fd()]);
    let numbers = [near.as_raw_fd(), far.as_raw_fd(), reader.as_raw_fd()];
    drop((near, reader, writer));
    let captured = child.capture();
    assert_eq!(
        options::number(far.as_fd(), libc::SOL_SOCKET, libc::SO_PEEK_OFF).unwrap(),
        -1,
        "the original is as before"
    );
    drop((far, child));

    let copy = rebuild(&captured);
    let [near, far, reader] = numbers.map(|number| copy.of(number));
    let (near, far) = (UnixStream::from(near), UnixStream::from(far));
    drop(copy);
    let mut buffer = [0; 100];
    let first = socket::receive(far.as_fd(), &mut buffer, 0).unwrap();
    assert_eq!((&buffer[..first.length], first.rights.len()), (&b"AAABBCC"[..], 1));
    let mut writer = File::from(first.rights.into_iter().next().unwrap());
    writer.write_all(b"through").unwrap();
    drop(writer);
    let mut text = String::new();
    File::from(reader).read_to_string(&mut text).unwrap();
    assert_eq!(text, "through", "the descriptor in flight is the end of the same pipe");
    assert_eq!((&far).read(&mut buffer).unwrap(), 4);
    assert_eq!((&far).read(&mut buffer).unwrap(), 0, "the way was closed");
    assert!((&near).write(b"x").is_err());
    (&far).write_all(b"back").unwrap();
    assert_eq!((&near).read(&mut buffer).unwrap(), 4);
}

#[test]
fn the_other_end_of_a_pipe_may_be_in_a_queue_alone() {
    // The pipe is looked at before the queue, because its number is lower.
    let (reader, writer) = nix::unistd::pipe().unwrap();
    let (near, far) = UnixStream::pair().unwrap();
    send_with(near.as_fd(), b"A", &[reader.as_fd()]);
    let child = Child::holding(&[writer.as_fd(), near.as_fd(), far.as_fd()]);
    let numbers = [writer.as_raw_fd(), far.as_raw_fd()];
    assert!(numbers[0] < numbers[1]);
    drop((reader, writer, near, far));
    assert_eq!(child.blockers(), []);
    let captured = child.capture();
    drop(child);
    let copy = rebuild(&captured);
    let [writer, far] = numbers.map(|number| copy.of(number));
    drop(copy);
    let received = socket::receive(far.as_fd(), &mut [0; 100], 0).unwrap();
    File::from(writer).write_all(b"through").unwrap();
    let mut text = String::new();
    File::from(received.rights.into_iter().next().unwrap()).read_to_string(&mut text).unwrap();
    assert_eq!(text, "through");
}

#[test]
fn a_read_of_the_bytes_before_brings_no_descriptor() {
    let (near, far) = UnixStream::pair().unwrap();
    (&near).write_all(b"AAA").unwrap();
    send_with(near.as_fd(), b"CC", &[near.as_fd()]);
    let child = Child::holding(&[near.as_fd(), far.as_fd()]);
    let number = far.as_raw_fd();
    drop((near, far));
    let captured = child.capture();
    let copy = rebuild(&captured);
    let far = copy.of(number);
    let mut buffer = [0; 3];
    let first = socket::receive(far.as_fd(), &mut buffer, 0).unwrap();
    assert_eq!((&buffer[..first.length], first.rights.len()), (&b"AAA"[..], 0));
    let second = socket::receive(far.as_fd(), &mut buffer, 0).unwrap();
    assert_eq!((&buffer[..second.length], second.rights.len()), (&b"CC"[..], 1));
}

#[test]
fn a_server_keeps_its_name_its_clients_and_those_that_wait() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("server.sock");
    let listener = UnixListener::bind(&path).unwrap();
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o620)).unwrap();
    std::os::unix::fs::lchown(&path, Some(33), Some(44)).unwrap();
    let client = UnixStream::connect(&path).unwrap();
    let (served, _) = listener.accept().unwrap();
    let waiting = UnixStream::connect(&path).unwrap();
    (&client).write_all(b"request").unwrap();
    let all = [listener.as_fd(), client.as_fd(), served.as_fd(), waiting.as_fd()];
    let numbers = all.map(|fd| fd.as_raw_fd());
    let child = Child::holding(&all);
    drop((listener, client, served, waiting));
    let captured = child.capture();
    drop(child);

    let copy = rebuild(&captured);
    let listener = UnixListener::from(copy.of(numbers[0]));
    let (client, served) =
        (UnixStream::from(copy.of(numbers[1])), UnixStream::from(copy.of(numbers[2])));
    let waiting = UnixStream::from(copy.of(numbers[3]));
    let mut text = [0; 7];
    (&served).read_exact(&mut text).unwrap();
    assert_eq!(&text, b"request");
    assert_eq!(served.local_addr().unwrap().as_pathname(), Some(path.as_path()));
    assert_eq!(client.peer_addr().unwrap().as_pathname(), Some(path.as_path()));
    let (accepted, _) = listener.accept().unwrap();
    (&waiting).write_all(b"now").unwrap();
    (&accepted).read_exact(&mut text[..3]).unwrap();
    let (new, _) = (UnixStream::connect(&path).unwrap(), listener.accept().unwrap());
    drop(new);
    let metadata = std::fs::metadata(&path).unwrap();
    use std::os::unix::fs::MetadataExt;
    assert_eq!((metadata.mode() & 0o777, metadata.uid(), metadata.gid()), (0o620, 33, 44));
}

#[test]
fn abstract_names_are_kept_by_servers_and_accepted_ends() {
    use std::os::linux::net::SocketAddrExt;
    new_network();
    let address = std::os::unix::net::SocketAddr::from_abstract_name("ferry test").unwrap();
    let listener = UnixListener::bind_addr(&address).unwrap();
    let clients = [0, 1].map(|_| UnixStream::connect_addr(&address).unwrap());
    let served = [0, 1].map(|_| listener.accept().unwrap().0);
    let all = [
        listener.as_fd(),
        clients[0].as_fd(),
        clients[1].as_fd(),
        served[0].as_fd(),
        served[1].as_fd(),
    ];
    let numbers = all.map(|fd| fd.as_raw_fd());
    let child = Child::holding(&all);
    let captured = child.capture();
    drop((listener, clients, served, child));

    let copy = rebuild(&captured);
    let served = UnixStream::from(copy.of(numbers[4]));
    let name = served.local_addr().unwrap();
    assert_eq!(name.as_abstract_name(), Some(&b"ferry test"[..]));
    (&served).write_all(b"hello").unwrap();
    let mut text = [0; 5];
    UnixStream::from(copy.of(numbers[2])).read_exact(&mut text).unwrap();
    let new = UnixStream::connect_addr(&address).unwrap();
    UnixListener::from(copy.of(numbers[0])).accept().unwrap();
    drop(new);
}

#[test]
fn datagrams_keep_their_receivers_senders_and_bounds() {
    let directory = tempfile::tempdir().unwrap();
    let log = directory.path().join("log");
    let from = directory.path().join("from");
    let receiver = UnixDatagram::bind(&log).unwrap();
    let connected = UnixDatagram::unbound().unwrap();
    connected.connect(&log).unwrap();
    let named = UnixDatagram::bind(&from).unwrap();
    connected.send(b"one").unwrap();
    named.send_to(b"", &log).unwrap();
    named.send_to(b"three", &log).unwrap();
    let all = [receiver.as_fd(), connected.as_fd(), named.as_fd()];
    let numbers = all.map(|fd| fd.as_raw_fd());
    let child = Child::holding(&all);
    drop((receiver, connected, named));
    let captured = child.capture();
    drop(child);

    let copy = rebuild(&captured);
    let [receiver, connected, _named] = numbers.map(|number| UnixDatagram::from(copy.of(number)));
    let mut buffer = [0; 100];
    let (length, sender) = receiver.recv_from(&mut buffer).unwrap();
    assert_eq!((&buffer[..length], sender.is_unnamed()), (&b"one"[..], true));
    let (length, sender) = receiver.recv_from(&mut buffer).unwrap();
    assert_eq!((length, sender.as_pathname()), (0, Some(from.as_path())));
    let (length, _) = receiver.recv_from(&mut buffer).unwrap();
    assert_eq!(&buffer[..length], b"three");
    connected.send(b"still there").unwrap();
    assert_eq!(receiver.recv(&mut buffer).unwrap(), 11);
    UnixDatagram::unbound().unwrap().send_to(b"new", &log).unwrap();
    assert_eq!(receiver.recv(&mut buffer).unwrap(), 3);
}

#[test]
fn a_removed_receiver_is_still_reached_by_those_connected_to_it() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("gone");
    let receiver = UnixDatagram::bind(&path).unwrap();
    let connected = UnixDatagram::unbound().unwrap();
    connected.connect(&path).unwrap();
    std::fs::remove_file(&path).unwrap();
    let child = Child::holding(&[receiver.as_fd(), connected.as_fd()]);
    let numbers = [receiver.as_raw_fd(), connected.as_raw_fd()];
    let captured = child.capture();
    drop((receiver, connected, child));
    let copy = rebuild(&captured);
    assert!(!path.exists());
    let [receiver, connected] = numbers.map(|number| UnixDatagram::from(copy.of(number)));
    connected.send(b"here").unwrap();
    assert_eq!(receiver.recv(&mut [0; 9]).unwrap(), 4);
    assert_eq!(receiver.local_addr().unwrap().as_pathname(), Some(path.as_path()));
}

/// What a program reads, up to each place where a read ends, and the urgent byte before all that.
fn read_urgently(stream: &mut UnixStream) -> (u8, Vec<Vec<u8>>) {
    let mut urgent = [0];
    let flags = nix::sys::socket::MsgFlags::MSG_OOB | nix::sys::socket::MsgFlags::MSG_PEEK;
    nix::sys::socket::recv(stream.as_raw_fd(), &mut urgent, flags).unwrap();
    options::set(stream.as_fd(), libc::SOL_SOCKET, libc::SO_OOBINLINE, 1).unwrap();
    stream.set_nonblocking(true).unwrap();
    let (mut reads, mut buffer) = (Vec::new(), [0; 100]);
    while let Ok(length @ 1..) = stream.read(&mut buffer) {
        reads.push(buffer[..length].to_vec());
    }
    (urgent[0], reads)
}

#[test]
fn an_urgent_byte_stays_where_it_is() {
    type Texts = &'static [&'static [u8]];
    let urgent = |near: &UnixStream, byte: &[u8]| {
        let flags = nix::sys::socket::MsgFlags::MSG_OOB;
        assert_eq!(nix::sys::socket::send(near.as_raw_fd(), byte, flags).unwrap(), 1);
    };
    let usual = |near: &UnixStream, text: &[u8]| send_with(near.as_fd(), text, &[]);
    // What is sent, `!` before what is urgent and `+` before what has descriptors; and what is read.
    let cases: [(Texts, Texts); 5] = [
        (&[b"ab", b"!U", b"cU"], &[b"ab", b"UcU"]),
        (&[b"!U", b"U"], &[b"UU"]),
        (&[b"U", b"!U"], &[b"U", b"U"]),
        // An earlier one has become a usual one.
        (&[b"!e", b"d", b"!U"], &[b"ed", b"U"]),
        (&[b"+F", b"!U", b"x"], &[b"F", b"Ux"]),
    ];
    for (inline, (sent, expected)) in [0, 1].into_iter().cycle().zip(&cases) {
        let (near, far) = UnixStream::pair().unwrap();
        for text in *sent {
            match text {
                [b'!', byte @ ..] => urgent(&near, byte),
                [b'+', text @ ..] => send_with(near.as_fd(), text, &[near.as_fd()]),
                text => usual(&near, text),
            }
        }
        options::set(far.as_fd(), libc::SOL_SOCKET, libc::SO_OOBINLINE, inline).unwrap();
        let number = far.as_raw_fd();
        let child = Child::holding(&[near.as_fd(), far.as_fd()]);
        let captured = child.capture();
        let kept = options::number(far.as_fd(), libc::SOL_SOCKET, libc::SO_OOBINLINE).unwrap();
        assert_eq!(kept, inline, "nothing is changed in the source");
        drop(child);
        for far in [far.into(), rebuild(&captured).of(number)] {
            options::set(far.as_fd(), libc::SOL_SOCKET, libc::SO_OOBINLINE, 0).unwrap();
            let (byte, found) = read_urgently(&mut UnixStream::from(far));
            assert_eq!((byte, found), (b'U', expected.iter().map(|it| it.to_vec()).collect()));
        }
    }
}

#[test]
fn an_urgent_byte_that_cannot_be_found_is_waited_for() {
    let (near, far) = UnixStream::pair().unwrap();
    send_with(near.as_fd(), b"F", &[near.as_fd()]);
    send_with(near.as_fd(), b"U", &[near.as_fd()]);
    let flags = nix::sys::socket::MsgFlags::MSG_OOB;
    assert_eq!(nix::sys::socket::send(near.as_raw_fd(), b"U", flags).unwrap(), 1);
    let child = Child::holding(&[near.as_fd(), far.as_fd()]);
    let refused = crate::files::capture(&child.source()).unwrap_err();
    assert!(refused.iter().all(|why| why.object.contains("urgent data")), "{refused:?}");
    let mut byte = [0];
    assert_eq!(nix::sys::socket::recv(far.as_raw_fd(), &mut byte, flags).unwrap(), 1);
    assert_eq!(&byte, b"U");
    drop(child.capture());
}

#[test]
fn the_end_of_a_seqpacket_comes_behind_its_last_message() {
    for closed in [true, false] {
        let (near, far) = socket::pair(libc::SOCK_SEQPACKET).unwrap();
        for message in [&b"one"[..], b"", b"two", b""] {
            send_with(near.as_fd(), message, &[]);
        }
        let (fd, kept) = (far.as_raw_fd(), near.as_raw_fd());
        let child = match closed {
            true => {
                drop(near);
                Child::holding(&[far.as_fd()])
            }
            false => {
                socket::shutdown(near.as_fd(), libc::SHUT_WR).unwrap();
                Child::holding(&[far.as_fd(), near.as_fd()])
            }
        };
        let captured = child.capture();
        let number = |option| options::number(far.as_fd(), libc::SOL_SOCKET, option).unwrap();
        assert_eq!((number(libc::SO_PASSCRED), number(libc::SO_PEEK_OFF)), (0, -1));
        drop((far, child));
        let copy = rebuild(&captured);
        let far = copy.of(fd);
        let _near = (!closed).then(|| copy.of(kept));
        drop(copy);
        let read =
            || socket::receive(far.as_fd(), &mut [0; 100], libc::MSG_DONTWAIT).unwrap().length;
        assert_eq!([(); 6].map(|()| read()), [3, 0, 3, 0, 0, 0]);
    }
}

#[test]
fn messages_of_a_seqpacket_stay_apart_and_credentials_stay_with_them() {
    let (near, far) = socket::pair(libc::SOCK_SEQPACKET).unwrap();
    options::set(far.as_fd(), libc::SOL_SOCKET, libc::SO_PASSCRED, 1).unwrap();
    for message in [&b"one"[..], b"two"] {
        let part = [IoSlice::new(message)];
        nix::sys::socket::sendmsg::<()>(
            near.as_raw_fd(),
            &part,
            &[],
            nix::sys::socket::MsgFlags::empty(),
            None,
        )
        .unwrap();
    }
    let child = Child::holding(&[near.as_fd(), far.as_fd()]);
    let number = far.as_raw_fd();
    let captured = child.capture();
    drop((near, far, child));
    let copy = rebuild(&captured);
    let far: OwnedFd = copy.of(number);
    let mut buffer = [0; 100];
    let first = socket::receive(far.as_fd(), &mut buffer, 0).unwrap();
    assert_eq!(&buffer[..first.length], b"one");
    assert!(first.credentials.is_some(), "SO_PASSCRED is kept");
    let second = socket::receive(far.as_fd(), &mut buffer, 0).unwrap();
    assert_eq!(&buffer[..second.length], b"two");
}

#[test]
fn a_sender_who_has_gone_is_seen_as_the_user_that_it_was() {
    let (near, far) = socket::pair(libc::SOCK_STREAM).unwrap();
    options::set(far.as_fd(), libc::SOL_SOCKET, libc::SO_PASSCRED, 1).unwrap();
    // This process is none of the VE, just as one that has ended.
    let credentials = Some((std::process::id().cast_signed(), 5, 7));
    socket::send(near.as_fd(), b"x", &Along { credentials, ..Along::default() }, 0).unwrap();
    let child = Child::holding(&[near.as_fd(), far.as_fd()]);
    let number = far.as_raw_fd();
    let captured = child.capture();
    drop((near, far, child));
    let mut target = Target::new(0).unwrap();
    target.processes.insert(1, std::process::id().cast_signed());
    let copy = rebuild_in(&captured, target);
    let seen = socket::receive(copy.of(number).as_fd(), &mut [0], 0).unwrap().credentials;
    let (pid, uid, gid) = seen.unwrap();
    assert_eq!((uid, gid), (5, 7));
    assert!(pid > 0 && !std::fs::exists(format!("/proc/{pid}")).unwrap(), "{pid}");
}

#[test]
fn what_a_dead_peer_has_sent_can_still_be_read() {
    let (near, far) = UnixStream::pair().unwrap();
    (&near).write_all(b"testament").unwrap();
    drop(near);
    let child = Child::holding(&[far.as_fd()]);
    let number = far.as_raw_fd();
    let captured = child.capture();
    drop((far, child));
    let copy = rebuild(&captured);
    let mut text = String::new();
    UnixStream::from(copy.of(number)).read_to_string(&mut text).unwrap();
    assert_eq!(text, "testament");
}

#[test]
fn peers_are_seen_as_the_users_that_they_were() {
    let (near, far) =
        crate::sys::identity::act_as(33, 34, || socket::pair(libc::SOCK_STREAM)).unwrap();
    let child = Child::holding(&[near.as_fd(), far.as_fd()]);
    let number = far.as_raw_fd();
    let captured = child.capture();
    drop((near, far, child));
    let copy = rebuild(&captured);
    let mut ids = [0; 12];
    let far = copy.of(number);
    socket::option(far.as_fd(), libc::SOL_SOCKET, libc::SO_PEERCRED, &mut ids).unwrap();
    assert_eq!((ids[4], ids[8]), (33, 34));
}

/// A service that logs as its own user: systemd connects it to the journal so.
#[test]
fn the_ends_of_a_named_connection_may_see_different_users() {
    let directory = tempfile::tempdir().unwrap();
    for accepted_first in [true, false] {
        let path = directory.path().join(format!("journal {accepted_first}"));
        let listener = UnixListener::bind(&path).unwrap();
        // For everybody, as the journal is.
        for place in [directory.path(), &path] {
            std::fs::set_permissions(place, std::fs::Permissions::from_mode(0o777)).unwrap();
        }
        let mut client =
            crate::sys::identity::act_as(33, 34, || UnixStream::connect(&path)).unwrap();
        let (server, _) = listener.accept().unwrap();
        if accepted_first {
            // Under a higher number, by which they are ordered.
            client = client.try_clone().unwrap();
        }
        let held = [server.as_fd(), client.as_fd(), listener.as_fd()];
        let child = Child::holding(&held);
        let numbers = [server.as_raw_fd(), client.as_raw_fd()];
        let captured = child.capture();
        drop((server, client, child));
        let copy = rebuild(&captured);
        let [server, client] = numbers.map(|number| UnixStream::from(copy.of(number)));
        drop(copy);
        let user = |end: &UnixStream| {
            let mut ids = [0; 12];
            socket::option(end.as_fd(), libc::SOL_SOCKET, libc::SO_PEERCRED, &mut ids).unwrap();
            (ids[4], ids[8])
        };
        assert_eq!((user(&server), user(&client)), ((33, 34), (0, 0)));
        assert_eq!(server.local_addr().unwrap().as_pathname(), Some(path.as_path()));
        assert!(client.local_addr().unwrap().is_unnamed(), "{accepted_first}");
        (&client).write_all(b"line").unwrap();
        let mut bytes = [0; 4];
        (&server).read_exact(&mut bytes).unwrap();
        assert_eq!(&bytes, b"line");
    }
}

#[test]
fn a_peer_outside_the_ve_is_a_blocker() {
    let (near, far) = UnixStream::pair().unwrap();
    let child = Child::holding(&[near.as_fd()]);
    let blockers = child.blockers();
    assert_eq!(blockers.len(), 1);
    assert_eq!(blockers[0].object, "a unix socket whose other end is outside the VE");
    drop(far);
    assert_eq!(child.blockers(), []);
}
