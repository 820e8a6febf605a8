//! Netlink sockets.
//!
//! What waits in them comes from the kernel, and nobody else can send in its name. But a program
//! that has asked a question waits for the answer for ever, so the question is asked again: it
//! can be told from the answer. News that came unasked are lost, as they are when a socket's
//! buffer is full.

use std::{
    io,
    os::fd::{AsFd, OwnedFd},
    sync::OnceLock,
};

use ckpt_format::files::{Kind, NetlinkSocket};

use super::{
    Source,
    find::{Object, Refusal},
    options::{self, Family},
    rebuild::RebuildError,
};
use crate::{
    btf::Types,
    eye::Eye,
    sys::socket::{self, Along, End},
};

/// The ports to which the kernel's packet filter sends packets. That a socket has asked for them
/// is kept in the kernel, and not told in a form that could be asked for again.
#[derive(Debug, Default)]
pub(super) struct Owned(Vec<u32>);

impl Owned {
    /// Of the network of the calling thread.
    pub(super) fn here() -> Self {
        let mut ports = Vec::new();
        // The port is in the second column. Without the file there is no such filter.
        for name in ["nfnetlink_queue", "nfnetlink_log"] {
            let path = format!("/proc/thread-self/net/netfilter/{name}");
            let table = std::fs::read_to_string(path).unwrap_or_default();
            let port = |line: &str| line.split_whitespace().nth(1)?.parse::<u32>().ok();
            ports.extend(table.lines().filter_map(port));
        }
        Self(ports)
    }
}

/// Refuses what has a part in the kernel that is lost. All other protocols are served the same way
/// on every host; the audit system answers nobody in a user namespace, where such a socket is only
/// kept open.
pub(super) fn check(object: &Object, protocol: i32, owned: &Owned) -> Result<(), Refusal> {
    if protocol == libc::NETLINK_NETFILTER && owned.0.contains(&port(object)?) {
        let what = "a netlink socket to which the packet filter sends packets";
        return Err(Refusal::new(what, "end the program"));
    }
    Ok(())
}

fn port(object: &Object) -> io::Result<u32> {
    let address = socket::address(object.fd(), End::Local)?;
    let port = address.get(4..8).and_then(|port| port.try_into().ok()).unwrap_or([0; 4]);
    Ok(u32::from_ne_bytes(port))
}

pub(super) fn capture(
    source: &Source<'_>,
    object: &Object,
    protocol: i32,
) -> Result<Kind, Refusal> {
    let fd = object.fd();
    let mut bytes = vec![0; 64 << 10];
    let waiting = socket::receive(fd, &mut bytes, libc::MSG_PEEK | libc::MSG_DONTWAIT);
    let waiting = waiting.ok().map(|received| {
        bytes.truncate(received.length);
        serde_bytes::ByteBuf::from(bytes)
    });
    // Only an answer that is not one of many can be followed by an acknowledgement.
    let alone = waiting.as_ref().is_some_and(|answer| answer.get(6..8) == Some(&[0; 2]));
    Ok(Kind::Netlink(Box::new(NetlinkSocket {
        socket_type: options::number(fd, libc::SOL_SOCKET, libc::SO_TYPE)?,
        protocol,
        port: port(object)?,
        groups: groups(object)?,
        more: alone && waits_more(source, object).unwrap_or(false),
        waiting,
        options: options::capture(fd, Family::Netlink)?,
    })))
}

/// Whether more than one message waits. The kernel shows no more than the first, so it is looked at,
/// where that is possible.
fn waits_more(source: &Source<'_>, object: &Object) -> io::Result<bool> {
    static LENGTH: OnceLock<Option<u32>> = OnceLock::new();
    let find = || {
        let types = Types::read()?;
        let queue = types.offset("sock", "sk_receive_queue")?;
        Ok::<_, io::Error>(queue + types.offset("sk_buff_head", "qlen")?)
    };
    let length = LENGTH.get_or_init(|| find().ok()).ok_or(io::ErrorKind::Unsupported)?;
    let &(place, fd) = object.holders.first().ok_or(io::ErrorKind::NotFound)?;
    let eye = Eye::on(source.processes[place].host_pid)?;
    Ok(eye.word(eye.socket(fd, object.status.inode)?, length)? > 1)
}

fn groups(object: &Object) -> io::Result<Vec<u32>> {
    const NETLINK_LIST_MEMBERSHIPS: i32 = 9;
    let mut bits = [0u8; 256];
    let length =
        socket::option(object.fd(), libc::SOL_NETLINK, NETLINK_LIST_MEMBERSHIPS, &mut bits)?;
    let bits = &bits[..length.min(bits.len())];
    let joined = |group: &u32| bits[*group as usize / 8] & 1 << (group % 8) != 0;
    // Groups count from one.
    Ok((0..bits.len() as u32 * 8).filter(joined).map(|group| group + 1).collect())
}

