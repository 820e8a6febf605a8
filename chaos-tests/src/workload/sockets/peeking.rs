//! Sockets with a place from which the next look ahead begins (`SO_PEEK_OFF`).

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream, UdpSocket};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use nix::sys::socket::{MsgFlags, recv};

use super::plain::{number, set};
use crate::workload::context::Context;
use crate::workload::outcome::{Failure, same};

const TEXT: &[u8; 16] = b"0123456789abcdef";

/// A socket in whose queue the text is.
struct Peeked {
    name: &'static str,
    socket: OwnedFd,
    place: usize,
    _sender: OwnedFd,
}

impl Peeked {
    fn new(name: &'static str, socket: OwnedFd, sender: OwnedFd) -> Self {
        Self { name, socket, place: 0, _sender: sender }
    }

    fn go_to(&mut self, place: usize) -> Result<(), Failure> {
        self.place = place;
        set(&self.socket, (libc::SOL_SOCKET, libc::SO_PEEK_OFF, place as i32))
    }

    /// Looks at the next letters; those before them are still there.
    fn look(&mut self) -> Result<(), Failure> {
        let found = number(&self.socket, libc::SOL_SOCKET, libc::SO_PEEK_OFF)?;
        same(&format!("the place of {}", self.name), found, self.place as i32)?;
        if self.place >= TEXT.len() {
            return self.go_to(0);
        }
        let mut letters = [0; 2];
        let flags = MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT;
        let count = recv(self.socket.as_raw_fd(), &mut letters, flags)?;
        same(self.name, &letters[..count], &TEXT[self.place..][..2])?;
        self.place += count;
        Ok(())
    }
}

fn all() -> Result<Vec<Peeked>, Failure> {
    let (near, mut far) = UnixStream::pair()?;
    far.write_all(TEXT)?;
    let mut sockets = vec![Peeked::new("a unix socket", near.into(), far.into())];
    let receiver = UdpSocket::bind("127.0.0.1:0")?;
    let sender = UdpSocket::bind("127.0.0.1:0")?;
    sender.send_to(TEXT, receiver.local_addr()?)?;
    sockets.push(Peeked::new("a UDP socket", receiver.into(), sender.into()));
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let mut client = TcpStream::connect(listener.local_addr()?)?;
    let server = listener.accept()?.0;
    client.write_all(TEXT)?;
    // From Linux 6.9 on.
    if set(server.as_fd(), (libc::SOL_SOCKET, libc::SO_PEEK_OFF, 0)).is_ok() {
        sockets.push(Peeked::new("a TCP socket", server.into(), client.into()));
    }
    sockets.iter_mut().try_for_each(|socket| socket.go_to(0))?;
    Ok(sockets)
}

pub(super) fn run(context: &mut Context) -> Result<(), Failure> {
    let mut sockets = all()?;
    while context.step(Duration::from_millis(20))? {
        sockets.iter_mut().try_for_each(Peeked::look)?;
        if context.progress.plant() {
            sockets[0].place += 1;
        }
    }
    for Peeked { name, socket, .. } in sockets {
        let mut bytes = [0; TEXT.len()];
        std::fs::File::from(socket).read_exact(&mut bytes)?;
        same(name, &bytes, TEXT)?;
    }
    Ok(())
}
