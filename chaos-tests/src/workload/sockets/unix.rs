//! Unix sockets of each type: queued data with its bounds, descriptors in flight, names.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram, UnixListener, UnixStream};
use std::time::Duration;

use ckpt_engine::sys::program::message;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};

use super::both_ways::BothWays;
use crate::workload::context::Context;
use crate::workload::outcome::{Failure, ensure, same};
use crate::workload::process::Child;

pub(super) fn run(context: &mut Context) -> Result<(), Failure> {
    let (one, two) = UnixStream::pair()?;
    let mut stream = BothWays::new([one, two], [1, 2], 9000, 700)?;
    let mut datagrams = Messages::new(SockType::Datagram)?;
    let mut packets = Messages::new(SockType::SeqPacket)?;
    let mut flight = Flight::new()?;
    let named = Named::new(context)?;
    let mut log = Log::new(context)?;
    let (mut near, mut far) = UnixStream::pair()?;
    let echo = Child::start(context, "echo", |_| {
        let mut byte = [0];
        while far.read(&mut byte)? == 1 && byte != [0] {
            far.write_all(&byte)?;
        }
        Ok(())
    })?;
    let mut turn = 0u8;
    while context.step(Duration::from_millis(4))? {
        stream.turn()?;
        datagrams.turn()?;
        packets.turn()?;
        flight.turn()?;
        named.turn()?;
        log.turn()?;
        echo.check()?;
        turn = turn % 200 + 1;
        near.write_all(&[turn])?;
        let mut byte = [0];
        near.read_exact(&mut byte)?;
        same("answer on a unix socket", byte[0], turn)?;
        if context.progress.plant() {
            message::receive(datagrams.back.as_fd(), &mut [0; 10])?;
        }
    }
    near.write_all(&[0])?;
    echo.finish()
}

/// Messages that keep their bounds, a few of them always unread.
struct Messages {
    front: OwnedFd,
    back: OwnedFd,
    sent: u64,
    taken: u64,
}

impl Messages {
    fn new(kind: SockType) -> Result<Self, Failure> {
        let (front, back) = socketpair(AddressFamily::Unix, kind, None, SockFlag::SOCK_CLOEXEC)?;
        let mut messages = Self { front, back, sent: 0, taken: 0 };
        for _ in 0..6 {
            messages.put()?;
        }
        Ok(messages)
    }

    fn put(&mut self) -> Result<(), Failure> {
        let text = vec![self.sent as u8; 1 + (self.sent % 90) as usize];
        message::send(self.front.as_fd(), &text, &[])?;
        self.sent += 1;
        Ok(())
    }

    fn turn(&mut self) -> Result<(), Failure> {
        self.put()?;
        let mut bytes = [0; 200];
        let (count, _) = message::receive(self.back.as_fd(), &mut bytes)?;
        same("length of a message", count, 1 + (self.taken % 90) as usize)?;
        same("content of a message", bytes[0], self.taken as u8)?;
        self.taken += 1;
        Ok(())
    }
}

/// Descriptors on their way: a pipe with a number in it, sent and not yet received.
struct Flight {
    front: UnixStream,
    back: UnixStream,
    sent: u32,
    taken: u32,
}

impl Flight {
    fn new() -> Result<Self, Failure> {
        let (front, back) = UnixStream::pair()?;
        let mut flight = Self { front, back, sent: 0, taken: 0 };
        for _ in 0..3 {
            flight.put()?;
        }
        Ok(flight)
    }

    fn put(&mut self) -> Result<(), Failure> {
        let (read, mut write) = std::io::pipe()?;
        write.write_all(&self.sent.to_le_bytes())?;
        message::send(self.front.as_fd(), &[7], &[read.as_fd()])?;
        self.sent += 1;
        Ok(())
    }

    fn turn(&mut self) -> Result<(), Failure> {
        self.put()?;
        let (count, mut fds) = message::receive(self.back.as_fd(), &mut [0; 1])?;
        same("bytes with a descriptor", (count, fds.len()), (1, 1))?;
        let mut text = Vec::new();
        if let Some(fd) = fds.pop() {
            File::from(fd).read_to_end(&mut text)?;
        }
        same("content of a pipe that was in flight", text, self.taken.to_le_bytes().to_vec())?;
        self.taken += 1;
        Ok(())
    }
}

/// Listeners with a path and with an abstract name; each turn a client comes and goes.
struct Named {
    path: std::path::PathBuf,
    listener: UnixListener,
    address: SocketAddr,
    hidden: UnixListener,
}

impl Named {
    fn new(context: &Context) -> Result<Self, Failure> {
        let path = context.path("socket");
        let listener = UnixListener::bind(&path)?;
        let name = format!("selfcheck {}", std::process::id());
        let address = SocketAddr::from_abstract_name(name.as_bytes())?;
        let hidden = UnixListener::bind_addr(&address)?;
        Ok(Self { path, listener, address, hidden })
    }

    fn turn(&self) -> Result<(), Failure> {
        let known = UnixStream::connect(&self.path)?;
        let unknown = UnixStream::connect_addr(&self.address)?;
        for (mut client, listener) in [(known, &self.listener), (unknown, &self.hidden)] {
            client.write_all(b"hello")?;
            let (mut server, _) = listener.accept()?;
            drop(client);
            let mut text = String::new();
            server.read_to_string(&mut text)?;
            same("greeting on a unix socket", text.as_str(), "hello")?;
        }
        let own = self.listener.local_addr()?;
        ensure(own.as_pathname() == Some(self.path.as_path()), || format!("name is {own:?}"))
    }
}

/// A bound datagram socket and a connected sender, as a system log has.
struct Log {
    receiver: UnixDatagram,
    sender: UnixDatagram,
    count: u64,
}

impl Log {
    fn new(context: &Context) -> Result<Self, Failure> {
        let path = context.path("log.socket");
        let receiver = UnixDatagram::bind(&path)?;
        let sender = UnixDatagram::unbound()?;
        sender.connect(&path)?;
        sender.send(b"entry 0")?;
        Ok(Self { receiver, sender, count: 0 })
    }

    fn turn(&mut self) -> Result<(), Failure> {
        let mut bytes = [0; 100];
        let length = self.receiver.recv(&mut bytes)?;
        let text = String::from_utf8_lossy(&bytes[..length]).into_owned();
        same("entry of a log", text, format!("entry {}", self.count))?;
        self.count += 1;
        self.sender.send(format!("entry {}", self.count).as_bytes())?;
        Ok(())
    }
}
