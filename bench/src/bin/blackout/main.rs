//! How long clients of a VE that moves wait, and how far that is from the physical limit.
//!
//! For each kind of VE: the longest answer to a client that asks a thousand times a second over an
//! established connection, the tool's own figure, a move without pre-copy, and what the link alone
//! would cost: the last delta at the measured rate of the link, and one round trip.

mod kinds;
mod told;

use std::process::ExitCode;
use std::time::Duration;

use bench::arguments::{self, Common};
use bench::peers::criu;
use bench::show::outcome::Outcome;
use bench::stage::guard::Guard;
use bench::stage::{Moved, Stage, StageError, templates};
use bench::wire::Way;
use chaos_tests::client::remote::RemoteLoad;
use chaos_tests::testbed::Rate;
use clap::Parser;

use self::kinds::{Kind, Playing};
use self::told::{Link, Run, Seen};

/// How long clients of a VE that moves wait.
#[derive(Debug, Parser)]
struct Arguments {
    #[command(flatten)]
    common: Common,
    /// Only these kinds of VE.
    #[arg(long, value_delimiter = ',')]
    only: Vec<Kind>,
    /// Size of the dataset of redis in MiB [default: 1024, with --quick 256].
    #[arg(long)]
    mib: Option<u64>,
    /// Limit of the links of the nodes, such as 10gbit.
    #[arg(long)]
    rate: Option<Rate>,
    /// Moves without pre-copy of each kind for which they are made [default: 3, with --quick 1].
    #[arg(long)]
    stop_and_copy: Option<usize>,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    arguments::run("blackout", &arguments.common, |guard, outcome| play(&arguments, guard, outcome))
}

fn play(arguments: &Arguments, guard: &Guard, outcome: &mut Outcome) -> Result<(), StageError> {
    let common = &arguments.common;
    templates::write(chaos_tests::testbed::DEFAULT_TEMPLATES.as_ref(), templates::SERVICES)?;
    let mut stage = Stage::up(common, guard, "blk", |_| {})?;
    stage.rate(arguments.rate)?;
    let link = measure_link(&stage, common)?;
    let mut seen = Vec::new();
    for kind in chosen(arguments) {
        if !guard.has_time_for(common.pick(Duration::from_secs(30), Duration::from_secs(8))) {
            outcome.notes.push(format!("no time was left for {kind}"));
            continue;
        }
        eprintln!("{kind}");
        match play_kind(&stage, arguments, guard, kind) {
            Ok(found) => seen.push(found),
            Err(error) if guard.reason().is_none() => {
                // The others can be measured all the same.
                outcome.notes.push(format!("{kind} failed: {}", chaos_tests::chain(&error)));
                stage.remove_ve(&kind.ve(dataset(arguments)))?;
            }
            Err(error) => return Err(error),
        }
    }
    told::tell(outcome, &link, &seen);
    criu::compare(&stage, common, outcome)?;
    Ok(())
}

fn chosen(arguments: &Arguments) -> Vec<Kind> {
    match (&arguments.only[..], arguments.common.quick) {
        ([], false) => Kind::ALL.to_vec(),
        ([], true) => vec![Kind::Idle, Kind::Redis10k],
        (only, _) => only.to_vec(),
    }
}

fn dataset(arguments: &Arguments) -> u64 {
    arguments.mib.unwrap_or(arguments.common.pick(1024, 256))
}

fn measure_link(stage: &Stage, common: &Common) -> Result<Link, StageError> {
    let mib = common.pick(512, 128);
    let (sent, _) = stage.transfer(Way::Tcp, mib)?;
    let (turns, _) = stage.transfer(Way::RoundTrip, common.pick(2000, 500))?;
    Ok(Link {
        bytes_per_s: sent.count as f64 / sent.seconds,
        round_trip_ms: turns.seconds * 1e3 / turns.count as f64,
    })
}

fn play_kind(
    stage: &Stage,
    arguments: &Arguments,
    guard: &Guard,
    kind: Kind,
) -> Result<Seen, StageError> {
    let common = &arguments.common;
    let mut playing = Playing::start(stage, kind, dataset(arguments))?;
    // What the machine does to a client that is left alone.
    playing.probe.mark("start")?;
    std::thread::sleep(common.pick(Duration::from_secs(2), Duration::from_secs(1)));
    let quiet = playing.probe.mark("quiet")?;
    let mut seen =
        Seen { kind, quiet_ms: quiet.longest_stall_ms, runs: Vec::new(), stopped: Vec::new() };
    let enough = Duration::from_secs(3);
    for _ in 0..common.runs(11, 3) {
        if guard.has_time_for(enough) {
            seen.runs.push(run(stage, &mut playing, &[])?);
        }
    }
    let stops = arguments.stop_and_copy.unwrap_or(common.pick(3, 1));
    for _ in 0..if kind.is_stopped() { stops } else { 0 } {
        if guard.has_time_for(enough) {
            seen.stopped.push(run(stage, &mut playing, &["--no-precopy"])?);
        }
    }
    playing.end(stage)?;
    Ok(seen)
}

/// One move under the eyes of the clients.
fn run(stage: &Stage, playing: &mut Playing, options: &[&str]) -> Result<Run, StageError> {
    playing.mark()?;
    let moved = stage.migrate(&mut playing.ve, options)?;
    // The answers that were late, and a retransmission that may still come.
    std::thread::sleep(Duration::from_millis(500));
    let probe = playing.probe.mark("move")?;
    let (mut timeouts, mut lost) = (count(&probe.counters, "TCPTimeouts"), probe.lost_connections);
    for client in &mut playing.clients {
        lost += client.mark("move")?.lost_connections;
    }
    timeouts += stage.timeouts_inside(&playing.ve)?;
    Ok(Run { moved, stall_ms: probe.longest_stall_ms, timeouts, lost })
}

fn count(counters: &std::collections::BTreeMap<String, i64>, name: &str) -> i64 {
    counters.get(name).copied().unwrap_or(0)
}

/// All clients of one VE, by name.
type Clients = Vec<RemoteLoad>;

/// What was moved and how long it was away.
fn away(moved: &Moved) -> f64 {
    moved.report.downtime_ms.total
}
