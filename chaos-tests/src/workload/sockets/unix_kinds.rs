//! Unix sockets in their rarer forms.

use std::fs::{self, File};
use std::io::{ErrorKind, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram, UnixListener, UnixStream};
use std::time::Duration;

use ckpt_engine::sys::program::message;
use ckpt_engine::sys::{descriptor, identity, socket};

use super::plain::{number, readable, set};
use crate::workload::context::Context;
use crate::workload::outcome::{Failure, LATE, ensure, same};
use crate::workload::process::Child;

const PAUSE: Duration = Duration::from_millis(5);
const SOL: i32 = libc::SOL_SOCKET;

fn talk(one: &mut UnixStream, two: &mut UnixStream, byte: u8) -> Result<(), Failure> {
    one.write_all(&[byte])?;
    let mut found = [0];
    two.read_exact(&mut found)?;
    same("a byte over a unix socket", found[0], byte)
}

/// Messages with the credentials of their sender.
pub(super) fn credentials(context: &mut Context) -> Result<(), Failure> {
    let (one, two) = UnixDatagram::pair()?;
    set(&two, (SOL, libc::SO_PASSCRED, 1))?;
    let mut own = (std::process::id().cast_signed(), nix::unistd::geteuid().as_raw());
    one.send(b"first")?;
    let (from, to) = UnixStream::pair()?;
    set(&to, (SOL, libc::SO_PASSCRED, 1))?;
    // A user who has gone, who is seen as often as one looks ahead.
    let gone = Child::start(context, "stranger", |_| {
        nix::unistd::setgid(nix::unistd::Gid::from_raw(7))?;
        nix::unistd::setuid(nix::unistd::Uid::from_raw(5))?;
        Ok((&from).write_all(b"x")?)
    })?;
    let number = gone.pid.as_raw();
    gone.finish()?;
    while context.step(PAUSE)? {
        let seen = socket::receive(to.as_fd(), &mut [0; 10], libc::MSG_PEEK)?.credentials;
        let (pid, uid, gid) = seen.unwrap_or_default();
        same("the user who has gone", (uid, gid), (5, 7))?;
        let is_gone = pid > 0 && (pid == number || fs::metadata(format!("/proc/{pid}")).is_err());
        ensure(is_gone, || format!("process {pid} seems to have sent a message"))?;
        one.send(b"next")?;
        let got = socket::receive(two.as_fd(), &mut [0; 10], libc::MSG_DONTWAIT)?;
        let found = got.credentials.map(|(pid, uid, _)| (pid, uid));
        same("who has sent a message", found, Some(own))?;
        if context.progress.plant() {
            own.0 += 1;
        }
    }
    Ok(())
}

/// Whom a socket shows as its peer. A service that logs as its own user is such a stranger.
pub(super) fn peer(context: &mut Context) -> Result<(), Failure> {
    const STRANGER: u32 = 65534;
    let (one, _two) = UnixStream::pair()?;
    let path = context.path("peer.socket");
    let listener = UnixListener::bind(&path)?;
    let client = UnixStream::connect(&path)?;
    let (server, _) = listener.accept()?;
    let mut user = nix::unistd::geteuid().as_raw();
    let connect = move || {
        identity::own_new_files(user, user)?;
        identity::act_as(STRANGER, STRANGER, || UnixStream::connect(path))
    };
    // On a thread that ends with what it has changed.
    let stranger = std::thread::spawn(connect).join();
    let stranger = stranger.unwrap_or_else(|_| Err(ErrorKind::Other.into()))?;
    let (visited, _) = listener.accept()?;
    while context.step(PAUSE)? {
        for (end, seen) in [
            (&one, user),
            (&client, user),
            (&server, user),
            (&stranger, user),
            (&visited, STRANGER),
        ] {
            let mut bytes = [0; 12];
            socket::option(end.as_fd(), SOL, libc::SO_PEERCRED, &mut bytes)?;
            let found = u32::from_ne_bytes([4, 5, 6, 7].map(|at: usize| bytes[at]));
            same("user at the other end", found, seen)?;
        }
        if context.progress.plant() {
            user += 1;
        }
    }
    Ok(())
}

