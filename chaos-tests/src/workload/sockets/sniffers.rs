//! Sniffers: packet sockets that share a ring of frames with the kernel. Each side remembers by
//! itself where it goes on.

use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use ckpt_engine::sys::{ring::Ring, socket};

use super::plain::{send, set};
use crate::workload::context::Context;
use crate::workload::outcome::{Failure, ensure, same};

const PAUSE: Duration = Duration::from_millis(5);
const BLOCK: usize = 8192;
const BLOCKS: usize = 6;
const FRAME: usize = 512;
/// An Ethernet header stands before what is sent.
const ETHERNET: usize = 14;

/// The address on loopback for an EtherType of our own.
fn address(kind: u8) -> Vec<u8> {
    let mut address = (libc::AF_PACKET as u16).to_ne_bytes().to_vec();
    address.extend([0x89, kind]);
    address.extend(1i32.to_ne_bytes());
    address.extend([0; 12]);
    address
}

/// A socket with a ring, and its ring.
fn sniffer(version: i32, kind: u8) -> Result<(OwnedFd, Ring), Failure> {
    let sniffer = socket::socket(libc::AF_PACKET, libc::SOCK_RAW, 0)?;
    set(&sniffer, (libc::SOL_PACKET, libc::PACKET_VERSION, version))?;
    // The last three are of version 3 alone: milliseconds, private bytes, features.
    let mut layout = vec![BLOCK, BLOCKS, FRAME, BLOCK / FRAME * BLOCKS];
    layout.extend(if version == 2 { &[20, 16, 0][..] } else { &[] });
    let layout: Vec<u8> = layout.iter().flat_map(|&word| (word as u32).to_ne_bytes()).collect();
    socket::set_option(sniffer.as_fd(), libc::SOL_PACKET, libc::PACKET_RX_RING, &layout)?;
    // A filter that lets everything pass: BPF_RET | BPF_K.
    socket::attach_filter(sniffer.as_fd(), &[6, 0, 0, 0, 0xff, 0xff, 0, 0])?;
    let ring = Ring::map(sniffer.as_fd(), BLOCK * BLOCKS)?;
    socket::bind(sniffer.as_fd(), &address(kind))?;
    Ok((sniffer, ring))
}

/// Waits until something is the program's.
fn wait(ring: &Ring, at: usize) -> Result<u32, Failure> {
    let start = Instant::now();
    loop {
        match ring.word(at)? {
            0 => ensure(start.elapsed() < Duration::from_secs(5), || {
                "the kernel puts no frame where the sniffer waits for it".to_owned()
            })?,
            status => return Ok(status),
        }
        std::thread::yield_now();
    }
}

fn word(ring: &Ring, at: usize) -> Result<usize, Failure> {
    Ok(ring.word(at)? as usize)
}

fn number(ring: &Ring, at: usize) -> Result<u64, Failure> {
    let bytes = ring.read(at + ETHERNET, 8)?;
    Ok(u64::from_le_bytes(bytes.try_into().map_err(|_| Failure::new("a cut number"))?))
}

/// Frames one by one; a few of them always wait.
fn one_by_one(context: &mut Context, version: i32) -> Result<(), Failure> {
    const AHEAD: u64 = 11;
    let kind = 0x10 + version as u8;
    let (_sniffer, ring) = sniffer(version, kind)?;
    let sender = socket::socket(libc::AF_PACKET, libc::SOCK_DGRAM, 0)?;
    for ahead in 0..AHEAD {
        send(sender.as_fd(), &ahead.to_le_bytes(), &address(kind))?;
    }
    let in_block = BLOCK / FRAME;
    // Where a frame begins is told behind status, length and length kept.
    let start = if version == 0 { 16 } else { 12 };
    let mut taken = 0u64;
    while context.step(PAUSE)? {
        send(sender.as_fd(), &(taken + AHEAD).to_le_bytes(), &address(kind))?;
        let slot = taken as usize % (in_block * BLOCKS);
        let at = slot / in_block * BLOCK + slot % in_block * FRAME;
        wait(&ring, at)?;
        let frame = ring.read(at + start, 2)?;
        let frame = usize::from(u16::from_ne_bytes([frame[0], frame[1]]));
        same("a frame in a ring", number(&ring, at + frame)?, taken)?;
        ring.set_word(at, 0)?;
        taken += 1;
        if context.progress.plant() {
            // The sniffer and the kernel go on in different places.
            taken += 1;
        }
    }
    Ok(())
}

