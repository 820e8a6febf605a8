//! Datagrams: unread ones inside one host, and questions to another host.

use std::net::{Ipv4Addr, UdpSocket};
use std::time::{Duration, Instant};

use crate::client::record::mix;
use crate::workload::context::Context;
use crate::workload::outcome::{Failure, same};

pub(super) fn run(context: &mut Context) -> Result<(), Failure> {
    let bound = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0))?;
    let connected = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0))?;
    connected.connect(bound.local_addr()?)?;
    let mut sent = 0u64;
    for _ in 0..5 {
        connected.send(&datagram(sent))?;
        sent += 1;
    }
    bound.set_read_timeout(Some(Duration::from_secs(5)))?;
    let mut taken = 0;
    while context.step(Duration::from_millis(4))? {
        connected.send(&datagram(sent))?;
        sent += 1;
        let mut bytes = [0; 200];
        let (count, sender) = bound.recv_from(&mut bytes)?;
        same("sender of a datagram", sender, connected.local_addr()?)?;
        same("a datagram", &bytes[..count], &datagram(taken)[..])?;
        taken += 1;
        same("whom a socket is connected to", connected.peer_addr()?, bound.local_addr()?)?;
        if context.progress.plant() {
            bound.recv(&mut bytes)?;
        }
    }
    Ok(())
}

fn datagram(number: u64) -> Vec<u8> {
    vec![number as u8; (number % 120) as usize]
}

/// Questions to the companion; each must be answered, since a datagram for a VE that is on its
/// way is kept.
pub(super) fn with_peer(context: &mut Context) -> Result<(), Failure> {
    let peer = context.peer.ok_or_else(|| Failure::new("no peer given"))?;
    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
    socket.connect(peer)?;
    socket.set_read_timeout(Some(Duration::from_secs(10)))?;
    let mut number = 0u64;
    while context.step(Duration::from_millis(5))? {
        number += 1;
        socket.send(&number.to_le_bytes())?;
        let mut bytes = [0; 8];
        let asked = Instant::now();
        let length = socket.recv(&mut bytes).map_err(|error| {
            let waited = asked.elapsed();
            Failure::new(format!("no answer to question {number} in {waited:?}: {error}"))
        })?;
        same("length of an answer", length, 8)?;
        let mut answer = u64::from_le_bytes(bytes);
        if context.progress.plant() {
            answer += 1;
        }
        same("answer of the peer", answer, mix(number))?;
    }
    Ok(())
}
