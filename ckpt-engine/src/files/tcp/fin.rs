//! The peer's FIN, told to a rebuilt connection again.
//!
//! Repair mode has no way to say that the peer has closed. So one segment with the FIN is sent
//! to ourselves, inside the VE's network, as if it came from the peer.

use std::{
    io,
    net::{IpAddr, SocketAddr},
    os::fd::{AsFd, OwnedFd},
    sync::Arc,
};

use ckpt_format::files::TcpConnection;

use super::super::address;
use crate::sys::socket::{self, Along};

/// A segment that waits to be delivered.
#[derive(Debug)]
pub(super) struct Fin {
    raw: Arc<OwnedFd>,
    packet: Vec<u8>,
    receiver: SocketAddr,
}

/// A socket that sends IP packets as they are, in the network of the calling thread.
pub(super) fn raw_socket() -> io::Result<OwnedFd> {
    socket::socket(libc::AF_INET, libc::SOCK_RAW, libc::IPPROTO_RAW)
}

impl Fin {
    /// The segment that ends what the peer has sent.
    pub(super) fn new(raw: Arc<OwnedFd>, local: &SocketAddr, tcp: &TcpConnection) -> Self {
        let scale = tcp.window_scale.map_or(0, |(sending, _)| sending);
        let window = u16::try_from(tcp.window[1] >> scale).unwrap_or(u16::MAX);
        let segment = segment(tcp.remote.port(), local.port(), tcp, window);
        let (from, to) = (mapped(tcp.remote.ip()), mapped(local.ip()));
        Self { raw, packet: packet(from, to, segment), receiver: (to, 0).into() }
    }

    /// Sends it. The loopback device delivers at once.
    pub(super) fn deliver(&self) -> io::Result<()> {
        let receiver = address::encode_inet(&self.receiver);
        let along = Along { receiver: &receiver, ..Along::default() };
        let own;
        let fd = if self.receiver.is_ipv4() {
            self.raw.as_fd()
        } else {
            own = socket::socket(libc::AF_INET6, libc::SOCK_RAW, libc::IPPROTO_RAW)?;
            own.as_fd()
        };
        socket::send(fd, &self.packet, &along, libc::MSG_DONTWAIT).map(drop)
    }
}

/// An IPv4 address in IPv6 form is IPv4 on the wire.
fn mapped(address: IpAddr) -> IpAddr {
    match address {
        IpAddr::V6(v6) => v6.to_ipv4_mapped().map_or(address, IpAddr::V4),
        IpAddr::V4(_) => address,
    }
}

fn segment(from: u16, to: u16, tcp: &TcpConnection, window: u16) -> Vec<u8> {
    const FIN_AND_ACK: u8 = 0x11;
    let mut bytes = Vec::with_capacity(20);
    bytes.extend(from.to_be_bytes());
    bytes.extend(to.to_be_bytes());
    bytes.extend(tcp.receive_sequence.wrapping_sub(1).to_be_bytes());
    // Nothing more is acknowledged than the real peer has.
    bytes.extend(tcp.send_start().to_be_bytes());
    bytes.extend([5 << 4, FIN_AND_ACK]);
    bytes.extend(window.to_be_bytes());
    bytes.extend([0; 4]);
    bytes
}

fn sum(bytes: &[u8]) -> u32 {
    bytes
        .chunks(2)
        .map(|pair| u32::from(pair[0]) << 8 | u32::from(*pair.get(1).unwrap_or(&0)))
        .sum()
}

fn checksum(mut sum: u32) -> [u8; 2] {
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    (!(sum as u16)).to_be_bytes()
}

fn packet(from: IpAddr, to: IpAddr, mut segment: Vec<u8>) -> Vec<u8> {
    const PROTOCOL: u8 = 6;
    let length = segment.len() as u16;
    let (mut header, addresses) = match (from, to) {
        (IpAddr::V4(from), IpAddr::V4(to)) => {
            let mut header = vec![0x45, 0];
            header.extend((length + 20).to_be_bytes());
            header.extend([0, 0, 0x40, 0, 64, PROTOCOL, 0, 0]);
            (header, [from.octets(), to.octets()].concat())
        }
        (from, to) => {
            let octets = |address: IpAddr| match address {
                IpAddr::V4(v4) => v4.to_ipv6_mapped().octets(),
                IpAddr::V6(v6) => v6.octets(),
            };
            let mut header = vec![0x60, 0, 0, 0];
            header.extend(length.to_be_bytes());
            header.extend([PROTOCOL, 64]);
            (header, [octets(from), octets(to)].concat())
        }
    };
    let total = sum(&segment) + sum(&addresses) + u32::from(PROTOCOL) + u32::from(length);
    segment[16..18].copy_from_slice(&checksum(total));
    header.extend(addresses);
    if header.len() == 20 {
        let own = checksum(sum(&header));
        header[10..12].copy_from_slice(&own);
    }
    header.extend(segment);
    header
}
