//! Packet sockets that send from a ring of frames, which they share with the kernel. Each side
//! remembers by itself where it goes on.

use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use ckpt_engine::sys::{
    ring::Ring,
    socket::{self, Along},
};

use super::plain::set;
use crate::workload::context::Context;
use crate::workload::outcome::{Failure, ensure, same};

const PAUSE: Duration = Duration::from_millis(5);
const BLOCK: usize = 4096;
const BLOCKS: usize = 5;
const FRAME: usize = 512;
const FRAMES: usize = BLOCK / FRAME * BLOCKS;
/// An Ethernet header, a number, and what makes a frame as long as the shortest.
const LENGTH: usize = 60;
const ETHERNET: usize = 14;

/// The address on loopback for an EtherType of our own.
fn address(kind: u8) -> Vec<u8> {
    let mut address = (libc::AF_PACKET as u16).to_ne_bytes().to_vec();
    address.extend([0x8a, kind]);
    address.extend(1i32.to_ne_bytes());
    address.extend([0; 12]);
    address
}

/// Where the state of a frame, its length and the frame itself are in a slot.
fn places(version: i32) -> (usize, usize, usize) {
    match version {
        0 => (0, 8, 32),
        1 => (0, 4, 32),
        _ => (20, 16, 48),
    }
}

fn add_ring(socket: &OwnedFd, version: i32, option: i32) -> Result<(), Failure> {
    let mut layout = vec![BLOCK, BLOCKS, FRAME, FRAMES];
    layout.extend(if version == 2 { &[0, 0, 0][..] } else { &[] });
    let layout: Vec<u8> = layout.iter().flat_map(|&word| (word as u32).to_ne_bytes()).collect();
    Ok(socket::set_option(socket.as_fd(), libc::SOL_PACKET, option, &layout)?)
}

/// A socket that sends from a ring, in which all is filled in that is the same in all frames.
struct Sender {
    socket: OwnedFd,
    ring: Ring,
    version: i32,
    /// Where in the memory its own ring begins.
    start: usize,
    next: usize,
}

impl Sender {
    fn new(version: i32, kind: u8, receives: bool) -> Result<Self, Failure> {
        let socket = socket::socket(libc::AF_PACKET, libc::SOCK_RAW, 0)?;
        set(&socket, (libc::SOL_PACKET, libc::PACKET_VERSION, version))?;
        add_ring(&socket, version, libc::PACKET_TX_RING)?;
        if receives {
            add_ring(&socket, version, libc::PACKET_RX_RING)?;
        }
        let start = if receives { BLOCK * BLOCKS } else { 0 };
        let ring = Ring::map(socket.as_fd(), start + BLOCK * BLOCKS)?;
        let (_, length, frame) = places(version);
        for index in 0..FRAMES {
            let at = start + index * FRAME;
            let mut header = [0; ETHERNET];
            header[12..].copy_from_slice(&[0x8a, kind]);
            ring.write(at + frame, &header)?;
            ring.write(at + length, &(LENGTH as u32).to_ne_bytes())?;
        }
        if receives {
            socket::bind(socket.as_fd(), &address(kind))?;
        }
        Ok(Self { socket, ring, version, start, next: 0 })
    }

    fn send(&mut self, number: u64, kind: u8) -> Result<(), Failure> {
        let (state, _, frame) = places(self.version);
        let at = self.start + self.next * FRAME;
        self.next = (self.next + 1) % FRAMES;
        self.ring.write(at + frame + ETHERNET, &number.to_le_bytes())?;
        self.ring.set_word(at + state, 1)?;
        let receiver = address(kind);
        let along = Along { receiver: &receiver, ..Along::default() };
        same("bytes sent from a ring", socket::send(self.socket.as_fd(), &[], &along, 0)?, LENGTH)?;
        let start = Instant::now();
        while self.ring.word(at + state)? != 0 {
            ensure(start.elapsed() < Duration::from_secs(5), || {
                "the kernel does not send what the program has put into the ring".to_owned()
            })?;
            std::thread::yield_now();
        }
        Ok(())
    }
}

impl Sender {
    /// Takes a frame out of the ring of what is received, as its second version is.
    fn take(&self, number: u64) -> Result<(), Failure> {
        let at = number as usize % FRAMES * FRAME;
        let start = Instant::now();
        while self.ring.word(at)? == 0 {
            ensure(start.elapsed() < Duration::from_secs(5), || "no frame came".to_owned())?;
            std::thread::yield_now();
        }
        let frame = self.ring.read(at + 12, 2)?;
        let frame = usize::from(u16::from_ne_bytes([frame[0], frame[1]]));
        let found = self.ring.read(at + frame + ETHERNET, 8)?;
        same("a frame from a ring", &found[..], &number.to_le_bytes()[..])?;
        Ok(self.ring.set_word(at, 0)?)
    }
}

/// Each version of rings, from which another socket gets its frames.
pub(super) fn alone(context: &mut Context) -> Result<(), Failure> {
    let mut pairs = Vec::new();
    for version in 0..3 {
        let kind = 0x20 + version as u8;
        // What waits in a socket without a ring would be lost.
        let receiver = Sender::new(1, kind, true)?;
        pairs.push((Sender::new(version, kind, false)?, receiver, kind));
    }
    let mut number = 0u64;
    while context.step(PAUSE)? {
        for (sender, receiver, kind) in &mut pairs {
            sender.send(number, *kind)?;
            receiver.take(number)?;
        }
        number += 1;
        if context.progress.plant() {
            // The program and the kernel go on in different places.
            pairs[1].0.next += 1;
        }
    }
    Ok(())
}

/// Two rings of one socket, which gets what it sends itself.
pub(super) fn both_ways(context: &mut Context) -> Result<(), Failure> {
    const KIND: u8 = 0x24;
    let mut sender = Sender::new(1, KIND, true)?;
    let mut number = 0u64;
    while context.step(PAUSE)? {
        sender.send(number, KIND)?;
        sender.take(number)?;
        number += 1;
        if context.progress.plant() {
            number += 1;
        }
    }
    Ok(())
}
