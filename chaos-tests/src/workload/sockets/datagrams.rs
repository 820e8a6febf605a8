//! Datagrams of each kind, some of them always unread.

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use ckpt_engine::sys::socket;

use super::plain::{Choice, encode, fresh, keeps, readable, receive, send, set};
use crate::workload::context::Context;
use crate::workload::outcome::{Failure, ensure, same};
use crate::workload::stream::Stream;

const PAUSE: Duration = Duration::from_millis(5);
const SOL: i32 = libc::SOL_SOCKET;

/// A sender and a receiver with numbered datagrams between them, some of them waiting.
struct Line {
    sender: OwnedFd,
    receiver: OwnedFd,
    size: fn(u64) -> usize,
    sent: u64,
    taken: u64,
}

impl Line {
    /// Between two sockets; `ahead` datagrams wait from the start.
    fn new(
        sender: impl Into<OwnedFd>,
        receiver: impl Into<OwnedFd>,
        ahead: u64,
        size: fn(u64) -> usize,
    ) -> Result<Self, Failure> {
        let (sender, receiver) = (sender.into(), receiver.into());
        let mut line = Self { sender, receiver, size, sent: 0, taken: 0 };
        for _ in 0..ahead {
            line.put()?;
        }
        Ok(line)
    }

    fn bytes(&self, number: u64) -> Vec<u8> {
        Stream::new(number).next((self.size)(number))
    }

    fn put(&mut self) -> Result<(), Failure> {
        send(self.sender.as_fd(), &self.bytes(self.sent), &[])?;
        self.sent += 1;
        Ok(())
    }

    fn take(&mut self) -> Result<(), Failure> {
        let mut buffer = vec![0; 1 << 16];
        let count = receive(self.receiver.as_fd(), &mut buffer)?;
        let expected = self.bytes(self.taken);
        ensure(buffer[..count] == expected, || {
            format!("datagram {} is another one, of {count} bytes", self.taken)
        })?;
        self.taken += 1;
        Ok(())
    }

    fn run(mut self, context: &mut Context) -> Result<(), Failure> {
        while context.step(PAUSE)? {
            self.put()?;
            self.take()?;
            if context.progress.plant() {
                receive(self.receiver.as_fd(), &mut [0; 10])?;
            }
        }
        Ok(())
    }
}

fn connected(kind: i32, protocol: i32, host: &str) -> Result<(OwnedFd, OwnedFd), Failure> {
    let host: SocketAddr =
        format!("{host}:0").parse().map_err(|_| Failure::new("not an address"))?;
    let ends = [fresh(host, kind, protocol)?, fresh(host, kind, protocol)?];
    for end in &ends {
        socket::bind(end.as_fd(), &encode(host))?;
    }
    let names = [0, 1].map(|at: usize| socket::address(ends[at].as_fd(), socket::End::Local));
    let [one, two] = names;
    socket::connect(ends[0].as_fd(), &two?)?;
    socket::connect(ends[1].as_fd(), &one?)?;
    let [one, two] = ends;
    Ok((one, two))
}

fn small(number: u64) -> usize {
    1 + (number % 90) as usize
}

pub(super) fn six(context: &mut Context) -> Result<(), Failure> {
    let (one, two) = connected(libc::SOCK_DGRAM, 0, "[::1]")?;
    Line::new(one, two, 7, small)?.run(context)
}

pub(super) fn empty(context: &mut Context) -> Result<(), Failure> {
    let (one, two) = connected(libc::SOCK_DGRAM, 0, "127.0.0.1")?;
    Line::new(one, two, 9, |number| (number % 3) as usize)?.run(context)
}

pub(super) fn large(context: &mut Context) -> Result<(), Failure> {
    let (one, two) = connected(libc::SOCK_DGRAM, 0, "127.0.0.1")?;
    Line::new(one, two, 2, |number| 40_000 + (number % 20_000) as usize)?.run(context)
}

pub(super) fn lite(context: &mut Context) -> Result<(), Failure> {
    let (one, two) = connected(libc::SOCK_DGRAM, libc::IPPROTO_UDPLITE, "127.0.0.1")?;
    Line::new(one, two, 4, small)?.run(context)
}

