//! Rings of frames to be sent (`PACKET_TX_RING`): memory that a program fills and the kernel sends
//! from, a frame after the other. Behind the ring of what is received, in the same map.
//!
//! As with that one, where the kernel goes on is looked up, and a new ring is advanced to there: by
//! frames that are sent over loopback, of a protocol that nobody speaks. What is in the ring is part of
//! it, also in frames that are not to be sent: programs fill in once what is the same in all of them.

use std::{io, os::fd::BorrowedFd, sync::OnceLock};

use ckpt_format::files::PacketRing;

use super::ring::{LOOPBACK, PROTOCOL, Shape, UNREAD_BYTES_MAX, address, version};
use crate::{
    btf::Types,
    eye::Eye,
    files::{
        Source,
        find::{Object, Refusal},
    },
    sys::{
        ring::Ring,
        socket::{self, Along},
    },
};

/// `TP_STATUS_*`: the kernel is to send it, or is about to.
const REQUEST: u32 = 1;
const SENDING: u32 = 2;

/// Where the kernel keeps its place, in bytes from the socket.
pub(super) fn place() -> io::Result<u32> {
    static PLACE: OnceLock<Option<u32>> = OnceLock::new();
    let find = || {
        let types = Types::read().ok()?;
        let ring = types.offset("packet_sock", "tx_ring").ok()?;
        Some(ring + types.offset("packet_ring_buffer", "head").ok()?)
    };
    PLACE.get_or_init(find).ok_or_else(|| io::ErrorKind::Unsupported.into())
}

/// Where things are in the header of a frame, which differs from version to version.
#[derive(Clone, Copy, Debug)]
struct Header {
    status: usize,
    len: usize,
    /// Two numbers of 16 bits that say where the frame is, for those that have asked for that
    /// (`PACKET_TX_HAS_OFF`).
    offsets: usize,
    frame: usize,
}

impl Header {
    fn of(version: u32) -> Self {
        match version {
            0 => Self { status: 0, len: 8, offsets: 16, frame: 32 },
            1 => Self { status: 0, len: 4, offsets: 12, frame: 32 },
            _ => Self { status: 20, len: 16, offsets: 24, frame: 48 },
        }
    }
}

/// Reads a ring that begins at `start` of the memory.
pub(super) fn capture(
    source: &Source<'_>,
    object: &Object,
    layout: [u32; 7],
    (memory, start): (&Ring, usize),
) -> Result<PacketRing, Refusal> {
    let version = version(object.fd())?;
    let shape = Shape::of(version, &layout)?;
    let header = Header::of(version);
    let (mut unread, mut bytes) = (Vec::new(), 0);
    for index in 0..shape.frames {
        let (at, len) = shape.frame_at(index);
        let mut frame = memory.read(start + at, len)?;
        // What is on its way has left, or is lost as any frame may be.
        let status = frame.get_mut(header.status..header.status + 4);
        if let Some(status) = status.filter(|status| **status == SENDING.to_ne_bytes()) {
            status.fill(0);
        }
        let Some(last) = frame.iter().rposition(|&byte| byte != 0) else { continue };
        frame.truncate(last + 1);
        bytes += frame.len();
        if bytes > UNREAD_BYTES_MAX {
            return Err(Refusal::new(
                "a ring of frames to be sent with more than 64 MiB in it",
                "end the program, or let it send without a ring",
            ));
        }
        let index = u32::try_from(index).map_err(io::Error::other)?;
        unread.push((index, serde_bytes::ByteBuf::from(frame)));
    }
    let place = place()?;
    let &(holder, fd) = object.holders.first().ok_or(io::Error::from(io::ErrorKind::NotFound))?;
    let eye = Eye::on(source.processes[holder].host_pid)?;
    let position = eye.word(eye.socket(fd, object.status.inode)?, place)?;
    Ok(PacketRing { version, layout, position, unread, maps: Vec::new() })
}

/// Brings a new ring, which begins at `start` of the memory, into this state.
pub(super) fn refill(
    fd: BorrowedFd<'_>,
    (memory, start): (&Ring, usize),
    wanted: &PacketRing,
) -> io::Result<()> {
    let shape = Shape::of(wanted.version, &wanted.layout)?;
    let position = wanted.position as usize;
    if position >= shape.frames {
        return Err(io::ErrorKind::InvalidData.into());
    }
    advance(fd, (memory, start), shape, position)?;
    for (index, bytes) in &wanted.unread {
        let (at, len) = match (*index as usize) < shape.frames {
            true => shape.frame_at(*index as usize),
            false => return Err(io::ErrorKind::InvalidData.into()),
        };
        if bytes.len() > len {
            return Err(io::ErrorKind::InvalidData.into());
        }
        memory.write(start + at, bytes)?;
    }
    Ok(())
}

/// Has the kernel send frames until it is to go on at `position`.
fn advance(
    fd: BorrowedFd<'_>,
    (memory, start): (&Ring, usize),
    shape: Shape,
    position: usize,
) -> io::Result<()> {
    /// With room for a header of a virtual card before it.
    const FRAME: usize = 72;
    if position == 0 {
        return Ok(());
    }
    let header = Header::of(shape.version);
    for index in 0..position {
        let (at, len) = shape.frame_at(index);
        let frame = FRAME.min(len.saturating_sub(header.frame)) as u32;
        let offsets = [header.frame as u16; 2].map(u16::to_ne_bytes).concat();
        memory.write(start + at + header.len, &frame.to_ne_bytes())?;
        memory.write(start + at + header.offsets, &offsets)?;
        memory.set_word(start + at + header.status, REQUEST)?;
    }
    let receiver = address(PROTOCOL, LOOPBACK);
    let along = Along { receiver: &receiver, ..Along::default() };
    // It returns when all have left.
    socket::send(fd, &[], &along, 0)?;
    for index in 0..position {
        let (at, len) = shape.frame_at(index);
        memory.write(start + at, &vec![0; len])?;
    }
    Ok(())
}