/// Clients that wait for a listener, in their order.
pub(super) fn backlog(context: &mut Context) -> Result<(), Failure> {
    let path = context.path("backlog.socket");
    let listener = UnixListener::bind(&path)?;
    let mut waiting = Vec::new();
    for _ in 0..4 {
        waiting.push(UnixStream::connect(&path)?);
    }
    let mut turn = 0u8;
    while context.step(PAUSE)? {
        turn = turn.wrapping_add(1);
        waiting.push(UnixStream::connect(&path)?);
        let (mut server, _) = listener.accept()?;
        let mut client = waiting.remove(0);
        client.set_read_timeout(Some(LATE))?;
        talk(&mut server, &mut client, turn)?;
        if context.progress.plant() {
            listener.accept()?;
        }
    }
    Ok(())
}

/// A listener whose node was given another name.
pub(super) fn renamed(context: &mut Context) -> Result<(), Failure> {
    let (old, new) = (context.path("old.socket"), context.path("new.socket"));
    let listener = UnixListener::bind(&old)?;
    fs::rename(&old, &new)?;
    let mut turn = 0u8;
    while context.step(PAUSE)? {
        turn = turn.wrapping_add(1);
        let mut client = UnixStream::connect(&new)?;
        let (mut server, _) = listener.accept()?;
        talk(&mut client, &mut server, turn)?;
        let name = listener.local_addr()?;
        same("its own name", name.as_pathname(), Some(old.as_path()))?;
        let gone = UnixStream::connect(&old).map_err(|error| error.kind());
        ensure(matches!(gone, Err(ErrorKind::NotFound)), || format!("{gone:?}"))?;
        if context.progress.plant() {
            fs::rename(&new, &old)?;
        }
    }
    Ok(())
}

/// A receiver whose node is gone; a sender that had connected before.
pub(super) fn unlinked(context: &mut Context) -> Result<(), Failure> {
    let path = context.path("gone.socket");
    let receiver = UnixDatagram::bind(&path)?;
    let sender = UnixDatagram::unbound()?;
    sender.connect(&path)?;
    fs::remove_file(&path)?;
    receiver.set_read_timeout(Some(LATE))?;
    let mut number = 0u64;
    sender.send(&number.to_le_bytes())?;
    while context.step(PAUSE)? {
        let mut bytes = [0; 8];
        receiver.recv(&mut bytes)?;
        same("a message to a nameless receiver", u64::from_le_bytes(bytes), number)?;
        let name = receiver.local_addr()?;
        same("its own name", name.as_pathname(), Some(path.as_path()))?;
        number += 1;
        sender.send(&number.to_le_bytes())?;
        ensure(!path.exists(), || "the node is back".to_owned())?;
        if context.progress.plant() {
            number += 1;
        }
    }
    Ok(())
}

/// Abstract names, chosen and given by the kernel.
pub(super) fn names(context: &mut Context) -> Result<(), Failure> {
    let text = format!("selfcheck names {}", std::process::id());
    let chosen = SocketAddr::from_abstract_name(text.as_bytes())?;
    let receiver = UnixDatagram::bind_addr(&chosen)?;
    let sender = UnixDatagram::unbound()?;
    // A name of no length: the kernel chooses one.
    socket::bind(sender.as_fd(), &[libc::AF_UNIX as u8, 0])?;
    let own = sender.local_addr()?;
    receiver.set_read_timeout(Some(LATE))?;
    let mut expected = own.as_abstract_name().map(<[u8]>::to_vec);
    sender.send_to_addr(b"first", &chosen)?;
    while context.step(PAUSE)? {
        sender.send_to_addr(b"next", &chosen)?;
        let (_, from) = receiver.recv_from(&mut [0; 10])?;
        same("name of a sender", from.as_abstract_name().map(<[u8]>::to_vec), expected.clone())?;
        let taken = UnixDatagram::bind_addr(&chosen).map_err(|error| error.kind());
        ensure(matches!(taken, Err(ErrorKind::AddrInUse)), || format!("{taken:?}"))?;
        if context.progress.plant() {
            expected = None;
        }
    }
    Ok(())
}

