//! Datagrams that are written in parts, and sent with the last one.

use std::net::{SocketAddr, UdpSocket};
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use ckpt_engine::sys::socket::{self, Along};

use super::plain::{encode, fresh, readable, receive, set};
use crate::workload::context::Context;
use crate::workload::outcome::{Failure, ensure, same};
use crate::workload::stream::Stream;

const PAUSE: Duration = Duration::from_millis(10);
/// How many parts a datagram has: the kernel joins no more than 17 that it does not keep side by side.
const PARTS: u32 = 12;

/// A sender, a receiver, and what is written.
struct Letter {
    sender: OwnedFd,
    receiver: UdpSocket,
    /// Where it goes; nothing for a sender that is connected.
    to: Vec<u8>,
    /// `UDP_CORK` says that there is more, in place of `MSG_MORE`.
    corks: bool,
    written: Vec<u8>,
    stream: Stream,
}

impl Letter {
    fn new(name: &str, protocol: i32, connects: bool, corks: bool) -> Result<Self, Failure> {
        let name: SocketAddr = name.parse().map_err(|_| Failure::new("no address"))?;
        let receiver = fresh(name, libc::SOCK_DGRAM, protocol)?;
        socket::bind(receiver.as_fd(), &encode(name))?;
        let receiver = UdpSocket::from(receiver);
        let sender = fresh(name, libc::SOCK_DGRAM, protocol)?;
        let mut to = encode(receiver.local_addr()?);
        if connects {
            socket::connect(sender.as_fd(), &to)?;
            to.clear();
        }
        let stream = Stream::new(u64::from(receiver.local_addr()?.port()));
        Ok(Self { sender, receiver, to, corks, written: Vec::new(), stream })
    }

    fn write(&mut self, length: usize) -> Result<(), Failure> {
        if self.corks && self.written.is_empty() {
            set(&self.sender, (libc::SOL_UDP, libc::UDP_CORK, 1))?;
        }
        let bytes = self.stream.next(length);
        self.stream.advance(length);
        let flags = if self.corks { 0 } else { libc::MSG_MORE };
        let along = Along { receiver: &self.to, ..Along::default() };
        let count = socket::send(self.sender.as_fd(), &bytes, &along, flags)?;
        self.written.extend(bytes);
        same("bytes written at once", count, length)
    }

    fn end(&mut self) -> Result<(), Failure> {
        let early = readable(self.receiver.as_fd(), Duration::ZERO)?;
        ensure(!early, || "a datagram was sent before its end".to_owned())?;
        if self.corks {
            set(&self.sender, (libc::SOL_UDP, libc::UDP_CORK, 0))?;
        } else {
            let along = Along { receiver: &self.to, ..Along::default() };
            socket::send(self.sender.as_fd(), b"!", &along, 0)?;
            self.written.extend(b"!");
        }
        let mut buffer = vec![0; 1 << 16];
        let count = receive(self.receiver.as_fd(), &mut buffer)?;
        let expected = std::mem::take(&mut self.written);
        ensure(buffer[..count] == expected, || {
            format!("a datagram of {count} bytes in place of {}", expected.len())
        })
    }
}

/// Datagrams of UDP and UDP-Lite, small ones and large ones, of senders with and without a peer.
pub(super) fn run(context: &mut Context) -> Result<(), Failure> {
    let lite = libc::IPPROTO_UDPLITE;
    let mut letters = [
        (Letter::new("127.0.0.1:0", 0, false, false)?, 11),
        (Letter::new("127.0.0.1:0", 0, true, true)?, 5000),
        (Letter::new("[::1]:0", 0, true, false)?, 1400),
        (Letter::new("[::1]:0", lite, false, false)?, 7),
        (Letter::new("[::ffff:127.0.0.1]:0", 0, false, false)?, 200),
    ];
    while context.step(Duration::ZERO)? {
        for part in 0..PARTS {
            for (letter, length) in &mut letters {
                letter.write(*length + part as usize)?;
            }
            std::thread::sleep(PAUSE);
        }
        if context.progress.plant() {
            letters[0].0.written.push(0);
        }
        letters.iter_mut().try_for_each(|(letter, _)| letter.end())?;
    }
    Ok(())
}
