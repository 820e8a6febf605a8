//! Two thousand ends of established TCP connections in one process.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::time::Duration;

use crate::workload::context::Context;
use crate::workload::outcome::{Failure, same};
use crate::workload::scale::descriptors::raise_limit;

const PAIRS: usize = 1000;
/// How many are used in one turn.
const AT_ONCE: usize = 20;

/// Two ends, and how often they were used. What the client has said last is not read yet.
struct Pair {
    client: TcpStream,
    server: TcpStream,
    turn: u32,
}

impl Pair {
    fn turn(&mut self) -> Result<(), Failure> {
        let mut bytes = [0; 4];
        self.server.read_exact(&mut bytes)?;
        same("what the client said", u32::from_le_bytes(bytes), self.turn)?;
        self.server.write_all(&bytes)?;
        self.client.read_exact(&mut bytes)?;
        same("what the server said", u32::from_le_bytes(bytes), self.turn)?;
        self.turn += 1;
        Ok(self.client.write_all(&self.turn.to_le_bytes())?)
    }
}

pub(super) fn run(context: &mut Context) -> Result<(), Failure> {
    raise_limit()?;
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let mut pairs = Vec::new();
    for turn in 0..PAIRS {
        let mut client = TcpStream::connect(listener.local_addr()?)?;
        let (server, _) = listener.accept()?;
        let turn = turn as u32;
        client.write_all(&turn.to_le_bytes())?;
        pairs.push(Pair { client, server, turn });
    }
    let mut at = 0;
    while context.step(Duration::from_millis(2))? {
        for _ in 0..AT_ONCE {
            pairs[at].turn()?;
            at = (at + 1) % PAIRS;
        }
        if context.progress.plant() {
            pairs[at].turn += 1;
        }
    }
    pairs.iter_mut().try_for_each(Pair::turn)
}