/// A receiver that is bound to a device.
pub(super) fn device(context: &mut Context) -> Result<(), Failure> {
    let (one, two) = connected(libc::SOCK_DGRAM, 0, "127.0.0.1")?;
    socket::set_option(two.as_fd(), SOL, libc::SO_BINDTODEVICE, b"lo\0")?;
    Line::new(one, two, 4, small)?.run(context)
}

/// A filter that cuts datagrams off behind the third byte.
pub(super) fn filter(context: &mut Context) -> Result<(), Failure> {
    let (one, two) = connected(libc::SOCK_DGRAM, 0, "127.0.0.1")?;
    // BPF_RET | BPF_K: the header of UDP, and three bytes.
    socket::attach_filter(two.as_fd(), &[6, 0, 0, 0, 11, 0, 0, 0])?;
    while context.step(PAUSE)? {
        send(one.as_fd(), b"abcdef", &[])?;
        let mut buffer = [0; 10];
        let count = receive(two.as_fd(), &mut buffer)?;
        same("what the filter lets through", &buffer[..count], &b"abc"[..])?;
        if context.progress.plant() {
            set(&two, (SOL, libc::SO_DETACH_FILTER, 0))?;
        }
    }
    Ok(())
}

/// A connected socket takes nothing from others.
pub(super) fn strangers(context: &mut Context) -> Result<(), Failure> {
    let (one, two) = connected(libc::SOCK_DGRAM, 0, "127.0.0.1")?;
    let stranger = UdpSocket::bind("127.0.0.1:0")?;
    let (one, two) = (UdpSocket::from(one), UdpSocket::from(two));
    two.set_read_timeout(Some(Duration::from_secs(5)))?;
    while context.step(PAUSE)? {
        stranger.send_to(b"not for you", two.local_addr()?)?;
        one.send(b"for you")?;
        let mut buffer = [0; 20];
        let count = two.recv(&mut buffer)?;
        same("who is heard", &buffer[..count], &b"for you"[..])?;
        if context.progress.plant() {
            // AF_UNSPEC ends a connection.
            socket::connect(two.as_fd(), &[0; 16])?;
        }
    }
    Ok(())
}

/// Several sockets with one name: each sender is heard by one of them.
pub(super) fn group(context: &mut Context) -> Result<(), Failure> {
    let mut name: SocketAddr = (Ipv4Addr::LOCALHOST, 0).into();
    let mut members = Vec::new();
    for _ in 0..3 {
        let member = fresh(name, libc::SOCK_DGRAM, 0)?;
        set(&member, (SOL, libc::SO_REUSEPORT, 1))?;
        socket::bind(member.as_fd(), &encode(name))?;
        let member = UdpSocket::from(member);
        name = member.local_addr()?;
        member.set_nonblocking(true)?;
        members.push(member);
    }
    let mut number = 0u64;
    while context.step(PAUSE)? {
        number += 1;
        let sender = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0))?;
        sender.send_to(&number.to_le_bytes(), name)?;
        let mut heard = 0;
        for member in &members {
            let mut bytes = [0; 8];
            if member.recv(&mut bytes).is_ok() {
                same("a datagram to a group", u64::from_le_bytes(bytes), number)?;
                heard += 1;
            }
        }
        same("who heard a datagram to a group", heard, 1)?;
        if context.progress.plant() {
            members.truncate(1);
            members.remove(0);
        }
    }
    Ok(())
}

/// A member of a multicast group hears what is sent to it.
pub(super) fn multicast(context: &mut Context) -> Result<(), Failure> {
    let group = Ipv4Addr::new(239, 77, 1, 9);
    let member = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
    member.join_multicast_v4(&group, &Ipv4Addr::LOCALHOST)?;
    member.set_read_timeout(Some(Duration::from_secs(5)))?;
    let sender = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0))?;
    socket::set_option(sender.as_fd(), libc::IPPROTO_IP, libc::IP_MULTICAST_IF, &[127, 0, 0, 1])?;
    sender.set_multicast_ttl_v4(3)?;
    let port = member.local_addr()?.port();
    let mut number = 0u64;
    while context.step(PAUSE)? {
        number += 1;
        sender.send_to(&number.to_le_bytes(), (group, port))?;
        let mut bytes = [0; 8];
        member.recv(&mut bytes)?;
        same("a datagram to a multicast group", u64::from_le_bytes(bytes), number)?;
        same("IP_MULTICAST_TTL", sender.multicast_ttl_v4()?, 3)?;
        if context.progress.plant() {
            sender.set_multicast_ttl_v4(4)?;
        }
    }
    Ok(())
}

