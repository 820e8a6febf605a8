//! Visits web servers over connections that must never break.
//!
//! `webclient http://10.77.1.1:80/ https://10.77.1.1:443/` visits each until standard input ends,
//! then prints one JSON object: for each target the requests, the longest wait, and the error that
//! ended it, if one did. The exit status is 0 only if there was none.

use std::io::{self, Read, Write};
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use chaos_tests::client::web::{Target, Visitor};
use clap::Parser;
use serde::Serialize;

/// Visits web servers over connections that must never break.
#[derive(Debug, Parser)]
struct Arguments {
    /// What to visit: the URL of a page, by http or https.
    #[arg(required = true)]
    targets: Vec<Target>,
    /// Connections to each.
    #[arg(long, default_value_t = 2)]
    connections: usize,
    /// Between two requests of a connection, in milliseconds.
    #[arg(long, default_value_t = 10)]
    pause: u64,
}

/// What became of one connection.
#[derive(Debug, Serialize)]
struct Visits {
    target: String,
    requests: u64,
    longest_ms: f64,
    error: Option<String>,
}

fn visits(target: &Target, pause: Duration, stop: &AtomicBool) -> Visits {
    let (mut requests, mut longest) = (0, Duration::ZERO);
    let mut go = || -> io::Result<()> {
        let mut visitor = Visitor::new(target)?;
        while !stop.load(Ordering::Relaxed) {
            longest = longest.max(visitor.visit()?);
            requests += 1;
            thread::sleep(pause);
        }
        Ok(())
    };
    let error = go().err().map(|error| error.to_string());
    let target = format!("{}{}", target.address, target.path);
    Visits { target, requests, longest_ms: longest.as_secs_f64() * 1e3, error }
}

fn main() -> ExitCode {
    let Arguments { targets, connections, pause } = Arguments::parse();
    let (stop, pause) = (AtomicBool::new(false), Duration::from_millis(pause));
    let all: Vec<Visits> = thread::scope(|scope| {
        let threads: Vec<_> = targets
            .iter()
            .flat_map(|target| std::iter::repeat_n(target, connections))
            .map(|target| scope.spawn(|| visits(target, pause, &stop)))
            .collect();
        // Any end of the input is the end of the visits.
        let _ = io::stdin().read_to_end(&mut Vec::new());
        stop.store(true, Ordering::Relaxed);
        threads.into_iter().filter_map(|thread| thread.join().ok()).collect()
    });
    let good = all.iter().all(|visits| visits.error.is_none() && visits.requests > 0);
    let text = serde_json::json!({ "visits": all }).to_string();
    // Whoever asked may have gone.
    let _ = writeln!(io::stdout(), "{text}");
    if good { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
