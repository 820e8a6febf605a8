//! Keys with which TCP signs its segments (`TCP_MD5SIG`, RFC 2385).
//!
//! No call on a socket tells them; the kernel's list of sockets does, to root, but for sockets that
//! neither listen nor are connected. They travel as the options that set them, which is done before
//! a socket has a name: the signature takes room that a connection reckons with from its beginning.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    os::fd::BorrowedFd,
};

use ckpt_format::files::SocketOption;

use super::{
    super::unix::diagnosis::{Many, ask, half, word},
    LISTEN, TCP,
};
use crate::sys::socket;

const TCP_MD5SIG_EXT: i32 = 32;
/// `TCP_MD5SIG_FLAG_PREFIX`
const PREFIX: u8 = 1;
/// The room for an address (`struct sockaddr_storage`), and for a key (`TCP_MD5SIG_MAXKEYLEN`).
const ADDRESS: usize = 128;
const KEY: usize = 80;

/// The keys of one socket.
#[derive(Debug)]
struct Entry {
    inode: u32,
    keys: Vec<SocketOption>,
}

/// The listeners of a network that have keys.
#[derive(Debug, Default)]
pub(in super::super) struct Signatures(Vec<Entry>);

impl Signatures {
    /// Asks a socket-diagnosis socket about those of its network.
    pub(in super::super) fn of_listeners(netlink: BorrowedFd<'_>) -> io::Result<Self> {
        let mut found = Vec::new();
        for family in [libc::AF_INET, libc::AF_INET6] {
            // Whoever it is.
            let question = question(family, 1 << LISTEN, &[0; 48]);
            ask(netlink, &question, Many::All, |body| {
                found.extend(entry(body)?);
                Ok(())
            })?;
        }
        Ok(Self(found))
    }

    /// The keys of a socket.
    pub(in super::super) fn of(&self, inode: u64) -> Vec<SocketOption> {
        let found = self.0.iter().find(|entry| u64::from(entry.inode) == inode);
        found.map(|entry| entry.keys.clone()).unwrap_or_default()
    }
}

/// A connection as the kernel finds it.
#[derive(Clone, Copy, Debug)]
pub(in super::super) struct Ends {
    pub(in super::super) local: SocketAddr,
    pub(in super::super) remote: SocketAddr,
    /// `SO_BINDTOIFINDEX`.
    pub(in super::super) device: u32,
    /// 0 for one that no program has any more.
    pub(in super::super) inode: u64,
}

/// The keys of one connection. It is asked for by its ends: for a list of connections the kernel goes
/// through a table that is made for those of the whole host, which takes milliseconds.
pub(in super::super) fn of_connection(
    netlink: BorrowedFd<'_>,
    ends: Ends,
) -> io::Result<Vec<SocketOption>> {
    let family = if ends.local.is_ipv4() { libc::AF_INET } else { libc::AF_INET6 };
    let mut id = Vec::with_capacity(48);
    let both = [ends.local, ends.remote];
    both.iter().for_each(|end| id.extend(end.port().to_be_bytes()));
    for end in both {
        match end.ip() {
            IpAddr::V4(v4) => id.extend([&v4.octets()[..], &[0; 12]].concat()),
            IpAddr::V6(v6) => id.extend(v6.octets()),
        }
    }
    id.extend(ends.device.to_ne_bytes());
    // `INET_DIAG_NOCOOKIE`
    id.extend([0xff; 8]);
    let mut found = None;
    let asked = ask(netlink, &question(family, u32::MAX, &id), Many::One, |body| {
        found = entry(body)?;
        Ok(())
    });
    match asked {
        // It has ended meanwhile, or the kernel has no such list.
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => return Ok(Vec::new()),
        asked => asked?,
    }
    // Somebody listens where a connection was.
    let is = |entry: &Entry| u64::from(entry.inode) == ends.inode;
    Ok(found.filter(is).map(|entry| entry.keys).unwrap_or_default())
}

/// A `struct inet_diag_req_v2`. The keys come with `INET_DIAG_INFO` only.
fn question(family: i32, states: u32, id: &[u8]) -> Vec<u8> {
    let mut question = vec![family as u8, libc::IPPROTO_TCP as u8, 1 << 1, 0];
    question.extend(states.to_ne_bytes());
    question.extend(id);
    question
}

/// Reads a `struct inet_diag_msg` and what follows it.
fn entry(body: &[u8]) -> io::Result<Option<Entry>> {
    const MESSAGE: usize = 72;
    const INET_DIAG_MD5SIG: u16 = 18;
    const SIGNATURE: usize = 4 + 16 + KEY;
    let short = || io::Error::new(io::ErrorKind::InvalidData, "a short list of TCP sockets");
    let mut attributes = body.get(MESSAGE..).ok_or_else(short)?;
    let v6 = i32::from(body[0]) == libc::AF_INET6;
    while attributes.len() >= 4 {
        let length = usize::from(half(attributes, 0)?);
        let value = attributes.get(4..length).ok_or_else(short)?;
        if half(attributes, 2)? == INET_DIAG_MD5SIG {
            let keys = value.chunks_exact(SIGNATURE).filter_map(|key| option(key, v6)).collect();
            return Ok(Some(Entry { inode: word(body, 68)?, keys }));
        }
        attributes = attributes.get(length.next_multiple_of(4)..).unwrap_or(&[]);
    }
    Ok(None)
}

fn address(bytes: &[u8], v6: bool) -> IpAddr {
    let mut all = [0; 16];
    all.copy_from_slice(bytes);
    let [a, b, c, d, ..] = all;
    if v6 { Ipv6Addr::from(all).into() } else { Ipv4Addr::new(a, b, c, d).into() }
}

/// The option that sets a key (`struct tcp_md5sig`), from what is told about it
/// (`struct tcp_diag_md5sig`). An IPv6 socket names IPv4 peers as mapped addresses.
pub(super) fn option(key: &[u8], v6: bool) -> Option<SocketOption> {
    let (family, prefix) = (i32::from(key[0]), key[1]);
    let length = half(key, 2).ok().filter(|length| usize::from(*length) <= KEY)?;
    let peer = match address(&key[4..20], family == libc::AF_INET6) {
        IpAddr::V4(v4) if v6 => v4.to_ipv6_mapped().into(),
        other => other,
    };
    let mut value = super::super::address::encode_inet(&SocketAddr::new(peer, 0));
    value.resize(ADDRESS, 0);
    value.extend([PREFIX, prefix]);
    value.extend(length.to_ne_bytes());
    // No device: the kernel does not tell it.
    value.extend([0; 4]);
    value.extend(&key[20..20 + KEY]);
    Some(SocketOption { level: TCP, name: TCP_MD5SIG_EXT, value })
}

/// Does something with a connection that lets its keys go meanwhile.
pub(super) fn without<T>(
    fd: BorrowedFd<'_>,
    options: &[SocketOption],
    work: impl FnOnce() -> io::Result<T>,
) -> io::Result<T> {
    let keys = || options.iter().filter(|it| (it.level, it.name) == (TCP, TCP_MD5SIG_EXT));
    for key in keys() {
        // One of no length is no key.
        let mut none = key.value.clone();
        none.get_mut(ADDRESS + 2..).ok_or(io::ErrorKind::InvalidData)?.fill(0);
        socket::set_option(fd, TCP, TCP_MD5SIG_EXT, &none)?;
    }
    let done = work()?;
    keys().try_for_each(|key| socket::set_option(fd, key.level, key.name, &key.value))?;
    Ok(done)
}
