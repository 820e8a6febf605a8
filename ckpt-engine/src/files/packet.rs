//! IP packets that are sent inside the VE's own network as if they came from somewhere else.

use std::{
    io,
    net::{IpAddr, SocketAddr},
    os::fd::OwnedFd,
};

use ckpt_format::files::TcpConnection;

use crate::sys::socket;

/// The protocol numbers.
pub(super) const TCP: u8 = 6;
pub(super) const UDP: u8 = 17;
pub(super) const UDP_LITE: u8 = 136;
pub(super) const ICMP: u8 = 1;
pub(super) const ICMP6: u8 = 58;

/// Flags of TCP segments.
pub(super) const FIN: u8 = 0x01;
pub(super) const ACK: u8 = 0x10;

/// An IPv4 address in IPv6 form is IPv4 on the wire.
pub(super) fn on_the_wire(address: IpAddr) -> IpAddr {
    match address {
        IpAddr::V6(v6) => v6.to_ipv4_mapped().map_or(address, IpAddr::V4),
        IpAddr::V4(_) => address,
    }
}

/// A socket that sends packets as they are, in the network of the calling thread.
pub(super) fn raw_socket(to: IpAddr) -> io::Result<OwnedFd> {
    let domain = if to.is_ipv4() { libc::AF_INET } else { libc::AF_INET6 };
    socket::socket(domain, libc::SOCK_RAW, libc::IPPROTO_RAW)
}

fn sum(bytes: &[u8]) -> u32 {
    let word = |pair: &[u8]| u32::from(pair[0]) << 8 | u32::from(*pair.get(1).unwrap_or(&0));
    bytes.chunks(2).map(word).sum()
}

fn checksum(mut sum: u32) -> [u8; 2] {
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    (!(sum as u16)).to_be_bytes()
}

/// Puts an IP header before a segment and fills in its checksum, which stands at `place`.
pub(super) fn build(
    from: IpAddr,
    to: IpAddr,
    protocol: u8,
    place: usize,
    mut segment: Vec<u8>,
) -> Vec<u8> {
    let length = segment.len() as u16;
    let (mut header, addresses) = match (from, to) {
        (IpAddr::V4(from), IpAddr::V4(to)) => {
            let mut header = vec![0x45, 0];
            header.extend(length.saturating_add(20).to_be_bytes());
            header.extend([0, 0, 0x40, 0, 64, protocol, 0, 0]);
            (header, [from.octets(), to.octets()].concat())
        }
        (from, to) => {
            let octets = |address: IpAddr| match address {
                IpAddr::V4(v4) => v4.to_ipv6_mapped().octets(),
                IpAddr::V6(v6) => v6.octets(),
            };
            let mut header = vec![0x60, 0, 0, 0];
            header.extend(length.to_be_bytes());
            header.extend([protocol, 64]);
            (header, [octets(from), octets(to)].concat())
        }
    };
    // ICMP of IPv4 alone does not count the addresses in.
    let total = match protocol {
        ICMP => sum(&segment),
        _ => sum(&segment) + sum(&addresses) + u32::from(protocol) + u32::from(length),
    };
    segment[place..place + 2].copy_from_slice(&checksum(total));
    header.extend(addresses);
    if header.len() == 20 {
        let own = checksum(sum(&header));
        header[10..12].copy_from_slice(&own);
    }
    header.extend(segment);
    header
}

/// A segment of a connection, sent by its peer to its `local` end.
pub(super) fn tcp(
    local: &SocketAddr,
    tcp: &TcpConnection,
    flags: u8,
    sequence: u32,
    data: &[u8],
) -> Vec<u8> {
    let scale = tcp.window_scale.map_or(0, |(sending, _)| sending);
    let window = u16::try_from(tcp.window[1] >> scale.min(14)).unwrap_or(u16::MAX);
    let mut bytes = Vec::with_capacity(20 + data.len());
    bytes.extend(tcp.remote.port().to_be_bytes());
    bytes.extend(local.port().to_be_bytes());
    bytes.extend(sequence.to_be_bytes());
    // Nothing more is acknowledged than the real peer has.
    bytes.extend(tcp.send_start().to_be_bytes());
    bytes.extend([5 << 4, flags]);
    bytes.extend(window.to_be_bytes());
    bytes.extend([0; 4]);
    bytes.extend(data);
    build(on_the_wire(tcp.remote.ip()), on_the_wire(local.ip()), TCP, 16, bytes)
}
