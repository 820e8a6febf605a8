//! sendmsg(2) and recvmsg(2) with descriptors beside the bytes (`SCM_RIGHTS`).

use std::{
    io::{self, IoSlice, IoSliceMut},
    os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd},
};

use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, recvmsg, sendmsg};

/// Sends what fits of `bytes`, with `descriptors` beside the first of them.
pub fn send(
    socket: BorrowedFd<'_>,
    bytes: &[u8],
    descriptors: &[BorrowedFd<'_>],
) -> io::Result<usize> {
    let raw: Vec<RawFd> = descriptors.iter().map(AsRawFd::as_raw_fd).collect();
    let rights = [ControlMessage::ScmRights(&raw)];
    let control: &[ControlMessage<'_>] = if raw.is_empty() { &[] } else { &rights };
    let parts = [IoSlice::new(bytes)];
    Ok(sendmsg::<()>(socket.as_raw_fd(), &parts, control, MsgFlags::MSG_NOSIGNAL, None)?)
}

/// Sends all of `bytes` on a blocking socket, with `descriptors` beside the first of them.
pub fn send_all(
    socket: BorrowedFd<'_>,
    bytes: &[u8],
    descriptors: &[BorrowedFd<'_>],
) -> io::Result<()> {
    let mut sent = send(socket, bytes, descriptors)?;
    while sent < bytes.len() {
        sent += send(socket, &bytes[sent..], &[])?;
    }
    Ok(())
}

/// Receives into `buffer`, with at most `most` descriptors; 0 bytes is the end of the stream.
/// The descriptors are closed on exec.
pub fn receive(
    socket: BorrowedFd<'_>,
    buffer: &mut [u8],
    most: usize,
) -> io::Result<(usize, Vec<OwnedFd>)> {
    // SAFETY: CMSG_SPACE only computes a size.
    let space = unsafe { libc::CMSG_SPACE(u32::try_from(most * size_of::<RawFd>()).unwrap_or(0)) };
    let mut control = vec![0; space as usize];
    let mut parts = [IoSliceMut::new(buffer)];
    let flags = MsgFlags::MSG_CMSG_CLOEXEC;
    let message = recvmsg::<()>(socket.as_raw_fd(), &mut parts, Some(&mut control), flags)?;
    let mut descriptors = Vec::new();
    for part in message.cmsgs()? {
        if let ControlMessageOwned::ScmRights(received) = part {
            for raw in received {
                // SAFETY: the kernel has just installed this descriptor for us alone.
                descriptors.push(unsafe { OwnedFd::from_raw_fd(raw) });
            }
        }
    }
    Ok((message.bytes, descriptors))
}

#[cfg(test)]
mod tests {
    use std::{io::Read, os::fd::AsFd, os::unix::net::UnixStream};

    use super::*;

    #[test]
    fn a_descriptor_travels_beside_the_bytes() {
        let (here, there) = UnixStream::pair().unwrap();
        let (mut reader, writer) = io::pipe().unwrap();
        send_all(here.as_fd(), b"take this", &[writer.as_fd()]).unwrap();
        drop(writer);
        let mut buffer = [0; 64];
        let (length, descriptors) = receive(there.as_fd(), &mut buffer, 4).unwrap();
        assert_eq!(&buffer[..length], b"take this");
        let [writer] = <[OwnedFd; 1]>::try_from(descriptors).unwrap();
        drop(writer);
        // All writers are gone only if ours really was the same pipe.
        assert_eq!(reader.read(&mut buffer).unwrap(), 0);
    }

    #[test]
    fn a_closed_socket_is_an_end() {
        let (here, there) = UnixStream::pair().unwrap();
        drop(here);
        assert_eq!(receive(there.as_fd(), &mut [0; 8], 1).unwrap().0, 0);
    }
}