pub(super) fn rebuild(netlink: &NetlinkSocket) -> Result<OwnedFd, RebuildError> {
    make(netlink).map_err(|source| RebuildError::Kernel { object: "netlink socket", source })
}

fn kernel() -> Vec<u8> {
    name(0)
}

fn name(port: u32) -> Vec<u8> {
    let mut address = (libc::AF_NETLINK as u16).to_ne_bytes().to_vec();
    address.extend([0; 2]);
    address.extend(port.to_ne_bytes());
    address.extend([0; 4]);
    address
}

fn make(netlink: &NetlinkSocket) -> io::Result<OwnedFd> {
    let made = socket::socket(libc::AF_NETLINK, netlink.socket_type, netlink.protocol)?;
    let fd = made.as_fd();
    if netlink.port != 0 {
        socket::bind(fd, &name(netlink.port))?;
    }
    options::rebuild(fd, &netlink.options)?;
    options::rebuild_buffers(fd, &netlink.options)?;
    if let Some(question) = netlink.waiting.as_ref().and_then(|answer| question(netlink, answer)) {
        let receiver = kernel();
        let along = Along { receiver: &receiver, ..Along::default() };
        // A refusal is an answer, too, and waits in the socket now.
        if let Err(error) = socket::send(fd, &question, &along, libc::MSG_DONTWAIT) {
            tracing::warn!(%error, "an answer of the kernel is lost");
        }
    }
    // Last, so that nothing which is done here is told as news.
    for &group in &netlink.groups {
        options::set(fd, libc::SOL_NETLINK, libc::NETLINK_ADD_MEMBERSHIP, group.cast_signed())?;
    }
    Ok(made)
}

/// The question that has this answer, if there is one that can be asked twice.
fn question(netlink: &NetlinkSocket, answer: &[u8]) -> Option<Vec<u8>> {
    const HEADER: usize = 16;
    const ERROR: u16 = 2;
    const DONE: u16 = 3;
    const REQUEST: u16 = 1;
    const MULTI: u16 = 2;
    const ACKNOWLEDGE: u16 = 4;
    const DUMP: u16 = 0x300;
    const NOTHING: u16 = 1;
    const GET_NEXT_HOPS: u16 = 106;
    let half = |at: usize| Some(u16::from_ne_bytes(answer.get(at..at + 2)?.try_into().ok()?));
    let (kind, flags) = (half(4)?, half(6)?);
    let sequence = answer.get(8..12)?;
    // News carry the port of whoever made them, or none.
    if netlink.port == 0 || answer.get(12..16)? != netlink.port.to_ne_bytes() {
        return None;
    }
    let (kind, flags, body) = match kind {
        // Only the acknowledgement of a success can be had again.
        ERROR if answer.get(HEADER..HEADER + 4)? == [0; 4] => {
            (NOTHING, REQUEST | ACKNOWLEDGE, Vec::new())
        }
        // The end of a list: that of the next hops, which hardly anybody has, is empty.
        DONE if netlink.protocol == libc::NETLINK_ROUTE => {
            (GET_NEXT_HOPS, REQUEST | DUMP, vec![0; 8])
        }
        // The answers to RTM_GET... are of the first of four types that belong together.
        kind if netlink.protocol == libc::NETLINK_ROUTE && kind >= HEADER as u16 => {
            let get = kind & !3 | 2;
            if flags & MULTI != 0 {
                // The family; the rest of its header selects nothing.
                let mut body = vec![0; 16];
                body[0] = *answer.get(HEADER)?;
                (get, REQUEST | DUMP, body)
            } else {
                // ifinfomsg and ifaddrmsg, which name their object. Others would need attributes.
                let link = kind & !3 == libc::RTM_NEWLINK;
                let body = answer.get(HEADER..HEADER + 16)?.to_vec();
                let flags = if netlink.more { REQUEST | ACKNOWLEDGE } else { REQUEST };
                link.then_some((get, flags, body))?
            }
        }
        _ => return None,
    };
    let mut question = u32::try_from(HEADER + body.len()).ok()?.to_ne_bytes().to_vec();
    question.extend(kind.to_ne_bytes());
    question.extend(flags.to_ne_bytes());
    question.extend(sequence);
    question.extend(netlink.port.to_ne_bytes());
    question.extend(body);
    Some(question)
}
