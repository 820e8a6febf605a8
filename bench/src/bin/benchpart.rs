//! The parts of a benchmark that run elsewhere: in a VE, on the client host, on a node.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use bench::ballast::{self, Ballast};
use bench::client::exchange::Exchange;
use bench::client::{hold, press, probe, sweep, writes};
use bench::wire::{self, Transferred, Way, WireError};
use clap::Parser;

/// A part of a benchmark.
#[derive(Debug, Parser)]
enum Part {
    /// In a VE: be large, and echo.
    Ballast(Ballast),
    /// On the client: ask again and again.
    Probe {
        /// What.
        #[arg(long)]
        exchange: Exchange,
        /// Whom.
        #[arg(long)]
        address: SocketAddr,
        /// How often in a second.
        #[arg(long, default_value_t = 1000)]
        rate: u32,
    },
    /// On the client: write to a redis server.
    Writes {
        /// The server.
        #[arg(long)]
        address: SocketAddr,
        /// MiB to fill it with first.
        #[arg(long, default_value_t = 0)]
        fill_mib: u64,
        /// Writes per second.
        #[arg(long, default_value_t = 0)]
        rate: u32,
        /// Bytes of a value.
        #[arg(long, default_value_t = 256)]
        value_bytes: usize,
        /// Keys that are written.
        #[arg(long, default_value_t = 100_000)]
        keys: u64,
    },
    /// On the client: hold connections to a ballast.
    Hold {
        /// The ballast.
        #[arg(long)]
        address: SocketAddr,
        /// How many.
        #[arg(long)]
        count: usize,
    },
    /// On the client: do as much as can be done, or so much in a second, and remember when.
    Press {
        /// What.
        #[arg(long)]
        exchange: Exchange,
        /// Whom.
        #[arg(long)]
        address: SocketAddr,
        /// Over how many connections.
        #[arg(long, default_value_t = 4)]
        connections: usize,
        /// So many in a second, over all of them.
        #[arg(long)]
        pace: Option<u32>,
    },
    /// On the client: ask the web servers of very many VEs once.
    Sweep {
        /// The first VE.
        first: Ipv4Addr,
        /// How many.
        count: u32,
    },
    /// On a node: take in a transfer.
    Receive {
        /// How.
        way: Way,
        /// Where to listen.
        listen: SocketAddr,
        /// Where the certificates are.
        folder: PathBuf,
    },
    /// On a node: make a transfer.
    Send {
        /// How.
        way: Way,
        /// Where to.
        to: SocketAddr,
        /// MiB, or round trips.
        count: u64,
        /// Where the certificates are.
        folder: PathBuf,
    },
}

fn main() -> ExitCode {
    let done = match Part::parse() {
        Part::Ballast(ballast) => ballast::run(&ballast).map_err(WireError::from),
        Part::Probe { exchange, address, rate } => {
            let period = Duration::from_secs(1) / rate.max(1);
            probe::run(exchange, address, period).map_err(WireError::from)
        }
        Part::Writes { address, fill_mib, rate, value_bytes, keys } => {
            let plan = writes::Plan { address, fill_mib, rate, value_bytes, keys };
            writes::run(plan).map_err(WireError::from)
        }
        Part::Hold { address, count } => hold::run(address, count).map_err(WireError::from),
        Part::Press { exchange, address, connections, pace } => {
            press::run(exchange, address, connections, pace).map_err(WireError::from)
        }
        Part::Sweep { first, count } => sweep::run(first, count).map_err(WireError::from),
        Part::Receive { way, listen, folder } => tell(wire::receive(way, listen, &folder)),
        Part::Send { way, to, count, folder } => tell(wire::send(way, to, count, &folder)),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("benchpart: {}", chaos_tests::chain(&error));
            ExitCode::FAILURE
        }
    }
}

fn tell(transferred: Result<Transferred, WireError>) -> Result<(), WireError> {
    let transferred = transferred?;
    println!("{}", serde_json::to_string(&transferred).expect("plain data"));
    Ok(())
}