/// The same with IPv6, joined by the number of a device: only a member can leave.
pub(super) fn multicast6(context: &mut Context) -> Result<(), Failure> {
    let group: Ipv6Addr = "ff02::7709".parse().map_err(|_| Failure::new("not an address"))?;
    let member = UdpSocket::bind((Ipv6Addr::UNSPECIFIED, 0))?;
    member.join_multicast_v6(&group, 1)?;
    let choices: [Choice; 2] = [
        (libc::IPPROTO_IPV6, libc::IPV6_MULTICAST_IF, 1),
        (libc::IPPROTO_IPV6, libc::IPV6_MULTICAST_HOPS, 5),
    ];
    choices.iter().try_for_each(|choice| set(&member, *choice))?;
    while context.step(PAUSE)? {
        keeps(&member, &choices)?;
        member.leave_multicast_v6(&group, 1)?;
        member.join_multicast_v6(&group, 1)?;
        if context.progress.plant() {
            member.leave_multicast_v6(&group, 1)?;
        }
    }
    Ok(())
}

/// Options of datagram sockets.
pub(super) fn options(context: &mut Context) -> Result<(), Failure> {
    let (one, two) = connected(libc::SOCK_DGRAM, 0, "127.0.0.1")?;
    let choices = [
        (SOL, libc::SO_BROADCAST, 1),
        (SOL, libc::SO_TIMESTAMPNS, 1),
        (SOL, libc::SO_RXQ_OVFL, 1),
        (libc::IPPROTO_IP, libc::IP_PKTINFO, 1),
        (libc::IPPROTO_IP, 23, 1), // IP_CHECKSUM
        (libc::IPPROTO_IP, 26, 1), // IP_RECVERR_RFC4884
        (libc::SOL_SOCKET, 45, 1), // SO_SELECT_ERR_QUEUE
        (libc::IPPROTO_IP, libc::IP_RECVTTL, 1),
        (libc::IPPROTO_IP, libc::IP_RECVERR, 1),
        (libc::IPPROTO_IP, libc::IP_FREEBIND, 1),
        (libc::IPPROTO_IP, libc::IP_MTU_DISCOVER, 2),
        (libc::SOL_UDP, libc::UDP_GRO, 1),
    ];
    choices.iter().try_for_each(|choice| set(&two, *choice))?;
    while context.step(PAUSE)? {
        keeps(&two, &choices)?;
        send(one.as_fd(), b"x", &[])?;
        same("bytes of a datagram", receive(two.as_fd(), &mut [0; 10])?, 1)?;
        if context.progress.plant() {
            set(&two, (libc::IPPROTO_IP, libc::IP_MTU_DISCOVER, 0))?;
        }
    }
    Ok(())
}

/// A raw socket asks this host whether it is there (ping).
fn echo(
    context: &mut Context,
    host: &str,
    protocol: i32,
    kinds: (u8, u8),
    filter: (i32, i32, &[u8]),
) -> Result<(), Failure> {
    let host: SocketAddr = host.parse().map_err(|_| Failure::new("not an address"))?;
    let raw = fresh(host, libc::SOCK_RAW, protocol)?;
    let (level, name, value) = filter;
    socket::set_option(raw.as_fd(), level, name, value)?;
    let header = if host.is_ipv4() { 20 } else { 0 };
    let id = std::process::id() as u16;
    let mut number = 0u16;
    while context.step(PAUSE)? {
        number = number.wrapping_add(1);
        let mut request = vec![kinds.0, 0, 0, 0];
        request.extend(id.to_be_bytes());
        request.extend(number.to_be_bytes());
        if host.is_ipv4() {
            let words = request.chunks(2).map(|pair| u32::from(pair[0]) << 8 | u32::from(pair[1]));
            let sum: u32 = words.sum();
            let sum = !((sum & 0xffff) + (sum >> 16)) as u16;
            request[2..4].copy_from_slice(&sum.to_be_bytes());
        }
        send(raw.as_fd(), &request, &encode(host))?;
        let expected = number.wrapping_add(u16::from(context.progress.plant()));
        let mut answer = [0; 100];
        loop {
            let count = receive(raw.as_fd(), &mut answer)?;
            same("a reply, and nothing else", answer[header], kinds.1)?;
            ensure(count >= header + 8, || format!("a reply of {count} bytes"))?;
            // Others may ask, too.
            if answer[header + 4..header + 6] == id.to_be_bytes() {
                break;
            }
        }
        same(
            "number of a reply",
            answer[header + 6..header + 8].to_vec(),
            expected.to_be_bytes().to_vec(),
        )?;
    }
    Ok(())
}