/// A pidfd of the own process, in flight.
pub(super) fn pidfd(context: &mut Context) -> Result<(), Failure> {
    let (one, two) = UnixStream::pair()?;
    let own = std::process::id().cast_signed();
    let put = || -> Result<(), Failure> {
        let pidfd = descriptor::open_process(own, false)?;
        message::send(one.as_fd(), b"p", &[pidfd.as_fd()])?;
        Ok(())
    };
    put()?;
    put()?;
    while context.step(PAUSE)? {
        let (_, mut fds) = message::receive(two.as_fd(), &mut [0; 1])?;
        let Some(pidfd) = fds.pop() else { return Err(Failure::new("no descriptor came")) };
        let info = fs::read_to_string(format!(
            "/proc/self/fdinfo/{}",
            std::os::fd::AsRawFd::as_raw_fd(&pidfd)
        ))?;
        let pid = info.lines().find_map(|line| line.strip_prefix("Pid:\t"));
        same("whom a pidfd shows", pid, Some(own.to_string().as_str()))?;
        put()?;
        if context.progress.plant() {
            message::receive(two.as_fd(), &mut [0; 1])?;
            message::receive(two.as_fd(), &mut [0; 1])?;
            message::send(one.as_fd(), b"p", &[])?;
        }
    }
    Ok(())
}

/// A socket that lies in its own queue, and a queue within a queue.
pub(super) fn nested(context: &mut Context) -> Result<(), Failure> {
    let (one, two) = UnixStream::pair()?;
    let (mut inner, hidden) = UnixStream::pair()?;
    inner.write_all(b"inside")?;
    message::send(one.as_fd(), b"a", &[two.as_fd()])?;
    message::send(one.as_fd(), b"b", &[hidden.as_fd()])?;
    drop(hidden);
    while context.step(PAUSE)? {
        let (_, own) = message::receive(two.as_fd(), &mut [0; 1])?;
        let (_, mut hidden) = message::receive(two.as_fd(), &mut [0; 1])?;
        let Some(hidden) = hidden.pop() else { return Err(Failure::new("no descriptor came")) };
        let mut hidden = UnixStream::from(hidden);
        let mut text = [0; 6];
        hidden.read_exact(&mut text)?;
        same("what was in a queue within a queue", &text, b"inside")?;
        inner.write_all(if context.progress.plant() { b"damage" } else { b"inside" })?;
        let own: Vec<_> = own.iter().map(AsFd::as_fd).collect();
        same("descriptors of itself", own.len(), 1)?;
        message::send(one.as_fd(), b"a", &own)?;
        message::send(one.as_fd(), b"b", &[hidden.as_fd()])?;
    }
    Ok(())
}

/// A pipe whose reading end nobody holds but a queue.
pub(super) fn pipe(context: &mut Context) -> Result<(), Failure> {
    // Made before the sockets, so that it is looked at before their queues.
    let (reader, mut writer) = std::io::pipe()?;
    let (one, two) = UnixStream::pair()?;
    message::send(one.as_fd(), b"p", &[reader.as_fd()])?;
    drop(reader);
    let mut number = 0u64;
    while context.step(PAUSE)? {
        writer.write_all(&number.to_le_bytes())?;
        let (_, mut ends) = message::receive(two.as_fd(), &mut [0; 1])?;
        let Some(end) = ends.pop() else { return Err(Failure::new("no descriptor came")) };
        let mut reader = File::from(end);
        let mut bytes = [0; 8];
        reader.read_exact(&mut bytes)?;
        same("what came through the pipe", u64::from_le_bytes(bytes), number)?;
        number += 1;
        if context.progress.plant() {
            writer.write_all(b"damage")?;
        }
        message::send(one.as_fd(), b"p", &[reader.as_fd()])?;
    }
    Ok(())
}

/// A sender that waits for room in the queue of its receiver.
pub(super) fn blocked_sender(context: &mut Context) -> Result<(), Failure> {
    let path = context.path("full.socket");
    let receiver = UnixDatagram::bind(&path)?;
    let sender = UnixDatagram::unbound()?;
    sender.connect(&path)?;
    receiver.set_read_timeout(Some(LATE))?;
    let thread = std::thread::spawn(move || {
        let mut number = 0u64;
        // Ends when the receiver goes.
        while sender.send(&number.to_le_bytes()).is_ok() {
            number += 1;
        }
    });
    let mut number = 0u64;
    while context.step(PAUSE)? {
        let mut bytes = [0; 8];
        receiver.recv(&mut bytes)?;
        same("a message of a waiting sender", u64::from_le_bytes(bytes), number)?;
        number += 1 + u64::from(context.progress.plant());
    }
    drop(receiver);
    thread.join().map_err(|_| Failure::new("the sender panicked"))
}