pub(super) fn first(context: &mut Context) -> Result<(), Failure> {
    one_by_one(context, 0)
}

pub(super) fn second(context: &mut Context) -> Result<(), Failure> {
    one_by_one(context, 1)
}

/// Frames in blocks, as tcpdump reads them.
pub(super) fn blocks(context: &mut Context) -> Result<(), Failure> {
    const KIND: u8 = 0x12;
    const AT_ONCE: u64 = 3;
    let (_sniffer, ring) = sniffer(2, KIND)?;
    let sender = socket::socket(libc::AF_PACKET, libc::SOCK_DGRAM, 0)?;
    let (mut sent, mut taken, mut block) = (0u64, 0u64, 0);
    let put = |sent: &mut u64| {
        for _ in 0..AT_ONCE {
            let mut bytes = vec![7; 700];
            bytes[..8].copy_from_slice(&sent.to_le_bytes());
            send(sender.as_fd(), &bytes, &address(KIND))?;
            *sent += 1;
        }
        Ok::<_, Failure>(())
    };
    // Two blocks wait unread, and a third is begun.
    while ring.word(2 * BLOCK + 12)? == 0 {
        put(&mut sent)?;
    }
    while context.step(PAUSE)? {
        put(&mut sent)?;
        // As many blocks are read as were filled. On a busy host the kernel ends them before they are
        // full, and would soon have none left.
        let is_nearly_full = |block: usize| {
            Ok::<_, Failure>(ring.word((block + BLOCKS - 2) % BLOCKS * BLOCK + 8)? != 0)
        };
        while taken + 16 < sent || is_nearly_full(block)? {
            let at = block * BLOCK;
            wait(&ring, at + 8)?;
            let mut packet = at + word(&ring, at + 16)?;
            for _ in 0..word(&ring, at + 12)? {
                let frame = ring.read(packet + 24, 2)?;
                let frame = usize::from(u16::from_ne_bytes([frame[0], frame[1]]));
                same("a frame in a block", number(&ring, packet + frame)?, taken)?;
                packet += word(&ring, packet)?;
                taken += 1;
            }
            ring.set_word(at + 8, 0)?;
            block = (block + 1) % BLOCKS;
        }
        if context.progress.plant() {
            block = (block + 1) % BLOCKS;
        }
    }
    Ok(())
}

/// Two sniffers that share the frames out among them, in turn.
pub(super) fn fanout(context: &mut Context) -> Result<(), Failure> {
    const KIND: u8 = 0x13;
    /// `PACKET_FANOUT_LB`: in turn. Defragmented, which is a flag.
    const IN_TURN: i32 = 1 | 0x8000;
    let mut members = Vec::new();
    for _ in 0..2 {
        let member = socket::socket(libc::AF_PACKET, libc::SOCK_DGRAM, 0)?;
        socket::bind(member.as_fd(), &address(KIND))?;
        let group = 4242 | IN_TURN << 16;
        set(&member, (libc::SOL_PACKET, libc::PACKET_FANOUT, group))?;
        members.push(member);
    }
    let sender = socket::socket(libc::AF_PACKET, libc::SOCK_DGRAM, 0)?;
    while context.step(PAUSE)? {
        for _ in 0..2 {
            send(sender.as_fd(), b"for one of them", &address(KIND))?;
        }
        for member in &members {
            let group = super::plain::number(member, libc::SOL_PACKET, libc::PACKET_FANOUT)?;
            same("a group of sniffers", group as u32, 4242 | 0x8001 << 16)?;
            super::plain::receive(member.as_fd(), &mut [0; 64])?;
            let more = super::plain::readable(member.as_fd(), Duration::ZERO)?;
            same("more frames than its share", more, false)?;
        }
        if context.progress.plant() {
            members.remove(0);
            send(sender.as_fd(), b"for the other one", &address(KIND))?;
        }
    }
    Ok(())
}
