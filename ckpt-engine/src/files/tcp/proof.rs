//! Which options of a TCP socket show in what the kernel keeps about it.
//!
//! Found out on the running kernel: each option of a socket of ours is set to several values. An
//! option counts as seen if every value that the socket answers with is kept in other bytes than the
//! one before. Whatever is not seen is asked, of every socket.

use std::{
    collections::HashSet,
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
};

use nix::fcntl::{FcntlArg, FdFlag, fcntl};

use super::{
    super::options::{FILTER, Family, Stage},
    TCP,
    look::Look,
};
use crate::sys::{descriptor, socket};

/// Level and name of options.
pub(super) type Names = HashSet<(i32, i32)>;

/// What the kernel makes a switch of its own for, which nobody puts back. It is left alone.
const FOR_EVER: [(i32, i32); 3] = [
    (libc::IPPROTO_IP, libc::IP_MINTTL),
    (libc::IPPROTO_IPV6, libc::IPV6_MINHOPCOUNT),
    (TCP, TCP_TX_DELAY),
];
const TCP_TX_DELAY: i32 = 37;

/// The options that are seen.
pub(super) fn seen(look: &Look, v6: bool) -> io::Result<Names> {
    let mut seen = Names::new();
    for (level, name, size) in (Family::Tcp { v6, stage: Stage::Connected }).names() {
        if !FOR_EVER.contains(&(level, name)) && is_seen(look, v6, (level, name), size)? {
            seen.insert((level, name));
        }
    }
    if is_filter_seen(look, v6)? {
        seen.insert(FILTER);
    }
    Ok(seen)
}

fn is_seen(look: &Look, v6: bool, (level, name): (i32, i32), size: usize) -> io::Result<bool> {
    let socket = fresh(v6)?;
    let fd = socket.as_fd();
    let answer = || {
        let mut value = vec![0; size];
        let length = socket::option(fd, level, name, &mut value).ok()?;
        value.truncate(length);
        Some(value)
    };
    let Some(mut before) = answer() else { return Ok(true) };
    let mut bytes = kept(look, fd)?;
    let mut changed = false;
    for value in values(level, name, size) {
        // Not everything is a value of every option.
        if socket::set_option(fd, level, name, &value).is_err() {
            continue;
        }
        let Some(after) = answer().filter(|after| *after != before) else { continue };
        let now = kept(look, fd)?;
        if now == bytes {
            return Ok(false);
        }
        (before, bytes, changed) = (after, now, true);
    }
    Ok(changed)
}

fn is_filter_seen(look: &Look, v6: bool) -> io::Result<bool> {
    /// A program that takes everything.
    const TAKE_ALL: [u8; 8] = [6, 0, 0, 0, 0xff, 0xff, 0, 0];
    let socket = fresh(v6)?;
    let before = kept(look, socket.as_fd())?;
    socket::attach_filter(socket.as_fd(), &TAKE_ALL)?;
    Ok(kept(look, socket.as_fd())? != before)
}

fn fresh(v6: bool) -> io::Result<OwnedFd> {
    let domain = if v6 { libc::AF_INET6 } else { libc::AF_INET };
    socket::socket(domain, libc::SOCK_STREAM, libc::IPPROTO_TCP)
}

/// What is kept about a socket of ours.
fn kept(look: &Look, fd: BorrowedFd<'_>) -> io::Result<Vec<u8>> {
    let inode = descriptor::status(fd)?.inode;
    let own = i32::try_from(std::process::id()).map_err(io::Error::other)?;
    let sight = look.at(own)?.sockets.remove(&inode).ok_or(io::ErrorKind::NotFound)?;
    Ok(sight.options)
}

/// Whether it is seen what execve(2) closes.
pub(super) fn are_descriptors_seen(look: &Look) -> io::Result<bool> {
    let own = i32::try_from(std::process::id()).map_err(io::Error::other)?;
    let (socket, other) = (fresh(false)?, fresh(false)?);
    let told = |socket: &OwnedFd| {
        let inode = descriptor::status(socket.as_fd())?.inode;
        let sights = look.at(own)?;
        let told = sights.descriptors.get(&socket.as_raw_fd()).filter(|it| it.0 == inode);
        told.map(|it| it.1).ok_or_else(|| io::Error::from(io::ErrorKind::NotFound))
    };
    let before = (told(&socket)?, told(&other)?);
    // A child of ours that inherits it closes it when it ends.
    fcntl(&socket, FcntlArg::F_SETFD(FdFlag::empty()))?;
    Ok(before == (true, true) && (told(&socket)?, told(&other)?) == (false, true))
}

/// What to try: some of it is a value of each option.
fn values(level: i32, name: i32, size: usize) -> Vec<Vec<u8>> {
    match (level, name) {
        (libc::SOL_SOCKET, libc::SO_BINDTODEVICE) => vec![b"lo\0".to_vec(), b"\0".to_vec()],
        (TCP, libc::TCP_CONGESTION) => vec![b"reno".to_vec(), b"cubic".to_vec()],
        (libc::IPPROTO_IP, libc::IP_OPTIONS) => vec![vec![1; 4], Vec::new()],
        _ => {
            // The last one is the number of the first interface, as packets have it.
            let numbers = [1, 0, 2, 5, 16, 32, 1000, 2000, 1i32.to_be()];
            let padded = |number: i32, again: i32| {
                let mut value = number.to_ne_bytes().to_vec();
                if size > 4 {
                    value.extend(again.to_ne_bytes());
                }
                value.resize(size, 0);
                value
            };
            numbers.into_iter().flat_map(|it| [padded(it, 0), padded(it, it)]).collect()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nearly_all_options_are_seen() {
        let look = Look::new().unwrap();
        assert!(are_descriptors_seen(&look).unwrap());
        for v6 in [false, true] {
            let seen = seen(&look, v6).unwrap();
            let all = Family::Tcp { v6, stage: Stage::Connected }.names();
            let missing: Vec<_> = all.filter(|it| !seen.contains(&(it.0, it.1))).collect();
            assert!(missing.len() <= 8, "IPv6 {v6}, not seen: {missing:?}");
            assert!(seen.contains(&FILTER));
            assert!(seen.contains(&(libc::SOL_SOCKET, libc::SO_KEEPALIVE)));
        }
    }
}
