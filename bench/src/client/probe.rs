//! Asks a service a thousand times a second, over one connection, how it is.

use std::io;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use super::control::{self, Tallied};
use super::exchange::{Dialogue, Exchange};

/// Asks until standard input ends. The longest answer is the stall that a client sees, to within
/// one period.
pub fn run(exchange: Exchange, address: SocketAddr, period: Duration) -> io::Result<()> {
    let mut dialogue = Dialogue::open(exchange, address)?;
    dialogue.ask()?;
    let tallied = Tallied::default();
    let counted = tallied.clone();
    std::thread::spawn(move || {
        let mut due = Instant::now();
        loop {
            due += period;
            let now = Instant::now();
            if due > now {
                std::thread::sleep(due - now);
            } else {
                // What could not be asked meanwhile is not made up for.
                due = now;
            }
            let asked = Instant::now();
            counted.wait(asked);
            match dialogue.ask() {
                Ok(()) => counted.add(asked.elapsed(), 1),
                Err(error) => return counted.lose(&error),
            }
        }
    });
    control::obey(&tallied, || {})
}
