//! The urgent byte (`MSG_OOB`) in the queue of a unix stream: which it is, and where.
//!
//! The kernel tells the byte, and whether it is the first one of the queue (`SIOCATMARK`); where else
//! it is shows by the way the queue is read. A read ends before the urgent byte, and otherwise only
//! behind a message with descriptors, or between messages of different senders where these are told.

use std::{io, os::fd::BorrowedFd};

use super::super::{find::Refusal, options};
use crate::sys::{
    descriptor::{Count, count},
    socket,
};

use super::queue::Peeking;

/// An option of a socket that has another value as long as this is there.
#[derive(Debug)]
struct Changed<'a> {
    fd: BorrowedFd<'a>,
    name: i32,
    before: i32,
}

impl<'a> Changed<'a> {
    fn new(fd: BorrowedFd<'a>, name: i32, value: i32) -> io::Result<Self> {
        let before = options::number(fd, libc::SOL_SOCKET, name)?;
        if before != value {
            options::set(fd, libc::SOL_SOCKET, name, value)?;
        }
        Ok(Self { fd, name, before })
    }
}

impl Drop for Changed<'_> {
    fn drop(&mut self) {
        let restored = options::set(self.fd, libc::SOL_SOCKET, self.name, self.before);
        if let Err(error) = restored {
            tracing::warn!(%error, option = self.name, "a unix socket keeps a changed option");
        }
    }
}

/// A queue with an urgent byte, which can be read like any other as long as this is there.
#[derive(Debug)]
pub(super) struct Urgent<'a> {
    /// How many bytes are before it.
    pub(super) place: usize,
    _inline: Changed<'a>,
}

impl<'a> Urgent<'a> {
    /// Finds it, in a stream with so many bytes.
    pub(super) fn find(fd: BorrowedFd<'a>, readable: usize) -> Result<Option<Self>, Refusal> {
        let Some(byte) = byte(fd)? else { return Ok(None) };
        let inline = Changed::new(fd, libc::SO_OOBINLINE, 1)?;
        let place = match count(fd, Count::AtMark)? {
            0 => place(fd, readable, byte)?,
            _ => Some(0),
        };
        let place = place.ok_or_else(|| {
            Refusal::new("a unix socket with urgent data behind descriptors", "try again")
        })?;
        Ok(Some(Self { place, _inline: inline }))
    }
}

/// The byte itself, if nobody has read it. Asked of a socket that has it among the others, the kernel
/// says that there is none.
fn byte(fd: BorrowedFd<'_>) -> io::Result<Option<u8>> {
    let _apart = match options::number(fd, libc::SOL_SOCKET, libc::SO_OOBINLINE)? {
        0 => None,
        _ => Some(Changed::new(fd, libc::SO_OOBINLINE, 0)?),
    };
    let mut byte = [0];
    let found = socket::receive(fd, &mut byte, libc::MSG_OOB | libc::MSG_PEEK | libc::MSG_DONTWAIT);
    Ok(found.is_ok_and(|found| found.length == 1).then_some(byte[0]))
}

/// Where it is, if it is not the first one. Behind descriptors it is known by what it is.
fn place(fd: BorrowedFd<'_>, readable: usize, byte: u8) -> io::Result<Option<usize>> {
    let _all_alike = Changed::new(fd, libc::SO_PASSCRED, 0)?;
    let peeking = Peeking::new(fd)?;
    let mut buffer = vec![0; readable + 1];
    let (mut offset, mut behind_descriptors) = (0, false);
    let mut possible = Vec::new();
    while offset < readable
        && let Some(received) = peeking.next(&mut buffer)?
        && received.length > 0
    {
        if behind_descriptors && buffer[0] == byte {
            possible.push(offset);
        }
        offset += received.length;
        behind_descriptors = !received.rights.is_empty();
        if !behind_descriptors && offset < readable {
            return Ok(Some(offset));
        }
    }
    match possible[..] {
        [only] => Ok(Some(only)),
        _ => Ok(None),
    }
}
