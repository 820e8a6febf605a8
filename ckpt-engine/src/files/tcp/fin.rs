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
        let to = packet::on_the_wire(local.ip());
        let sequence = tcp.receive_sequence.wrapping_sub(1);
        let packet = packet::tcp(local, tcp, packet::FIN | packet::ACK, sequence, &[]);
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
