//! Sockets for whole frames (`AF_PACKET`): of DHCP clients and servers, and of sniffers. The
//! frames that wait in them are lost, as any frame may be, but for those in a [`ring`].

mod ring;
mod sending;

use std::{
    collections::{BTreeMap, HashMap},
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

use ckpt_format::{
    files::{
        FileId, Files, Kind, PacketMap, PacketMembership, PacketRing, PacketSocket, SocketOption,
    },
    process::Descriptor,
};

use super::{
    Argument, Remote, Source,
    find::{Object, Refusal},
    options::{self, Family},
    rebuild::RebuildError,
    unix::diagnosis::{self, half, word},
};
use crate::sys::{
    ring::Ring,
    socket::{self, End},
};

/// What `packet_diag` tells about one socket.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Entry {
    memberships: Vec<PacketMembership>,
    /// `struct tpacket_req3` of what is received.
    receives: Option<[u32; 7]>,
    /// The same of what is sent.
    sends: Option<[u32; 7]>,
    /// It is in a group (`PACKET_FANOUT`).
    fanout: bool,
}

impl Entry {
    /// Those of its rings, in the order in which they are mapped.
    fn layouts(&self) -> Vec<[u32; 7]> {
        self.receives.into_iter().chain(self.sends).collect()
    }
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
    diagnosis::ask(netlink, &request, diagnosis::Many::All, |body| {
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
            kind @ (2 | 3) => {
                let mut layout = [0; 7];
                for (at, to) in layout.iter_mut().enumerate() {
                    *to = word(value, at * 4)?;
                }
                *if kind == 2 { &mut entry.receives } else { &mut entry.sends } = Some(layout);
            }
            4 => entry.fanout = true,
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
pub(super) fn check(
    source: &Source<'_>,
    object: &Object,
    entries: &Entries,
) -> Result<(), Refusal> {
    let entry = entry(object, entries)?;
    // Groups whose frames a program shares out, which nobody can read.
    if let Some(group) = group(object, entry)?
        && matches!(group.to_ne_bytes()[2], 6 | 7)
    {
        return Err(Refusal::new(
            "packet sockets among which a BPF program shares out frames (PACKET_FANOUT)",
            "end the program",
        ));
    }
    match entry.layouts().as_slice() {
        [] => Ok(()),
        layouts => ring::check(source, object, layouts),
    }
}

/// Number, type and flags of its group.
fn group(object: &Object, entry: &Entry) -> io::Result<Option<i32>> {
    let value = || options::number(object.fd(), libc::SOL_PACKET, libc::PACKET_FANOUT);
    entry.fanout.then(value).transpose()
}

pub(super) fn capture(
    source: &Source<'_>,
    object: &Object,
    entries: &Entries,
) -> Result<Kind, Refusal> {
    let fd = object.fd();
    let entry = entry(object, entries)?;
    let address = socket::address(fd, End::Local)?;
    let mut options = options::capture(fd, Family::Packet)?;
    options.extend(group(object, entry)?.map(|group| SocketOption {
        level: libc::SOL_PACKET,
        name: libc::PACKET_FANOUT,
        value: group.to_ne_bytes().to_vec(),
    }));
    let bytes = address.get(2..4).and_then(|bytes| bytes.try_into().ok());
    let Rings { received: ring, sent, maps } = Rings::read(source, object, entry)?;
    Ok(Kind::Packet(Box::new(PacketSocket {
        socket_type: options::number(fd, libc::SOL_SOCKET, libc::SO_TYPE)?,
        protocol: bytes.unwrap_or_default(),
        device: word(&address, 4)?,
        memberships: entry.memberships.clone(),
        options,
        ring,
        sent,
        maps,
    })))
}

/// The rings of one socket.
#[derive(Debug, Default)]
struct Rings {
    received: Option<PacketRing>,
    sent: Option<PacketRing>,
    maps: Vec<PacketMap>,
}

impl Rings {
    fn read(source: &Source<'_>, object: &Object, entry: &Entry) -> Result<Self, Refusal> {
        let layouts = entry.layouts();
        if layouts.is_empty() {
            return Ok(Self::default());
        }
        let version = ring::version(object.fd())?;
        let total = ring::total(version, &layouts)?;
        let memory = Ring::map(object.fd(), total)?;
        let received = entry.receives.map(|it| ring::capture(source, object, it, &memory));
        let behind = ring::total(version, entry.receives.as_slice())?;
        let sent = entry.sends.map(|it| sending::capture(source, object, it, (&memory, behind)));
        let maps = ring::maps(source, object, total)?;
        Ok(Self { received: received.transpose()?, sent: sent.transpose()?, maps })
    }

    /// Gives a socket that listens to nothing yet its rings. Its version is set.
    fn make(fd: BorrowedFd<'_>, packet: &PacketSocket) -> io::Result<()> {
        let Some(version) = packet.rings().next().map(|ring| ring.version) else { return Ok(()) };
        for (option, ring) in
            [(libc::PACKET_RX_RING, &packet.ring), (libc::PACKET_TX_RING, &packet.sent)]
        {
            ring.as_ref().map_or(Ok(()), |ring| ring::make(fd, option, ring))?;
        }
        let layouts: Vec<_> = packet.rings().map(|ring| ring.layout).collect();
        let memory = Ring::map(fd, ring::total(version, &layouts)?)?;
        if let Some(received) = &packet.ring {
            ring::refill(fd, &memory, received)?;
        }
        if let Some(sent) = &packet.sent {
            let behind = packet.ring.as_ref().map(|ring| ring.layout);
            sending::refill(fd, (&memory, ring::total(version, behind.as_slice())?), sent)?;
        }
        Ok(())
    }
}

fn failed(source: io::Error) -> RebuildError {
    RebuildError::Kernel { object: "packet socket", source }
}

/// A socket that listens to nothing yet, with its ring. Those with one come first: what rings are
/// advanced by is seen by all others.
pub(super) fn make(packet: &PacketSocket) -> Result<OwnedFd, RebuildError> {
    let make = || {
        // Without a protocol it receives nothing before it is complete.
        let made = socket::socket(libc::AF_PACKET, packet.socket_type, 0)?;
        // What the layout of frames depends on cannot be set beside a ring, and a filter would
        // keep frames out of it.
        options::rebuild(made.as_fd(), &of_packets(packet, false))?;
        Rings::make(made.as_fd(), packet)?;
        Ok(made)
    };
    make().map_err(failed)
}

/// The options of packet sockets, or those that all sockets have.
fn of_packets(packet: &PacketSocket, others: bool) -> Vec<SocketOption> {
    let is =
        |option: &&SocketOption| (option.level == libc::SOL_PACKET) != others && !is_group(option);
    packet.options.iter().filter(is).cloned().collect()
}

fn is_group(option: &SocketOption) -> bool {
    (option.level, option.name) == (libc::SOL_PACKET, libc::PACKET_FANOUT)
}

/// Lets it listen.
pub(super) fn complete(fd: BorrowedFd<'_>, packet: &PacketSocket) -> Result<(), RebuildError> {
    let complete = || {
        let others = of_packets(packet, true);
        options::rebuild(fd, &others)?;
        options::rebuild_buffers(fd, &others)?;
        if packet.protocol != [0; 2] {
            socket::bind(fd, &ring::address(packet.protocol, packet.device))?;
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
        let group: Vec<_> = packet.options.iter().filter(|it| is_group(it)).cloned().collect();
        options::rebuild(fd, &group)
    };
    complete().map_err(failed)
}

/// Has the processes map their rings.
pub(super) fn finish(
    files: &Files,
    tables: &BTreeMap<i32, Vec<Descriptor>>,
    remote: &mut dyn Remote,
) -> Result<(), RebuildError> {
    for (place, file) in files.files.iter().enumerate() {
        let Kind::Packet(packet) = &file.kind else { continue };
        let length = |ring: &PacketRing| u64::from(ring.layout[0]) * u64::from(ring.layout[1]);
        let length = packet.rings().map(length).sum();
        let id = FileId(u32::try_from(place).map_err(|_| RebuildError::Damaged)?);
        // Those of an older image are with the ring.
        let maps = packet.rings().flat_map(|ring| &ring.maps).chain(&packet.maps);
        for map in maps {
            let mut table = tables.get(&map.pid).into_iter().flatten();
            let held = table.find(|held| held.file == id).ok_or(RebuildError::Damaged)?;
            map_rings(length, map, held.fd, remote)?;
        }
    }
    Ok(())
}

fn map_rings(
    length: u64,
    &PacketMap { pid, start, protection }: &PacketMap,
    fd: i32,
    remote: &mut dyn Remote,
) -> Result<(), RebuildError> {
    // Nothing else may be replaced by it.
    if !remote.has_frames(pid, start, length) {
        return Err(RebuildError::Damaged);
    }
    let flags = (libc::MAP_SHARED | libc::MAP_FIXED) as u64;
    let number = u64::from(fd.cast_unsigned());
    let arguments = [start, length, u64::from(protection), flags, number, 0];
    remote
        .call(pid, libc::SYS_mmap, arguments.map(Argument::Value))
        .map(drop)
        .map_err(|source| RebuildError::Remote { pid, object: "ring of frames", source })
}
