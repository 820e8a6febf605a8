//! The peer's FIN, told to a rebuilt connection again.
//!
//! Repair mode has no way to say that the peer has closed. So one segment with the FIN is sent
//! to ourselves, inside the VE's network, as if it came from the peer.

use std::{
    io,
    net::SocketAddr,
    os::fd::{AsFd, OwnedFd},
};

use ckpt_format::files::TcpConnection;

use super::super::{address, packet};
use crate::sys::socket::{self, Along};

/// A segment that waits to be delivered.
#[derive(Debug)]
pub(super) struct Fin {
    raw: OwnedFd,
    packet: Vec<u8>,
    receiver: SocketAddr,
}

impl Fin {
    /// The segment that ends what the peer has sent.
    pub(super) fn new(local: &SocketAddr, tcp: &TcpConnection) -> io::Result<Self> {
        let scale = tcp.window_scale.map_or(0, |(sending, _)| sending);
        let window = u16::try_from(tcp.window[1] >> scale).unwrap_or(u16::MAX);
        let segment = segment(tcp.remote.port(), local.port(), tcp, window);
        let from = packet::on_the_wire(tcp.remote.ip());
        let to = packet::on_the_wire(local.ip());
        let packet = packet::build(from, to, packet::TCP, 16, segment);
        let raw = packet::raw_socket(to)?;
        Ok(Self { raw, packet, receiver: (to, 0).into() })
    }

    /// Sends it. The loopback device delivers at once.
    pub(super) fn deliver(&self) -> io::Result<()> {
        let receiver = address::encode_inet(&self.receiver);
        let along = Along { receiver: &receiver, ..Along::default() };
        socket::send(self.raw.as_fd(), &self.packet, &along, libc::MSG_DONTWAIT).map(drop)
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