pub(super) fn raw_echo(context: &mut Context) -> Result<(), Failure> {
    // ICMP_FILTER: everything but replies is left out.
    let filter = (!1u32).to_ne_bytes();
    echo(context, "127.0.0.1:0", libc::IPPROTO_ICMP, (8, 0), (255, 1, &filter))
}

pub(super) fn raw_echo6(context: &mut Context) -> Result<(), Failure> {
    // ICMPV6_FILTER: the same, 256 bits.
    let mut filter = [0xff; 32];
    filter[16] = 0xfd;
    echo(context, "[::1]:0", libc::IPPROTO_ICMPV6, (128, 129), (libc::SOL_ICMPV6, 1, &filter))
}

/// A protocol of our own over IP.
pub(super) fn raw_protocol(context: &mut Context) -> Result<(), Failure> {
    let name: SocketAddr = (Ipv4Addr::LOCALHOST, 0).into();
    let ends = [fresh(name, libc::SOCK_RAW, 253)?, fresh(name, libc::SOCK_RAW, 253)?];
    socket::connect(ends[0].as_fd(), &encode(name))?;
    let mut number = 0u64;
    while context.step(PAUSE)? {
        number += 1;
        send(ends[0].as_fd(), &number.to_le_bytes(), &[])?;
        for end in &ends {
            let mut packet = [0; 64];
            let count = receive(end.as_fd(), &mut packet)?;
            same("length of a packet", count, 28)?;
            same("protocol of a packet", packet[9], 253)?;
            same("a packet", packet[20..28].to_vec(), number.to_le_bytes().to_vec())?;
        }
        if context.progress.plant() {
            number += 1;
            send(ends[0].as_fd(), &number.to_le_bytes(), &[])?;
        }
    }
    Ok(())
}

/// A packet socket sees frames of an EtherType of our own on the loopback device.
pub(super) fn frames(context: &mut Context) -> Result<(), Failure> {
    const KIND: [u8; 2] = [0x88, 0xb5];
    let mut name = (libc::AF_PACKET as u16).to_ne_bytes().to_vec();
    name.extend(KIND);
    name.extend(1i32.to_ne_bytes());
    name.extend([0, 0, 0, 6, 0, 0, 0, 0, 0, 0, 0, 0]);
    let sniffer = socket::socket(libc::AF_PACKET, libc::SOCK_DGRAM, 0)?;
    let outgoing = (libc::SOL_PACKET, 23, 1); // PACKET_IGNORE_OUTGOING
    set(&sniffer, outgoing)?;
    socket::bind(sniffer.as_fd(), &name)?;
    let mut number = 0u64;
    while context.step(PAUSE)? {
        number += 1;
        keeps(&sniffer, &[outgoing])?;
        send(sniffer.as_fd(), &number.to_le_bytes(), &name)?;
        let mut frame = [0; 64];
        receive(sniffer.as_fd(), &mut frame)?;
        same("a frame", frame[..8].to_vec(), number.to_le_bytes().to_vec())?;
        same("more frames", readable(sniffer.as_fd(), Duration::ZERO)?, false)?;
        if context.progress.plant() {
            send(sniffer.as_fd(), &[0; 8], &name)?;
        }
    }
    Ok(())
}
