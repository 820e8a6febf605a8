//! Urgent bytes (`MSG_OOB`) that nobody has read yet.

use std::io::Read;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use nix::sys::socket::{MsgFlags, recv};

use super::plain::send;
use crate::workload::context::Context;
use crate::workload::outcome::{Failure, same};
use crate::workload::stream::Stream;

const PAUSE: Duration = Duration::from_millis(20);

/// A stream with an urgent byte in it, at another place each time.
pub(super) fn unix(context: &mut Context) -> Result<(), Failure> {
    let (near, mut far) = UnixStream::pair()?;
    far.set_nonblocking(true)?;
    let mut stream = Stream::new(71);
    let mut count = 0u32;
    while context.step(Duration::ZERO)? {
        count += 1;
        let before = stream.next((count % 5) as usize * 100);
        stream.advance(before.len());
        let after = stream.next((count % 3) as usize * 1000);
        stream.advance(after.len());
        let urgent = [count as u8];
        for (text, flags) in [
            (&before[..], MsgFlags::empty()),
            (&urgent, MsgFlags::MSG_OOB),
            (&after, MsgFlags::empty()),
        ] {
            if flags.is_empty() && !text.is_empty() {
                send(near.as_fd(), text, &[])?;
            } else if !flags.is_empty() {
                nix::sys::socket::send(near.as_raw_fd(), text, flags)?;
            }
        }
        std::thread::sleep(PAUSE);
        if context.progress.plant() {
            recv(far.as_raw_fd(), &mut [0], MsgFlags::MSG_OOB)?;
        }
        let mut buffer = [0; 4096];
        if !before.is_empty() {
            // A read ends before it.
            let length = far.read(&mut buffer)?;
            same("bytes before the urgent one", &buffer[..length], &before[..])?;
        }
        let mut byte = [0];
        recv(far.as_raw_fd(), &mut byte, MsgFlags::MSG_OOB)?;
        same("the urgent byte", byte, urgent)?;
        if !after.is_empty() {
            let length = far.read(&mut buffer)?;
            same("bytes behind the urgent one", &buffer[..length], &after[..])?;
        }
        let more = far.read(&mut buffer).map_err(|error| error.kind());
        same("more than was sent", more, Err(std::io::ErrorKind::WouldBlock))?;
    }
    Ok(())
}
