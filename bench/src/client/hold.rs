//! Very many established connections that are asked only when somebody wants to know.

use std::io;
use std::net::SocketAddr;
use std::time::Instant;

use super::control::{self, Tallied};
use super::exchange::{Dialogue, Exchange};

/// Opens so many connections to a server that echoes, and asks all of them at every mark.
pub fn run(address: SocketAddr, count: usize) -> io::Result<()> {
    let mut dialogues = Vec::with_capacity(count);
    for _ in 0..count {
        let mut dialogue = Dialogue::open(Exchange::Echo, address)?;
        dialogue.ask()?;
        dialogues.push(dialogue);
    }
    let tallied = Tallied::default();
    control::obey(&tallied, || {
        dialogues.retain_mut(|dialogue| {
            let asked = Instant::now();
            match dialogue.ask() {
                Ok(()) => tallied.add(asked.elapsed(), 1),
                Err(error) => {
                    tallied.lose(&error);
                    return false;
                }
            }
            true
        });
    })
}
