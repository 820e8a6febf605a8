//! Messages between a daemon and its helpers: one value each, with a descriptor beside it.

use std::{
    io::{self, Read, Write},
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::net::UnixStream,
    },
};

use ckpt_format::codec;
use serde::{Serialize, de::DeserializeOwned};

use crate::sys::ancillary;

/// The longest message, in bytes: a thread takes some kilobytes.
const MESSAGE_MAX: u64 = 1 << 30;

pub(crate) fn send<T: Serialize>(
    socket: &mut UnixStream,
    message: &T,
    beside: Option<BorrowedFd<'_>>,
) -> io::Result<()> {
    let body = codec::encode(message);
    let length = (body.len() as u64).to_le_bytes();
    let beside: Vec<_> = beside.into_iter().collect();
    ancillary::send_all(socket.as_fd(), &length, &beside)?;
    socket.write_all(&body)
}

/// The next message with what came beside it; none when the other end is closed.
pub(crate) fn receive<T: DeserializeOwned>(
    socket: &mut UnixStream,
) -> io::Result<Option<(T, Option<OwnedFd>)>> {
    let mut length = [0; 8];
    let (count, mut beside) = ancillary::receive(socket.as_fd(), &mut length, 1)?;
    if count == 0 {
        return Ok(None);
    }
    socket.read_exact(&mut length[count..])?;
    let length = u64::from_le_bytes(length);
    if length > MESSAGE_MAX {
        return Err(io::ErrorKind::FileTooLarge.into());
    }
    let mut body = vec![0; length as usize];
    socket.read_exact(&mut body)?;
    let message = codec::decode(&body).map_err(|_| io::ErrorKind::InvalidData)?;
    Ok(Some((message, beside.pop())))
}
