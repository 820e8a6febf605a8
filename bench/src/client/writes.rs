//! Writes to a redis server at a steady rate.
//!
//! redis-benchmark writes as fast as it can, which is no rate to compare anything by.

use std::io;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use chaos_tests::client::load::Dataset;
use chaos_tests::client::record::mix;
use chaos_tests::client::resp::{Connection, ReplyError};

use super::control::{self, Tallied};

/// What is written.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    /// The server.
    pub address: SocketAddr,
    /// Fill it with so many MiB first, which are not written again.
    pub fill_mib: u64,
    /// Writes per second.
    pub rate: u32,
    /// Bytes of a value.
    pub value_bytes: usize,
    /// Keys that are written again and again, in no order.
    pub keys: u64,
}

/// What is due in this time is written together.
const TICK: Duration = Duration::from_millis(1);
const PATIENCE: Duration = Duration::from_secs(120);

/// Fills, tells that it did by one line, and writes until standard input ends.
pub fn run(plan: Plan) -> io::Result<()> {
    let failed = |error: ReplyError| io::Error::other(chaos_tests::chain(&error));
    let mut connection = Connection::open(plan.address, PATIENCE).map_err(failed)?;
    if plan.fill_mib > 0 {
        Dataset::of_mib(plan.fill_mib).fill(&mut connection).map_err(failed)?;
    }
    let tallied = Tallied::default();
    let counted = tallied.clone();
    if plan.rate > 0 {
        std::thread::spawn(move || {
            if let Err(error) = write(plan, connection, &counted) {
                counted.lose(&failed(error));
            }
        });
    }
    control::obey(&tallied, || {})
}

fn write(plan: Plan, mut connection: Connection, counted: &Tallied) -> Result<(), ReplyError> {
    let start = Instant::now();
    let (mut random, mut ticks, mut owed) = (mix(start.elapsed().as_nanos() as u64), 0u32, 0.0);
    let mut value = vec![b'x'; plan.value_bytes];
    loop {
        ticks += 1;
        let due = start + TICK * ticks;
        let now = Instant::now();
        if due > now {
            std::thread::sleep(due - now);
        } else {
            // After a stall the rate goes on as before; nothing is made up for.
            ticks = ((now - start).as_nanos() / TICK.as_nanos()) as u32;
        }
        owed += f64::from(plan.rate) * TICK.as_secs_f64();
        let count = owed as u32;
        owed -= f64::from(count);
        if count == 0 {
            continue;
        }
        let sent = Instant::now();
        counted.wait(sent);
        for _ in 0..count {
            random = mix(random);
            let key = format!("hot:{}", random % plan.keys.max(1));
            let head = random.to_le_bytes();
            let length = head.len().min(value.len());
            value[..length].copy_from_slice(&head[..length]);
            connection.push(&[b"SET", key.as_bytes(), &value]);
        }
        connection.flush()?;
        for _ in 0..count {
            connection.reply()?;
        }
        counted.add(sent.elapsed(), count);
    }
}
