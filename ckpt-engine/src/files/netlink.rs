//! Netlink sockets. What is queued in them cannot be read without consuming it, and answers
//! about the source's devices would be wrong on the target anyway: it is dropped, and the
//! listener is told so in the kernel's own way, by `ENOBUFS`.

use std::{
    io,
    os::fd::{AsFd, OwnedFd},
};

use ckpt_format::files::{Kind, NetlinkSocket};

use super::{
    find::{Object, Refusal},
    options::{self, Family},
    rebuild::RebuildError,
};
use crate::sys::socket::{self, End};

/// The protocols whose kernel side is the same on every host and has no state per socket.
const MOVABLE: &[i32] = &[
    libc::NETLINK_ROUTE,
    libc::NETLINK_SOCK_DIAG,
    libc::NETLINK_KOBJECT_UEVENT,
    libc::NETLINK_GENERIC,
    // In a user namespace the audit system answers no request (kernel, audit_netlink_ok), so such
    // a socket is only kept open: dbus-daemon and systemd do.
    libc::NETLINK_AUDIT,
];

pub(super) fn check(protocol: i32) -> Result<(), Refusal> {
    if MOVABLE.contains(&protocol) {
        return Ok(());
    }
    let what = match protocol {
        libc::NETLINK_NETFILTER => "a netlink socket of the packet filter".to_owned(),
        other => format!("a netlink socket of protocol {other}"),
    };
    Err(Refusal::new(what, "end the program"))
}

pub(super) fn capture(object: &Object, protocol: i32) -> Result<Kind, Refusal> {
    let fd = object.fd();
    let address = socket::address(fd, End::Local)?;
    let port = address.get(4..8).and_then(|port| port.try_into().ok()).unwrap_or([0; 4]);
    let mut byte = [0];
    let waiting = socket::receive(fd, &mut byte, libc::MSG_PEEK | libc::MSG_DONTWAIT);
    Ok(Kind::Netlink(Box::new(NetlinkSocket {
        socket_type: options::number(fd, libc::SOL_SOCKET, libc::SO_TYPE)?,
        protocol,
        port: u32::from_ne_bytes(port),
        groups: groups(object)?,
        lost: waiting.is_ok(),
        options: options::capture(fd, Family::Netlink)?,
    })))
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

fn make(netlink: &NetlinkSocket) -> io::Result<OwnedFd> {
    let made = socket::socket(libc::AF_NETLINK, netlink.socket_type, netlink.protocol)?;
    let fd = made.as_fd();
    if netlink.port != 0 {
        let mut address = (libc::AF_NETLINK as u16).to_ne_bytes().to_vec();
        address.extend([0; 2]);
        address.extend(netlink.port.to_ne_bytes());
        address.extend([0; 4]);
        socket::bind(fd, &address)?;
    }
    for &group in &netlink.groups {
        options::set(fd, libc::SOL_NETLINK, libc::NETLINK_ADD_MEMBERSHIP, group.cast_signed())?;
    }
    options::rebuild(fd, &netlink.options)?;
    options::rebuild_buffers(fd, &netlink.options)?;
    Ok(made)
}
