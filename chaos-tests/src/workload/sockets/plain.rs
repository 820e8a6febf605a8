//! Sockets as the kernel takes them, for what the standard library has no words for.

use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use ckpt_engine::sys::socket::{self, Along};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{MsgFlags, recv};

use crate::workload::outcome::{Failure, ensure, same};

/// One option of a socket: level, name, value.
pub(super) type Choice = (i32, i32, i32);

/// `struct sockaddr_in` or `struct sockaddr_in6`.
pub(super) fn encode(address: SocketAddr) -> Vec<u8> {
    let mut bytes = Vec::new();
    match address {
        SocketAddr::V4(v4) => {
            bytes.extend((libc::AF_INET as u16).to_ne_bytes());
            bytes.extend(v4.port().to_be_bytes());
            bytes.extend(v4.ip().octets());
            bytes.extend([0; 8]);
        }
        SocketAddr::V6(v6) => {
            bytes.extend((libc::AF_INET6 as u16).to_ne_bytes());
            bytes.extend(v6.port().to_be_bytes());
            bytes.extend([0; 4]);
            bytes.extend(v6.ip().octets());
            bytes.extend(v6.scope_id().to_ne_bytes());
        }
    }
    bytes
}

/// A socket for this address, not bound.
pub(super) fn fresh(address: SocketAddr, kind: i32, protocol: i32) -> Result<OwnedFd, Failure> {
    let domain = if address.is_ipv4() { libc::AF_INET } else { libc::AF_INET6 };
    Ok(socket::socket(domain, kind, protocol)?)
}

/// Sets one option.
pub(super) fn set(fd: impl AsFd, (level, name, value): Choice) -> Result<(), Failure> {
    Ok(socket::set_option(fd.as_fd(), level, name, &value.to_ne_bytes())?)
}

/// Reads one option.
pub(super) fn number(fd: impl AsFd, level: i32, name: i32) -> Result<i32, Failure> {
    let mut value = [0; 4];
    socket::option(fd.as_fd(), level, name, &mut value)?;
    Ok(i32::from_ne_bytes(value))
}

/// Fails unless all options are as they were set.
#[track_caller]
pub(super) fn keeps(fd: impl AsFd, choices: &[Choice]) -> Result<(), Failure> {
    for &(level, name, value) in choices {
        let what = format!("option {name} of level {level}");
        same(&what, number(fd.as_fd(), level, name)?, value)?;
    }
    Ok(())
}

/// Whether something can be read, within a time.
pub(super) fn readable(fd: BorrowedFd<'_>, patience: Duration) -> Result<bool, Failure> {
    let timeout = PollTimeout::try_from(patience).unwrap_or(PollTimeout::MAX);
    Ok(poll(&mut [PollFd::new(fd, PollFlags::POLLIN)], timeout)? > 0)
}

/// The next message, which must come soon.
pub(super) fn receive(fd: BorrowedFd<'_>, buffer: &mut [u8]) -> Result<usize, Failure> {
    ensure(readable(fd, Duration::from_secs(5))?, || "a message did not come".to_owned())?;
    // Packet sockets know no control data, so plain recv(2).
    Ok(recv(fd.as_raw_fd(), buffer, MsgFlags::MSG_DONTWAIT)?)
}

/// Sends to an address, or over a connection.
pub(super) fn send(fd: BorrowedFd<'_>, bytes: &[u8], to: &[u8]) -> Result<(), Failure> {
    let along = Along { receiver: to, ..Along::default() };
    let sent = socket::send(fd, bytes, &along, 0)?;
    same("bytes sent at once", sent, bytes.len())
}

/// Two ends of a connection.
pub(super) fn pair(address: &str) -> Result<(TcpStream, TcpStream), Failure> {
    let listener = TcpListener::bind(address)?;
    let client = TcpStream::connect(listener.local_addr()?)?;
    Ok((client, listener.accept()?.0))
}