/// Many senders with names, one receiver.
pub(super) fn senders(context: &mut Context) -> Result<(), Failure> {
    let path = context.path("receiver.socket");
    let receiver = UnixDatagram::bind(&path)?;
    receiver.set_read_timeout(Some(LATE))?;
    let mut senders = Vec::new();
    for number in 0..6 {
        let own = context.path(&format!("sender{number}.socket"));
        senders.push((UnixDatagram::bind(&own)?, own));
    }
    let mut turn = 0;
    senders[0].0.send_to(b"x", &path)?;
    while context.step(PAUSE)? {
        let at = turn % senders.len();
        turn += 1;
        let (_, from) = receiver.recv_from(&mut [0; 10])?;
        same("name of a sender", from.as_pathname(), Some(senders[at].1.as_path()))?;
        receiver.send_to(b"answer", &senders[at].1)?;
        let mut text = [0; 6];
        senders[at].0.recv(&mut text)?;
        same("an answer", &text, b"answer")?;
        senders[turn % senders.len()].0.send_to(b"x", &path)?;
        if context.progress.plant() {
            turn += 1;
        }
    }
    Ok(())
}

/// Data of a peer that has gone, and the end behind it.
pub(super) fn dead_peer(context: &mut Context) -> Result<(), Failure> {
    let make = || -> Result<UnixStream, Failure> {
        let (mut one, two) = UnixStream::pair()?;
        one.write_all(&[7; 200])?;
        Ok(two)
    };
    let mut left = make()?;
    let mut taken = 0;
    while context.step(PAUSE)? {
        let mut byte = [0];
        let count = left.read(&mut byte)?;
        if count == 0 {
            same("bytes before the end", taken, 200)?;
            left = make()?;
            taken = 0;
        } else {
            same("a byte of a dead peer", byte, [7])?;
            taken += count;
        }
        let refused = left.write(b"x").map_err(|error| error.kind());
        same("writing to a dead peer", refused, Err(ErrorKind::BrokenPipe))?;
        if context.progress.plant() {
            left.read_exact(&mut byte)?;
        }
    }
    Ok(())
}

/// Each way closed by one end.
pub(super) fn half(context: &mut Context) -> Result<(), Failure> {
    use std::net::Shutdown;
    let (mut one, mut two) = UnixStream::pair()?;
    one.shutdown(Shutdown::Write)?;
    let mut turn = 0u8;
    while context.step(PAUSE)? {
        turn = turn.wrapping_add(1);
        talk(&mut two, &mut one, turn)?;
        same("behind the end of the closed way", two.read(&mut [0])?, 0)?;
        if context.progress.plant() {
            two.write_all(b"?")?;
        }
    }
    Ok(())
}

/// Packets with bounds over a connection by name.
pub(super) fn packets(context: &mut Context) -> Result<(), Failure> {
    let path = context.path("packets.socket");
    let listener = socket::socket(libc::AF_UNIX, libc::SOCK_SEQPACKET, 0)?;
    let mut name = (libc::AF_UNIX as u16).to_ne_bytes().to_vec();
    name.extend(std::os::unix::ffi::OsStrExt::as_bytes(path.as_os_str()));
    name.push(0);
    socket::bind(listener.as_fd(), &name)?;
    socket::listen(listener.as_fd(), 4)?;
    let client: OwnedFd = socket::socket(libc::AF_UNIX, libc::SOCK_SEQPACKET, 0)?;
    socket::connect(client.as_fd(), &name)?;
    let server = socket::accept(listener.as_fd())?;
    message::send(client.as_fd(), &[0; 1], &[])?;
    let mut turn = 0;
    while context.step(PAUSE)? {
        message::send(client.as_fd(), &vec![1; 1 + (turn + 1) % 50], &[])?;
        let mut buffer = [0; 100];
        let (count, _) = message::receive(server.as_fd(), &mut buffer)?;
        same("length of a packet", count, 1 + turn % 50)?;
        turn += 1;
        let waits = readable(server.as_fd(), Duration::ZERO)?;
        ensure(waits, || "a packet is missing".to_owned())?;
        if context.progress.plant() {
            message::receive(server.as_fd(), &mut buffer)?;
        }
    }
    Ok(())
}

