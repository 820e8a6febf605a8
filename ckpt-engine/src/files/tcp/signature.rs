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
    super::unix::diagnosis::{ask, half, word},
    CLOSE_WAIT, CLOSING, ESTABLISHED, FIN_WAIT1, FIN_WAIT2, LAST_ACK, LISTEN, SYN_SENT, TCP,
};
use crate::sys::socket;

const TCP_MD5SIG_EXT: i32 = 32;
/// `TCP_MD5SIG_FLAG_PREFIX`
const PREFIX: u8 = 1;
/// The room for an address (`struct sockaddr_storage`), and for a key (`TCP_MD5SIG_MAXKEYLEN`).
const ADDRESS: usize = 128;
const KEY: usize = 80;

const CONNECTED: [u8; 7] =
    [ESTABLISHED, SYN_SENT, FIN_WAIT1, FIN_WAIT2, CLOSE_WAIT, LAST_ACK, CLOSING];

/// Which sockets of a network are listed: thousands of connections need not be for a listener.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in super::super) enum Whose {
    Listeners,
    /// All that have a peer.
    Connections,
}

/// The keys of one socket.
#[derive(Debug)]
struct Entry {
    /// 0 for one that no program has any more.
    inode: u32,
    ends: [SocketAddr; 2],
    keys: Vec<SocketOption>,
}

/// The sockets of a network that have keys.
#[derive(Debug, Default)]
pub(in super::super) struct Signatures(Vec<Entry>);

impl Signatures {
    /// Asks a socket-diagnosis socket about those of its network.
    pub(in super::super) fn read(netlink: BorrowedFd<'_>, whose: Whose) -> io::Result<Self> {
        let states = match whose {
            Whose::Listeners => 1u32 << LISTEN,
            Whose::Connections => CONNECTED.iter().fold(0, |states, state| states | 1 << state),
        };
        let mut found = Vec::new();
        for family in [libc::AF_INET, libc::AF_INET6] {
            // The keys come with `INET_DIAG_INFO` only.
            let mut question = vec![family as u8, libc::IPPROTO_TCP as u8, 1 << 1, 0];
            question.extend(states.to_ne_bytes());
            // Whoever it is.
            question.extend([0; 48]);
            ask(netlink, &question, |body| {
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

    /// Those of a connection that no program has.
    pub(in super::super) fn of_orphan(&self, ends: [SocketAddr; 2]) -> Vec<SocketOption> {
        let name = |end: SocketAddr| (end.ip(), end.port());
        let is = |entry: &&Entry| entry.inode == 0 && entry.ends.map(name) == ends.map(name);
        self.0.iter().find(is).map(|entry| entry.keys.clone()).unwrap_or_default()
    }
}

/// Reads a `struct inet_diag_msg` and what follows it.
fn entry(body: &[u8]) -> io::Result<Option<Entry>> {
    const MESSAGE: usize = 72;
    const INET_DIAG_MD5SIG: u16 = 18;
    const SIGNATURE: usize = 4 + 16 + KEY;
    let short = || io::Error::new(io::ErrorKind::InvalidData, "a short list of TCP sockets");
    let mut attributes = body.get(MESSAGE..).ok_or_else(short)?;
    let v6 = i32::from(body[0]) == libc::AF_INET6;
    let end = |port: usize, ip: usize| {
        let port = u16::from_be_bytes([body[port], body[port + 1]]);
        SocketAddr::new(address(&body[ip..ip + 16], v6), port)
    };
    while attributes.len() >= 4 {
        let length = usize::from(half(attributes, 0)?);
        let value = attributes.get(4..length).ok_or_else(short)?;
        if half(attributes, 2)? == INET_DIAG_MD5SIG {
            let keys = value.chunks_exact(SIGNATURE).filter_map(|key| option(key, v6)).collect();
            return Ok(Some(Entry { inode: word(body, 68)?, ends: [end(4, 8), end(6, 24)], keys }));
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
