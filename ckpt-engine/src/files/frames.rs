//! Sockets for whole frames (`AF_PACKET`): of DHCP clients and servers, and of sniffers. The
//! frames that wait in them are lost, as any frame may be.

use std::{
    collections::HashMap,
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

use ckpt_format::files::{Kind, PacketMembership, PacketSocket};

use super::{
    find::{Object, Refusal},
    options::{self, Family},
    rebuild::RebuildError,
    unix::diagnosis::{self, half, word},
};
use crate::sys::socket::{self, End};

/// What `packet_diag` tells about one socket.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Entry {
    memberships: Vec<PacketMembership>,
    ring: bool,
    /// Group and type of `PACKET_FANOUT`.
    fanout: Option<u32>,
}

/// All packet sockets of a network, by inode.
pub(super) type Entries = HashMap<u32, Entry>;

/// Asks a socket-diagnosis socket for the packet sockets of its network.
pub(super) fn dump(netlink: BorrowedFd<'_>) -> io::Result<Entries> {
    /// Memberships, rings and groups.
    const SHOW: u32 = 2 | 4 | 8;
    let mut request = vec![libc::AF_PACKET as u8, 0, 0, 0];
    request.extend(0u32.to_ne_bytes());
    request.extend(SHOW.to_ne_bytes());
    request.extend([0xff; 8]);
    let mut entries = Entries::new();
    diagnosis::ask(netlink, &request, |body| {
        entries.insert(word(body, 4)?, read(body)?);
        Ok(())
    })?;
    Ok(entries)
}

fn read(body: &[u8]) -> io::Result<Entry> {
    const MEMBERSHIP: usize = 44;
    let mut entry = Entry::default();
    let mut attributes = body.get(16..).unwrap_or_default();
    while attributes.len() >= 4 {
        let length = usize::from(half(attributes, 0)?);
        let value = attributes.get(4..length).ok_or(io::ErrorKind::InvalidData)?;
        match half(attributes, 2)? {
            1 => {
                for one in value.chunks_exact(MEMBERSHIP) {
                    let address = usize::from(half(one, 10)?);
                    entry.memberships.push(PacketMembership {
                        device: word(one, 0)?,
                        count: word(one, 4)?,
                        kind: half(one, 8)?,
                        address: one.get(12..12 + address).unwrap_or_default().to_vec(),
                    });
                }
            }
            2 | 3 => entry.ring = true,
            4 => entry.fanout = Some(word(value, 0)?),
            _ => {}
        }
        attributes = attributes.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    Ok(entry)
}

fn entry<'a>(object: &Object, entries: &'a Entries) -> Result<&'a Entry, Refusal> {
    let inode = u32::try_from(object.status.inode).ok();
    inode.and_then(|inode| entries.get(&inode)).ok_or_else(|| {
        Refusal::new("a packet socket that the kernel does not tell about", "end the program")
    })
}

/// Refuses what never can be moved.
pub(super) fn check(object: &Object, entries: &Entries) -> Result<(), Refusal> {
    if entry(object, entries)?.ring {
        return Err(Refusal::new(
            "a packet socket whose ring of frames is shared with the kernel (a sniffer)",
            "end the program, or let it capture without a ring",
        ));
    }
    Ok(())
}

pub(super) fn capture(object: &Object, entries: &Entries) -> Result<Kind, Refusal> {
    let fd = object.fd();
    let entry = entry(object, entries)?;
    let address = socket::address(fd, End::Local)?;
    let mut options = options::capture(fd, Family::Packet)?;
    options.extend(entry.fanout.map(|fanout| ckpt_format::files::SocketOption {
        level: libc::SOL_PACKET,
        name: libc::PACKET_FANOUT,
        value: fanout.to_ne_bytes().to_vec(),
    }));
    let bytes = address.get(2..4).and_then(|bytes| bytes.try_into().ok());
    Ok(Kind::Packet(Box::new(PacketSocket {
        socket_type: options::number(fd, libc::SOL_SOCKET, libc::SO_TYPE)?,
        protocol: bytes.unwrap_or_default(),
        device: word(&address, 4)?,
        memberships: entry.memberships.clone(),
        options,
    })))
}

pub(super) fn rebuild(packet: &PacketSocket) -> Result<OwnedFd, RebuildError> {
    make(packet).map_err(|source| RebuildError::Kernel { object: "packet socket", source })
}

fn make(packet: &PacketSocket) -> io::Result<OwnedFd> {
    // Without a protocol it receives nothing before it is complete.
    let made = socket::socket(libc::AF_PACKET, packet.socket_type, 0)?;
    let fd = made.as_fd();
    let of_group = |option: &&ckpt_format::files::SocketOption| {
        (option.level, option.name) == (libc::SOL_PACKET, libc::PACKET_FANOUT)
    };
    let (late, early): (Vec<_>, Vec<_>) =
        packet.options.iter().cloned().partition(|option| of_group(&option));
    options::rebuild(fd, &early)?;
    options::rebuild_buffers(fd, &early)?;
    if packet.protocol != [0; 2] {
        let mut address = (libc::AF_PACKET as u16).to_ne_bytes().to_vec();
        address.extend(packet.protocol);
        address.extend(packet.device.to_ne_bytes());
        address.extend([0; 12]);
        socket::bind(fd, &address)?;
    }
    for membership in &packet.memberships {
        let mut request = membership.device.to_ne_bytes().to_vec();
        request.extend(membership.kind.to_ne_bytes());
        request.extend((membership.address.len() as u16).to_ne_bytes());
        request.extend(&membership.address);
        request.resize(16, 0);
        for _ in 0..membership.count.min(64) {
            socket::set_option(fd, libc::SOL_PACKET, libc::PACKET_ADD_MEMBERSHIP, &request)?;
        }
    }
    options::rebuild(fd, &late)?;
    Ok(made)
}
