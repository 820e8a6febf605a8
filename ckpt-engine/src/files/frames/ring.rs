//! Rings of frames (`PACKET_RX_RING`): memory that the kernel fills and a sniffer empties.
//!
//! Each of the two remembers by itself where it goes on, so the ring is of use only if the kernel
//! goes on where the program waits. Where that is it tells nobody, so it is looked up
//! ([`crate::eye`]). A new ring begins at its beginning; it is advanced by frames that the socket is
//! sent over loopback, of a protocol that nobody speaks, before it listens to anything else and
//! before other sockets for frames are there. Then its memory is made as it was.

use std::{
    collections::HashSet,
    fs, io,
    os::fd::BorrowedFd,
    time::{Duration, Instant},
};

use ckpt_format::files::{PacketMap, PacketRing};

use super::sending;
use crate::{
    btf::Types,
    eye::{self, Eye},
    files::{
        Source,
        find::{Object, Refusal},
    },
    procfs,
    sys::{
        packet::{FrameHeader, PacketSender},
        ring::Ring,
        socket,
    },
};

/// The version that hands over whole blocks.
const V3: u32 = 2;
/// The owner of a frame or block is the program. All bits clear: it is the kernel.
const USER: u32 = 1;
/// The most that travels of one ring, in bytes.
pub(super) const UNREAD_BYTES_MAX: usize = 64 << 20;
/// A larger ring than this is not believed in.
const RING_BYTES_MAX: usize = 4 << 30;
/// Loopback is the first link of each network.
pub(super) const LOOPBACK: u32 = 1;
/// The first of two EtherTypes that are kept for experiments.
pub(super) const PROTOCOL: [u8; 2] = [0x88, 0xb5];
/// The other one, of which nothing is sent here: a socket that was bound cannot be bound to nothing
/// again.
const IDLE: [u8; 2] = [0x88, 0xb6];
/// How long one frame may take over loopback.
const PATIENCE: Duration = Duration::from_secs(2);

/// Where things are in a ring.
#[derive(Clone, Copy, Debug)]
pub(super) struct Shape {
    pub(super) version: u32,
    block: usize,
    blocks: usize,
    frame: usize,
    pub(super) frames: usize,
}

impl Shape {
    pub(super) fn of(version: u32, layout: &[u32; 7]) -> io::Result<Self> {
        let [block, blocks, frame, frames, ..] = layout.map(|word| word as usize);
        let size = block.checked_mul(blocks);
        let fits = version <= V3
            && frame >= 64
            && frame <= block
            && (block / frame).checked_mul(blocks) == Some(frames)
            && size.is_some_and(|size| size <= RING_BYTES_MAX);
        if !fits {
            return Err(io::ErrorKind::InvalidData.into());
        }
        Ok(Self { version, block, blocks, frame, frames })
    }

    pub(super) fn len(self) -> usize {
        self.block * self.blocks
    }

    /// How many things are handed over one by one.
    fn count(self) -> usize {
        if self.version == V3 { self.blocks } else { self.frames }
    }

    /// Where one of them begins, and how long it is.
    fn slot(self, index: usize) -> (usize, usize) {
        if self.version == V3 {
            return (index * self.block, self.block);
        }
        self.frame_at(index)
    }

    /// Where a frame begins, and how much room it has.
    pub(super) fn frame_at(self, index: usize) -> (usize, usize) {
        let in_block = self.block / self.frame;
        (index / in_block * self.block + index % in_block * self.frame, self.frame)
    }

    /// Where it says who owns it.
    fn status(self, index: usize) -> usize {
        // Behind the version of the block and the place of its private bytes.
        self.slot(index).0 + if self.version == V3 { 8 } else { 0 }
    }

    /// How much of a slot that is the program's means something.
    fn used(self, ring: &Ring, index: usize) -> io::Result<usize> {
        let (start, length) = self.slot(index);
        // `blk_len` behind the status, the number of packets, and where the first one is.
        let used = if self.version == V3 { ring.word(start + 20)? as usize } else { length };
        Ok(used.min(length))
    }
}

/// Where the kernel keeps its place, in bytes from the socket.
#[derive(Clone, Copy, Debug)]
struct Places {
    frame: u32,
    block: u32,
}

