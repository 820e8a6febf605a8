//! Tun and tap links, whose other end is a program.

use std::fs::File;
use std::io::Write;
use std::net::UdpSocket;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::Duration;

use ckpt_engine::sys::{
    ethtool,
    tun::{self, Change, Query},
};

use super::wire::{ADDRESS, Attributes, GROUP, INFO, MTU, QUEUE, Wire, host, ip};
use crate::workload::context::Context;
use crate::workload::outcome::{Failure, ensure, same};
use crate::workload::process::proc_text;

const PAUSE: Duration = Duration::from_millis(5);
/// Link settings that must stay.
const KEPT: [u16; 6] = [ADDRESS, MTU, QUEUE, GROUP, INFO, 33];

fn open() -> Result<File, Failure> {
    Ok(File::options().read(true).write(true).open("/dev/net/tun")?)
}

/// The next packet that waits.
fn take(file: BorrowedFd<'_>, before: usize) -> Result<Vec<u8>, Failure> {
    let mut buffer = vec![0; 70_000];
    let length = tun::read_waiting(file, &mut buffer)?;
    let length = length.ok_or_else(|| Failure::new("a packet did not come"))?;
    Ok(buffer[before.min(length)..length].to_vec())
}

/// What a file has that only it can tell.
fn look(file: BorrowedFd<'_>, link: &str) -> Result<(u16, [i32; 2], Vec<String>), Failure> {
    let (name, flags) = tun::attachment(file)?.unwrap_or_default();
    same("the link of a file", name.as_str(), link)?;
    let numbers = [tun::query(file, Query::SendBuffer)?, tun::query(file, Query::HeaderSize)?];
    Ok((flags, numbers, ethtool::features(link)?))
}

/// IPv4 and UDP of a datagram: ports, and what is in it. None for another packet.
fn datagram(packet: &[u8]) -> Option<(u16, u16, u64)> {
    let is = packet.first() == Some(&0x45) && packet.get(9) == Some(&17);
    let half = |at: usize| Some(u16::from_be_bytes([*packet.get(at)?, *packet.get(at + 1)?]));
    let number = packet.get(28..36)?.try_into().ok().map(u64::from_le_bytes);
    is.then_some((half(20)?, half(22)?, number?))
}

/// What a server at the other end of a tunnel answers to a datagram.
fn answer(packet: &[u8]) -> Vec<u8> {
    let mut answer = packet.to_vec();
    for (one, other, length) in [(12, 16, 4), (20, 22, 2)] {
        for at in 0..length {
            answer.swap(one + at, other + at);
        }
    }
    answer
}

/// A program that is its own VPN: what it sends comes out of the tunnel, where it answers itself.
/// Some packets always wait in the tunnel.
pub(super) fn tunnel(context: &mut Context) -> Result<(), Failure> {
    const LINK: &str = "made-tun";
    const AHEAD: u64 = 5;
    super::stand_apart()?;
    let wire = Wire::open()?;
    let mut file = open()?;
    tun::choose_index(file.as_fd(), 4711)?;
    tun::attach(file.as_fd(), LINK, tun::TUN | tun::NO_HEADER)?;
    tun::change(file.as_fd(), Change::Owner, 33)?;
    tun::change(file.as_fd(), Change::Group, 34)?;
    tun::change(file.as_fd(), Change::SendBuffer, 300_000)?;
    // Without this the kernel announces itself, which is in the way of what is counted here.
    std::fs::write(format!("/proc/sys/net/ipv6/conf/{LINK}/disable_ipv6"), "1")?;
    wire.change(LINK, Attributes::default().number(MTU, 1380).number(QUEUE, 321))?;
    wire.address(LINK, ip(60, 1))?;
    wire.up(LINK)?;
    let socket = UdpSocket::bind((host(60, 1), 0))?;
    socket.connect((host(60, 2), 1194))?;
    socket.set_read_timeout(Some(Duration::from_secs(5)))?;
    let before = (wire.describe(LINK, &KEPT)?, look(file.as_fd(), LINK)?);
    same("the number of a link", wire.index(LINK)?, 4711)?;
    for number in 0..AHEAD {
        socket.send(&number.to_le_bytes())?;
    }
    let mut taken = 0u64;
    while context.step(PAUSE)? {
        socket.send(&(taken + AHEAD).to_le_bytes())?;
        let packet = take(file.as_fd(), 0)?;
        let found = datagram(&packet).map(|(_, to, number)| (to, number));
        same("a packet in the tunnel", found, Some((1194, taken)))?;
        file.write_all(&answer(&packet))?;
        let mut bytes = [0; 8];
        socket.recv(&mut bytes)?;
        same("an answer from the tunnel", u64::from_le_bytes(bytes), taken)?;
        taken += 1;
        let now = (wire.describe(LINK, &KEPT)?, look(file.as_fd(), LINK)?);
        same("a tunnel", now, before.clone())?;
        if context.progress.plant() {
            take(file.as_fd(), 0)?;
        }
    }
    // It was never told to stay.
    drop(file);
    same("a tunnel without a program", wire.index(LINK).is_err(), true)
}

