//! Errors that wait in sockets until somebody asks, each for a while.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, Ipv6Addr, Shutdown, SocketAddr, TcpListener, UdpSocket};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use ckpt_engine::sys::socket;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{getsockopt, sockopt};

use super::plain::{encode, fresh, pair};
use crate::workload::context::Context;
use crate::workload::outcome::{Failure, ensure, same};

/// One that has got an error, and what can be read before that is told.
struct Broken {
    socket: OwnedFd,
    unread: usize,
    error: i32,
}

const WORDS: &[u8] = b"unread";

pub(super) fn run(context: &mut Context) -> Result<(), Failure> {
    let mut all = break_all()?;
    let mut turn = 0u32;
    while context.step(Duration::from_millis(5))? {
        turn += 1;
        for broken in &all {
            let events = events(broken.socket.as_fd())?;
            ensure(events.contains(PollFlags::POLLERR), || format!("{} is lost", broken.error))?;
        }
        if context.progress.plant() {
            getsockopt(&all[0].socket, sockopt::SocketError)?;
        }
        if turn.is_multiple_of(60) {
            std::mem::replace(&mut all, break_all()?).into_iter().try_for_each(Broken::check)?;
        }
    }
    all.into_iter().try_for_each(Broken::check)
}

impl Broken {
    fn check(self) -> Result<(), Failure> {
        let Self { socket, unread, error } = self;
        let mut stream = std::fs::File::from(socket);
        let what = format!("error of a socket with {unread} bytes");
        if unread > 0 {
            // Of a stream they come first, of datagrams behind the error.
            let datagram =
                getsockopt(&stream, sockopt::SockType)? == nix::sys::socket::SockType::Datagram;
            if datagram {
                same(&what, getsockopt(&stream, sockopt::SocketError)?, error)?;
            }
            let mut bytes = vec![0; unread];
            stream.read_exact(&mut bytes)?;
            same("what was not read", &bytes[..], WORDS)?;
            if datagram {
                return Ok(());
            }
        }
        same(&what, getsockopt(&stream, sockopt::SocketError)?, error)?;
        same("the same later", getsockopt(&stream, sockopt::SocketError)?, 0)
    }
}

fn events(fd: BorrowedFd<'_>) -> Result<PollFlags, Failure> {
    let mut polled = [PollFd::new(fd, PollFlags::empty())];
    poll(&mut polled, PollTimeout::ZERO)?;
    Ok(polled[0].revents().unwrap_or(PollFlags::empty()))
}

fn break_all() -> Result<Vec<Broken>, Failure> {
    let v4: SocketAddr = (Ipv4Addr::LOCALHOST, 0).into();
    let v6: SocketAddr = (Ipv6Addr::LOCALHOST, 0).into();
    let mut all = Vec::new();
    for name in [v4, v6] {
        for unread in [0, WORDS.len()] {
            all.push(Broken {
                socket: reset(name, unread, false)?,
                unread,
                error: libc::ECONNRESET,
            });
            let socket = unheard(name, unread)?;
            all.push(Broken { socket, unread, error: libc::ECONNREFUSED });
        }
        all.push(Broken { socket: reset(name, 0, true)?, unread: 0, error: libc::EPIPE });
        all.push(Broken { socket: refused(name)?, unread: 0, error: libc::ECONNREFUSED });
    }
    for unread in [0, WORDS.len()] {
        let (socket, mut peer) = UnixStream::pair()?;
        (&socket).write_all(b"not read by the peer")?;
        peer.write_all(&WORDS[..unread])?;
        all.push(Broken { socket: socket.into(), unread, error: libc::ECONNRESET });
    }
    all.iter().try_for_each(|broken| {
        let events = events(broken.socket.as_fd())?;
        ensure(events.contains(PollFlags::POLLERR), || format!("no error {}", broken.error))
    })?;
    Ok(all)
}

/// A connection that its peer breaks off, perhaps after it has said that it will say no more.
fn reset(name: SocketAddr, unread: usize, ended: bool) -> Result<OwnedFd, Failure> {
    let (one, mut two) = pair(&name.to_string())?;
    two.write_all(&WORDS[..unread])?;
    if ended {
        two.shutdown(Shutdown::Write)?;
    }
    let at_once = libc::linger { l_onoff: 1, l_linger: 0 };
    nix::sys::socket::setsockopt(&two, sockopt::Linger, &at_once)?;
    drop(two);
    Ok(one.into())
}

/// A connection that nobody wants.
fn refused(name: SocketAddr) -> Result<OwnedFd, Failure> {
    let gone = TcpListener::bind(name)?.local_addr()?;
    let client = fresh(name, libc::SOCK_STREAM | libc::SOCK_NONBLOCK, 0)?;
    match socket::connect(client.as_fd(), &encode(gone)) {
        Err(error) if error.raw_os_error() == Some(libc::EINPROGRESS) => Ok(client),
        other => Err(Failure::new(format!("connecting to nobody: {other:?}"))),
    }
}

/// A datagram that nobody takes.
fn unheard(name: SocketAddr, unread: usize) -> Result<OwnedFd, Failure> {
    let socket = UdpSocket::bind(name)?;
    let gone = UdpSocket::bind(name)?;
    socket.connect(gone.local_addr()?)?;
    if unread > 0 {
        gone.send_to(&WORDS[..unread], socket.local_addr()?)?;
    }
    drop(gone);
    socket.send(b"?")?;
    Ok(socket.into())
}