impl Places {
    fn known() -> io::Result<Self> {
        static PLACES: std::sync::OnceLock<Option<Places>> = std::sync::OnceLock::new();
        let find = || {
            let types = Types::read()?;
            let ring = types.offset("packet_sock", "rx_ring")?;
            let in_ring = |member| types.offset("packet_ring_buffer", member);
            let block = types.offset("tpacket_kbdq_core", "kactive_blk_num")?;
            let (frame, core) = (in_ring("head")?, in_ring("prb_bdqc")?);
            Ok::<_, io::Error>(Self { frame: ring + frame, block: ring + core + block })
        };
        PLACES.get_or_init(|| find().ok()).ok_or_else(|| io::ErrorKind::Unsupported.into())
    }
}

pub(super) fn version(fd: BorrowedFd<'_>) -> io::Result<u32> {
    let mut value = [0; 4];
    socket::option(fd, libc::SOL_PACKET, libc::PACKET_VERSION, &mut value)?;
    Ok(u32::from_ne_bytes(value))
}

/// Refuses a ring that cannot be moved, and finds out what takes long.
pub(super) fn check(
    source: &Source<'_>,
    object: &Object,
    layouts: &[[u32; 7]],
) -> Result<(), Refusal> {
    if let Err(error) = Places::known().and_then(|_| sending::place()) {
        return Err(Refusal::new(
            format!("a sniffer whose ring this kernel does not let us look into ({error})"),
            "end the program, or let it capture without a ring",
        ));
    }
    eye::prepare();
    maps(source, object, total(version(object.fd())?, layouts)?).map(drop)
}

/// How long the map of rings with these layouts is.
pub(super) fn total(version: u32, layouts: &[[u32; 7]]) -> io::Result<usize> {
    let lengths = layouts.iter().map(|layout| Shape::of(version, layout).map(Shape::len));
    lengths.sum()
}

/// Where processes have the rings mapped: each as a whole, and by one that has the socket.
pub(super) fn maps(
    source: &Source<'_>,
    object: &Object,
    length: usize,
) -> Result<Vec<PacketMap>, Refusal> {
    let mut maps = Vec::new();
    for (place, holder) in source.processes.iter().enumerate() {
        let path = procfs::path(holder.host_pid, "maps");
        // One that has ended meanwhile maps nothing.
        let text = fs::read_to_string(path).unwrap_or_default();
        for line in procfs::parse_maps(&text) {
            if line.inode != object.status.inode || !line.name.starts_with("socket:[") {
                continue;
            }
            let whole = (line.end - line.start) as usize == length && line.shared;
            let held = object.holders.iter().any(|(holder, _)| *holder == place);
            if !whole || !held {
                return Err(Refusal::new(
                    "a sniffer's ring that is mapped in part, or without its socket",
                    "end the program, or let it capture without a ring",
                ));
            }
            let (start, protection) = (line.start, line.protection);
            maps.push(PacketMap { pid: holder.pid, start, protection });
        }
    }
    Ok(maps)
}

/// Where the kernel goes on.
fn position(source: &Source<'_>, object: &Object, version: u32) -> io::Result<u32> {
    let places = Places::known()?;
    let &(place, fd) = object.holders.first().ok_or(io::ErrorKind::NotFound)?;
    let eye = Eye::on(source.processes[place].host_pid)?;
    let socket = eye.socket(fd, object.status.inode)?;
    // The number of a block has 16 bits.
    Ok(match version {
        V3 => eye.word(socket, places.block)? & 0xffff,
        _ => eye.word(socket, places.frame)?,
    })
}

pub(super) fn capture(
    source: &Source<'_>,
    object: &Object,
    layout: [u32; 7],
    ring: &Ring,
) -> Result<PacketRing, Refusal> {
    let version = version(object.fd())?;
    let shape = Shape::of(version, &layout)?;
    let (mut unread, mut bytes) = (Vec::new(), 0);
    for index in 0..shape.count() {
        if ring.word(shape.status(index))? == 0 {
            continue;
        }
        let slot = ring.read(shape.slot(index).0, shape.used(ring, index)?)?;
        let used = slot.iter().rposition(|&byte| byte != 0).map_or(0, |last| last + 1);
        bytes += used;
        if bytes > UNREAD_BYTES_MAX {
            return Err(Refusal::new(
                "a sniffer's ring with more than 64 MiB that it has not read",
                "try again when it has read them, or end the program",
            ));
        }
        let index = u32::try_from(index).map_err(io::Error::other)?;
        unread.push((index, serde_bytes::ByteBuf::from(&slot[..used])));
    }
    let mut position = position(source, object, version)?;
    if version == V3 {
        let next = (position + 1) % layout[1].max(1);
        let is_free = !unread.iter().any(|(index, _)| *index == next || *index == position);
        let (start, length) = shape.slot(position as usize);
        if let Some(block) = handed_over(ring.read(start, length)?).filter(|_| is_free) {
            unread.push((position, serde_bytes::ByteBuf::from(block)));
            position = next;
        }
    }
    Ok(PacketRing { version, layout, position, unread, maps: Vec::new() })
}