/// Taps: one with two queues of which one rests, with headers of a virtual card; one that stays
/// without a file; and a file that is not attached to any.
pub(super) fn taps(context: &mut Context) -> Result<(), Failure> {
    const FLAGS: u16 = tun::TAP | tun::NO_HEADER | tun::VNET_HEADER | tun::MULTI_QUEUE;
    const MAC: [u8; 6] = [2, 0x42, 0, 0, 0, 0x60];
    const VNET: usize = 12;
    /// An Ethernet header.
    const ETHERNET: usize = 14;
    super::stand_apart()?;
    let wire = Wire::open()?;
    let (file, resting, idle) = (open()?, open()?, open()?);
    tun::attach(file.as_fd(), "made-tap", FLAGS)?;
    tun::attach(resting.as_fd(), "made-tap", FLAGS)?;
    tun::set_queue(resting.as_fd(), tun::DETACH_QUEUE)?;
    tun::change(file.as_fd(), Change::HeaderSize, VNET as i32)?;
    // Checksums and segments of TCP are left to the reader.
    tun::change(file.as_fd(), Change::Offload, 0x1 | 0x2 | 0x4)?;
    keep_tap()?;
    let six = open()?;
    tun::attach(six.as_fd(), "made-six", tun::TUN)?;
    wire.up("made-six")?;
    std::fs::write("/proc/sys/net/ipv6/conf/made-tap/disable_ipv6", "1")?;
    wire.change("made-tap", Attributes::default().with(ADDRESS, &MAC))?;
    wire.address("made-tap", ip(61, 1))?;
    wire.up("made-tap")?;
    neighbour(&wire, "made-tap", 61)?;
    let socket = UdpSocket::bind((host(61, 1), 0))?;
    socket.connect((host(61, 2), 67))?;
    socket.set_read_timeout(Some(Duration::from_secs(5)))?;
    let describe = |wire: &Wire| {
        Ok::<_, Failure>((
            wire.describe("made-tap", &KEPT)?,
            wire.describe("kept-tap", &KEPT)?,
            look(file.as_fd(), "made-tap")?,
            look(resting.as_fd(), "made-tap")?.0,
            addresses("made-six")?,
        ))
    };
    let before = describe(&wire)?;
    ensure(before.3 & tun::DETACH_QUEUE != 0, || "a queue that should rest does not".to_owned())?;
    socket.send(&0u64.to_le_bytes())?;
    let mut number = 0u64;
    while context.step(PAUSE)? {
        socket.send(&(number + 1).to_le_bytes())?;
        let frame = take(file.as_fd(), VNET)?;
        ensure(frame.get(6..12) == Some(&MAC), || "a frame of another sender".to_owned())?;
        let found = datagram(&frame[ETHERNET..]).map(|(_, to, number)| (to, number));
        same("a frame of a tap", found, Some((67, number)))?;
        let mut reply = vec![0; VNET];
        // The checksum was left to us, and is left to the kernel again.
        reply[0] = 1;
        reply[6..10].copy_from_slice(&[34, 0, 6, 0]);
        reply.extend(MAC);
        reply.extend(OTHER);
        reply.extend(&frame[12..ETHERNET]);
        reply.extend(answer(&frame[ETHERNET..]));
        (&file).write_all(&reply)?;
        let mut bytes = [0; 8];
        socket.recv(&mut bytes)?;
        same("an answer from a tap", u64::from_le_bytes(bytes), number)?;
        number += 1;
        same("taps", describe(&wire)?, before.clone())?;
        same("a file without a link", tun::attachment(idle.as_fd())?.is_none(), true)?;
        if context.progress.plant() {
            tun::change(file.as_fd(), Change::Offload, 0x1)?;
        }
    }
    // What only the kernel knows of them shows when they are used.
    tun::set_queue(resting.as_fd(), tun::ATTACH_QUEUE)?;
    tun::attach(idle.as_fd(), "late-tap", tun::TAP)?;
    wire.index("late-tap")?;
    tun::attach(open()?.as_fd(), "kept-tap", tun::TAP)?;
    drop((file, resting, idle, six));
    for gone in ["made-tap", "late-tap", "made-six"] {
        same("a tap without a program", wire.index(gone).is_err(), true)?;
    }
    wire.remove("kept-tap")
}