/// Packets of a peer that has gone, or has closed its way, and the end behind them.
pub(super) fn last_packets(context: &mut Context) -> Result<(), Failure> {
    let make = || -> Result<_, Failure> {
        let (gone, closed) =
            (socket::pair(libc::SOCK_SEQPACKET)?, socket::pair(libc::SOCK_SEQPACKET)?);
        for sender in [&gone.0, &closed.0] {
            message::send(sender.as_fd(), b"one", &[])?;
            message::send(sender.as_fd(), b"last", &[])?;
        }
        socket::shutdown(closed.0.as_fd(), libc::SHUT_WR)?;
        Ok((gone.1, closed))
    };
    let mut made = make()?;
    while context.step(PAUSE)? {
        let (left, (silent, listening)) = &made;
        if context.progress.plant() {
            message::receive(left.as_fd(), &mut [0; 9])?;
        }
        let mut lengths = Vec::new();
        for receiver in [left, listening] {
            for _ in 0..4 {
                lengths.push(message::receive(receiver.as_fd(), &mut [0; 9])?.0);
            }
        }
        same("lengths of packets", lengths, vec![3, 4, 0, 0, 3, 4, 0, 0])?;
        message::send(listening.as_fd(), b"back", &[])?;
        same("the way back", message::receive(silent.as_fd(), &mut [0; 9])?.0, 4)?;
        made = make()?;
    }
    Ok(())
}

/// Files in flight: their offset is shared with the one that stayed.
pub(super) fn offsets(context: &mut Context) -> Result<(), Failure> {
    let (one, two) = UnixStream::pair()?;
    let path = context.path("numbers");
    fs::write(&path, (0..=255u8).collect::<Vec<_>>())?;
    let mut file = File::open(&path)?;
    message::send(one.as_fd(), b"f", &[file.as_fd()])?;
    let mut place = 0u8;
    while context.step(PAUSE)? {
        let mut byte = [0];
        if file.read(&mut byte)? == 0 {
            file = File::open(&path)?;
            place = 0;
            message::receive(two.as_fd(), &mut [0; 1])?;
            message::send(one.as_fd(), b"f", &[file.as_fd()])?;
            continue;
        }
        same("a byte of a shared file", byte[0], place)?;
        let (_, fds) = message::receive(two.as_fd(), &mut [0; 1])?;
        let Some(same_file) = fds.first() else { return Err(Failure::new("no descriptor came")) };
        let mut shared = File::from(same_file.try_clone()?);
        place = place.wrapping_add(1);
        if shared.read(&mut byte)? == 1 {
            same("a byte of the same file in flight", byte[0], place)?;
            place = place.wrapping_add(1 + u8::from(context.progress.plant()));
        }
        message::send(one.as_fd(), b"f", &[same_file.as_fd()])?;
    }
    Ok(())
}

/// Options of unix sockets.
pub(super) fn options(context: &mut Context) -> Result<(), Failure> {
    let (one, two) = UnixStream::pair()?;
    set(&one, (SOL, libc::SO_SNDBUF, 20_000))?;
    set(&one, (SOL, libc::SO_PRIORITY, 3))?;
    set(&two, (SOL, libc::SO_PASSCRED, 1))?;
    one.set_read_timeout(Some(Duration::from_millis(30)))?;
    let size = number(&one, SOL, libc::SO_SNDBUF)?;
    while context.step(Duration::ZERO)? {
        same("SO_SNDBUF", number(&one, SOL, libc::SO_SNDBUF)?, size)?;
        same("SO_PRIORITY", number(&one, SOL, libc::SO_PRIORITY)?, 3)?;
        same("SO_PASSCRED", number(&two, SOL, libc::SO_PASSCRED)?, 1)?;
        let timeout = (&one).read(&mut [0]).map_err(|error| error.kind());
        same("a read in vain", timeout, Err(ErrorKind::WouldBlock))?;
        if context.progress.plant() {
            set(&one, (SOL, libc::SO_PRIORITY, 4))?;
        }
    }
    Ok(())
}