/// The block that the kernel is filling, as it hands it over when its time is up. None for one in
/// which nothing is.
fn handed_over(mut block: Vec<u8>) -> Option<Vec<u8>> {
    const TIME_IS_UP: u32 = 1 << 5;
    const STATUS: usize = 8;
    const COUNT: usize = 12;
    const FIRST: usize = 16;
    const USED: usize = 20;
    const LAST_TIME: usize = 40;
    /// The least that a packet takes.
    const HEADER: usize = 48;
    let word = |block: &[u8], at: usize| {
        let bytes = block.get(at..at + 4)?.try_into().ok()?;
        Some(u32::from_ne_bytes(bytes) as usize)
    };
    // The program can write here, too.
    let count = word(&block, COUNT).filter(|&count| count > 0 && count < block.len() / HEADER)?;
    let mut last = word(&block, FIRST)?;
    // Each packet tells where the next one is.
    for _ in 1..count {
        last = last.checked_add(word(&block, last)?)?;
    }
    let time = block.get(last + 4..last + 12)?.to_vec();
    block.get_mut(last..last + 4)?.fill(0);
    block.get_mut(LAST_TIME..LAST_TIME + 8)?.copy_from_slice(&time);
    block.get_mut(STATUS..STATUS + 4)?.copy_from_slice(&(USER | TIME_IS_UP).to_ne_bytes());
    block.truncate(word(&block, USED)?);
    Some(block)
}

/// Gives a socket that listens to nothing yet a ring, by this option. Its version is set.
pub(super) fn make(fd: BorrowedFd<'_>, option: i32, wanted: &PacketRing) -> io::Result<()> {
    let shape = Shape::of(wanted.version, &wanted.layout)?;
    let words = if shape.version == V3 { 7 } else { 4 };
    let request: Vec<u8> =
        wanted.layout[..words].iter().flat_map(|word| word.to_ne_bytes()).collect();
    socket::set_option(fd, libc::SOL_PACKET, option, &request)
}

/// Brings a new ring into this state.
pub(super) fn refill(fd: BorrowedFd<'_>, ring: &Ring, wanted: &PacketRing) -> io::Result<()> {
    let shape = Shape::of(wanted.version, &wanted.layout)?;
    let position = wanted.position as usize;
    if position >= shape.count() {
        return Err(io::ErrorKind::InvalidData.into());
    }
    let unread: HashSet<usize> = wanted.unread.iter().map(|(index, _)| *index as usize).collect();
    if shape.version == V3 {
        // A block that the program has not given back yet is not the one that is being filled: the
        // kernel waits for it.
        let around = position == 0 && unread.contains(&0);
        fill_blocks(fd, ring, shape, if around { shape.blocks } else { position })?;
    } else {
        fill_frames(fd, ring, shape, position)?;
    }
    for index in 0..shape.count() {
        if !unread.contains(&index) {
            ring.set_word(shape.status(index), 0)?;
        }
    }
    for (index, bytes) in &wanted.unread {
        let (start, length) = match (*index as usize) < shape.count() {
            true => shape.slot(*index as usize),
            false => return Err(io::ErrorKind::InvalidData.into()),
        };
        if bytes.len() > length {
            return Err(io::ErrorKind::InvalidData.into());
        }
        ring.write(start, bytes)?;
    }
    Ok(())
}

/// The address of a packet socket.
pub(super) fn address(protocol: [u8; 2], device: u32) -> Vec<u8> {
    let mut address = (libc::AF_PACKET as u16).to_ne_bytes().to_vec();
    address.extend(protocol);
    address.extend(device.to_ne_bytes());
    address.extend([0; 12]);
    address
}