/// A tap with a filter, which keeps all but some datagrams from the program.
pub(super) fn filter(context: &mut Context) -> Result<(), Failure> {
    const LINK: &str = "made-sieve";
    /// An Ethernet header.
    const ETHERNET: usize = 14;
    super::stand_apart()?;
    let wire = Wire::open()?;
    let file = open()?;
    tun::attach(file.as_fd(), LINK, tun::TAP | tun::NO_HEADER)?;
    tun::attach_filter(file.as_fd(), &only_port(67))?;
    std::fs::write(format!("/proc/sys/net/ipv6/conf/{LINK}/disable_ipv6"), "1")?;
    wire.address(LINK, ip(62, 1))?;
    wire.up(LINK)?;
    neighbour(&wire, LINK, 62)?;
    let socket = UdpSocket::bind((host(62, 1), 0))?;
    let mut number = 0u64;
    while context.step(PAUSE)? {
        // It never comes, unless it is asked for.
        let port = if context.progress.plant() { 67 } else { 68 };
        socket.send_to(&[0xff; 8], (host(62, 2), port))?;
        socket.send_to(&number.to_le_bytes(), (host(62, 2), 67))?;
        let frame = take(file.as_fd(), ETHERNET)?;
        let found = datagram(&frame).map(|(_, to, number)| (to, number));
        same("a frame that passes a filter", found, Some((67, number)))?;
        number += 1;
    }
    Ok(())
}

/// A filter that passes datagrams of IPv4 to one port.
fn only_port(port: u32) -> Vec<u8> {
    /// Load a half, compare, tell how much of the frame is wanted.
    const LOAD: u16 = 0x28;
    const IF_EQUAL: u16 = 0x15;
    const TAKE: u16 = 0x06;
    let instructions: [(u16, u8, u8, u32); 6] = [
        (LOAD, 0, 0, 12),
        (IF_EQUAL, 0, 3, 0x800),
        (LOAD, 0, 0, 36),
        (IF_EQUAL, 0, 1, port),
        (TAKE, 0, 0, 0xffff),
        (TAKE, 0, 0, 0),
    ];
    let bytes = instructions.map(|(code, yes, no, value)| {
        [&code.to_ne_bytes()[..], &[yes, no], &value.to_ne_bytes()].concat()
    });
    bytes.concat()
}

/// A tap that stays without a file, for a user.
fn keep_tap() -> Result<(), Failure> {
    let kept = open()?;
    tun::attach(kept.as_fd(), "kept-tap", tun::TAP)?;
    tun::change(kept.as_fd(), Change::Persist, 1)?;
    Ok(tun::change(kept.as_fd(), Change::Owner, 1000)?)
}

/// The IPv6 addresses of a link. The kernel makes that of a tun up.
fn addresses(link: &str) -> Result<Vec<String>, Failure> {
    let table = proc_text("/proc/thread-self/net/if_inet6")?;
    let is = |line: &&str| line.split_whitespace().last() == Some(link);
    let address = |line: &str| line.split_whitespace().next().map(str::to_owned);
    let found: Vec<_> = table.lines().filter(is).filter_map(address).collect();
    ensure(!found.is_empty(), || format!("{link} has no address"))?;
    Ok(found)
}

/// The station at the other end.
const OTHER: [u8; 6] = [2, 0x42, 0, 0, 0, 0x61];

fn neighbour(wire: &Wire, link: &str, net: u8) -> Result<(), Failure> {
    let mut body = vec![libc::AF_INET as u8, 0, 0, 0];
    body.extend(wire.index(link)?.to_ne_bytes());
    // Permanent.
    body.extend([0x80, 0, 0, 0]);
    body.extend(Attributes::default().with(1, &ip(net, 2)).with(2, &OTHER).0);
    wire.ask(28, 0x600, &body).map(drop)
}