/// A frame of the protocol that nobody speaks.
fn nobodys(length: usize) -> Vec<u8> {
    let mut frame = vec![0; 12];
    frame.extend(PROTOCOL);
    frame.resize(length.max(60), 0);
    frame
}

/// Has the kernel fill frames until it is to go on at `position`.
fn fill_frames(fd: BorrowedFd<'_>, ring: &Ring, shape: Shape, position: usize) -> io::Result<()> {
    if position == 0 {
        return Ok(());
    }
    socket::bind(fd, &address(PROTOCOL, LOOPBACK))?;
    let sender = PacketSender::open(LOOPBACK, FrameHeader::None)?;
    let frame = nobodys(60);
    for index in 0..position {
        sender.send(&frame)?;
        until(|| Ok(ring.word(shape.status(index))? != 0))?;
    }
    socket::bind(fd, &address(IDLE, LOOPBACK))
}

/// Has the kernel fill blocks until it is to go on with the block at `position`, in which nothing
/// is then.
///
/// A block is handed over when a frame does not fit, which then is the first in the next block. So
/// the last time that one is the program's already: the kernel waits for it, and begins it anew.
fn fill_blocks(fd: BorrowedFd<'_>, ring: &Ring, shape: Shape, position: usize) -> io::Result<()> {
    if position == 0 {
        return Ok(());
    }
    socket::bind(fd, &address(PROTOCOL, LOOPBACK))?;
    let sender = PacketSender::open(LOOPBACK, FrameHeader::None)?;
    let mut length = (shape.block / 4).clamp(60, 60_000);
    // All the way round it is that already.
    if position < shape.blocks {
        ring.set_word(shape.status(position), USER)?;
    }
    for index in 0..position {
        until(|| {
            if ring.word(shape.status(index))? != 0 {
                return Ok(true);
            }
            match sender.send(&nobodys(length)) {
                // The link takes no frames of this size.
                Err(error) if error.raw_os_error() == Some(libc::EMSGSIZE) => {
                    length = (length / 2).max(60);
                }
                result => result?,
            }
            Ok(false)
        })?;
    }
    socket::bind(fd, &address(IDLE, LOOPBACK))
}

/// Waits until something holds, which the kernel does as soon as it can.
fn until(mut holds: impl FnMut() -> io::Result<bool>) -> io::Result<()> {
    let start = Instant::now();
    while !holds()? {
        if start.elapsed() > PATIENCE {
            return Err(io::ErrorKind::TimedOut.into());
        }
        std::thread::yield_now();
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ring_that_cannot_be_is_refused() {
        let layout = [4096, 2, 512, 16, 0, 0, 0];
        let shape = Shape::of(1, &layout).unwrap();
        assert_eq!((shape.len(), shape.count(), shape.slot(9)), (8192, 16, (4096 + 512, 512)));
        assert_eq!(Shape::of(V3, &layout).unwrap().count(), 2);
        for (at, value) in [(0, u32::MAX), (1, 3), (2, 0), (2, 8192), (3, 17)] {
            let mut other = layout;
            other[at] = value;
            assert!(Shape::of(1, &other).is_err(), "{other:?}");
        }
        assert!(Shape::of(3, &layout).is_err());
    }

    #[test]
    fn a_block_that_is_being_filled_is_handed_over_with_its_last_packet_marked() {
        let mut block = vec![0; 4096];
        assert_eq!(handed_over(block.clone()), None);
        let mut put = |at: usize, word: u32| block[at..at + 4].copy_from_slice(&word.to_ne_bytes());
        // Two packets: the second says where a third would be.
        for (at, word) in [(12, 2), (16, 48), (20, 48 + 96 + 80), (48, 96), (144, 80), (148, 7)] {
            put(at, word);
        }
        let handed = handed_over(block.clone()).unwrap();
        let word = |at: usize| u32::from_ne_bytes(handed[at..at + 4].try_into().unwrap());
        assert_eq!((handed.len(), word(8) & USER, word(48), word(144)), (224, USER, 96, 0));
        assert_eq!(word(40), 7, "the time of the last packet");
        for (at, value) in [(12, u32::MAX), (16, u32::MAX), (48, u32::MAX)] {
            let mut damaged = block.clone();
            damaged[at..at + 4].copy_from_slice(&value.to_ne_bytes());
            assert_eq!(handed_over(damaged), None);
        }
    }
}
