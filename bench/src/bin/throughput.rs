//! How fast the memory of a large VE travels, against the same bytes in other ways.
//!
//! The ways, over the same link: our transport alone, the QUIC library with our settings and as it
//! comes, plain TCP; and a copy in memory, which is the limit. For each, what both ends spend on
//! it. And what the daemons need: their memory at its peak must not grow with the VE.

use std::process::ExitCode;
use std::time::Duration;

use bench::arguments::{self, Common};
use bench::goals;
use bench::measure::process;
use bench::measure::statistics::median;
use bench::peers::memory;
use bench::show::chart::{self, Bar};
use bench::show::outcome::Outcome;
use bench::show::table::{Table, maybe};
use bench::stage::guard::Guard;
use bench::stage::{Stage, StageError, Ve};
use bench::wire::Way;
use chaos_tests::testbed::{Host, Rate};
use clap::Parser;

/// How fast the memory of a large VE travels.
#[derive(Debug, Parser)]
struct Arguments {
    #[command(flatten)]
    common: Common,
    /// Size of the VE's memory in MiB [default: 1024, with --quick 256].
    #[arg(long)]
    mib: Option<usize>,
    /// Limit of the links of the nodes, such as 10gbit.
    #[arg(long)]
    rate: Option<Rate>,
}

/// Bytes one way, repeated.
struct Moved {
    name: &'static str,
    /// In MB/s.
    rates: Vec<f64>,
    /// Seconds on processors for a GiB: at the sender, at the receiver.
    costs: Vec<(f64, f64)>,
}

/// A VE with so much of a kind of memory, moved repeatedly.
struct Carried {
    moved: Moved,
    bytes: Vec<f64>,
    /// Milliseconds of the first round.
    ms: Vec<f64>,
    /// The largest peak of each daemon in MiB: the source's, the target's. None before it moved.
    peaks_mib: Option<[f64; 2]>,
}

impl Carried {
    fn peak_mib(&self) -> Option<f64> {
        self.peaks_mib.map(|[source, target]| source.max(target))
    }
}

/// Processes that have the same.
const ALIKE: usize = 8;

const GIB: f64 = (1 << 30) as f64;

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    arguments::run("throughput", &arguments.common, |guard, outcome| {
        play(&arguments, guard, outcome)
    })
}

fn play(arguments: &Arguments, guard: &Guard, outcome: &mut Outcome) -> Result<(), StageError> {
    let common = &arguments.common;
    let mib = arguments.mib.unwrap_or(common.pick(1024, 256));
    let mut stage = Stage::up(common, guard, "thru", |_| {})?;
    stage.rate(arguments.rate)?;
    let runs = common.runs(5, 2);
    let mut ways = vec![copies(mib, runs)];
    for (name, way) in [
        ("plain TCP", Way::Tcp),
        ("QUIC library as it comes", Way::Library),
        ("QUIC library with our settings", Way::Tuned),
        ("our transport", Way::Link),
    ] {
        ways.push(transfers(&stage, guard, name, way, mib, runs)?);
    }
    let empty = carry(&stage, common, guard, "nothing", 0, "")?;
    let random = carry(&stage, common, guard, "random pages", mib, &format!("--random-mib {mib}"))?;
    let zero = carry(&stage, common, guard, "zero pages", mib, &format!("--zero-mib {mib}"))?;
    let part = mib / ALIKE;
    let alike = format!("--random-mib {part} --copies {}", ALIKE - 1);
    let alike = carry(&stage, common, guard, "what eight processes have alike", mib, &alike)?;
    let double = mib * 2;
    let twice =
        carry(&stage, common, guard, "twice as many", double, &format!("--random-mib {double}"))?;
    tell(outcome, &ways, &random, mib);
    judge(outcome, &ways, [&empty, &random, &zero, &alike, &twice]);
    Ok(())
}

fn copies(mib: usize, runs: usize) -> Moved {
    let rates = (0..runs).map(|_| memory::copy_rate(mib) / 1e6).collect();
    Moved { name: "copy in memory", rates, costs: Vec::new() }
}

fn transfers(
    stage: &Stage,
    guard: &Guard,
    name: &'static str,
    way: Way,
    mib: usize,
    runs: usize,
) -> Result<Moved, StageError> {
    eprintln!("{name}");
    let mut moved = Moved { name, rates: Vec::new(), costs: Vec::new() };
    for _ in 0..runs {
        if !guard.has_time_for(Duration::from_secs(2)) {
            break;
        }
        let (sent, received) = stage.transfer(way, mib as u64)?;
        let gib = sent.count as f64 / GIB;
        moved.rates.push(sent.count as f64 / sent.seconds / 1e6);
        moved.costs.push((sent.processor_seconds / gib, received.processor_seconds / gib));
    }
    Ok(moved)
}

/// Moves a VE with this ballast there and back, again and again.
fn carry(
    stage: &Stage,
    common: &Common,
    guard: &Guard,
    name: &'static str,
    mib: usize,
    ballast: &str,
) -> Result<Carried, StageError> {
    eprintln!("move of {name}");
    let mut ve = Ve::new("debian-12-minimal", mib as u64 + 512);
    stage.make_ve(&ve)?;
    stage.start_ballast(&ve, ballast)?;
    let moved = Moved { name: "move of a VE", rates: Vec::new(), costs: Vec::new() };
    let (bytes, ms) = (Vec::new(), Vec::new());
    let mut carried = Carried { moved, bytes, ms, peaks_mib: None };
    for _ in 0..common.runs(5, 2) {
        if !guard.has_time_for(Duration::from_secs(3)) {
            break;
        }
        let source = ve.home;
        let target = if source == Host::Node(1) { Host::Node(2) } else { Host::Node(1) };
        let daemons = [source, target].map(|node| stage.daemon(node).unwrap_or(0));
        daemons.into_iter().for_each(process::forget_peak);
        let before = daemons.map(|pid| process::processor_time(pid).unwrap_or_default());
        let report = stage.migrate(&mut ve, &[])?.report;
        let after = daemons.map(|pid| process::processor_time(pid).unwrap_or_default());
        for (peak, pid) in carried.peaks_mib.get_or_insert_default().iter_mut().zip(daemons) {
            *peak = peak.max(process::peak_memory_kib(pid).unwrap_or(0) as f64 / 1024.0);
        }
        carried.bytes.push(report.bytes as f64);
        if let Some(first) = report.rounds.first() {
            carried.ms.push(first.ms);
            carried.moved.rates.push(first.bytes as f64 / first.ms / 1e3);
            let gib = report.bytes as f64 / GIB;
            let spent = |end: usize| (after[end] - before[end]).as_secs_f64() / gib;
            carried.moved.costs.push((spent(0), spent(1)));
        }
    }
    stage.remove_ve(&ve)?;
    Ok(carried)
}

fn tell(outcome: &mut Outcome, ways: &[Moved], random: &Carried, mib: usize) {
    let title = format!("{mib} MiB that nothing can make smaller, medians");
    let head = ["way", "MB/s", "÷ copy", "CPU s/GiB at the source", "at the target", "runs"];
    let mut table = Table::new(&title, &head);
    let limit = ways.first().and_then(|copy| median(&copy.rates));
    let mut bars = Vec::new();
    for way in ways.iter().chain([&random.moved]) {
        let rate = median(&way.rates);
        let cost =
            |end: fn(&(f64, f64)) -> f64| median(&way.costs.iter().map(end).collect::<Vec<_>>());
        table.row([
            way.name.to_owned(),
            maybe(rate),
            maybe(rate.zip(limit).map(|(rate, limit)| rate / limit)),
            maybe(cost(|both| both.0)),
            maybe(cost(|both| both.1)),
            way.rates.len().to_string(),
        ]);
        outcome.more(&format!("{}: rate", way.name), "MB/s", &way.rates);
        let spent: Vec<f64> = way.costs.iter().map(|both| both.0 + both.1).collect();
        outcome.less(&format!("{}: CPU on both sides", way.name), "s/GiB", &spent);
        bars.push(Bar { name: way.name.to_owned(), pieces: vec![rate.unwrap_or(0.0)] });
    }
    outcome.tables.push(table);
    // The copy in memory would make all others look alike.
    let title = "How fast memory travels between two nodes, median";
    outcome.pictures.push(("throughput".into(), chart::bars(title, "MB/s", &["rate"], &bars[1..])));
}

fn judge(outcome: &mut Outcome, ways: &[Moved], carried: [&Carried; 5]) {
    let [empty, random, zero, alike, twice] = carried;
    let rate = median(&random.moved.rates);
    let against = |name: &str| {
        let other = ways.iter().find(|way| way.name == name)?;
        Some(rate? / median(&other.rates)?)
    };
    outcome.judge(goals::AGAINST_TUNED, against("QUIC library with our settings"));
    outcome.judge(goals::AGAINST_LIBRARY, against("QUIC library as it comes"));
    let beyond = |carried: &Carried| Some(median(&carried.bytes)? - median(&empty.bytes)?);
    let share = beyond(zero).zip(beyond(random)).map(|(zero, random)| zero.max(0.0) / random);
    outcome.judge(goals::ZERO_PAGES, share);
    let share = beyond(alike).zip(beyond(random)).map(|(alike, random)| alike / random);
    outcome.judge(goals::ALIKE_PAGES, share);
    let most = carried.iter().filter_map(|carried| carried.peak_mib()).reduce(f64::max);
    outcome.judge(goals::DAEMON_MEMORY, most);
    let growth = twice.peak_mib().zip(random.peak_mib()).map(|(twice, once)| twice - once);
    outcome.judge(goals::DAEMON_MEMORY_GROWTH, growth);
    moves(outcome, carried);
    // Says more than rates on a machine that has other things to do.
    let cost =
        |way: &Moved| median(&way.costs.iter().map(|both| both.0 + both.1).collect::<Vec<_>>());
    let tuned = ways.iter().find(|way| way.name == "QUIC library with our settings");
    if let Some((own, bare)) = cost(&random.moved).zip(tuned.and_then(cost)) {
        outcome.notes.push(format!(
            "a move takes {:.2} times the processor time of the library alone, both sides together",
            own / bare
        ));
    }
    if let Some(share) = against("plain TCP") {
        outcome.notes.push(format!("a move is {share:.2} times as fast as plain TCP"));
    }
}

fn moves(outcome: &mut Outcome, carried: [&Carried; 5]) {
    let head = ["VE", "MiB sent", "first round, ms", "peak of the source, MiB", "of the target"];
    let mut table = Table::new("Moves of VEs", &head);
    let names = ["empty", "random", "zero", "eight alike", "twice random"];
    for (name, carried) in names.into_iter().zip(carried) {
        let mib = median(&carried.bytes).map(|bytes| bytes / f64::from(1 << 20));
        let peak = |end: usize| maybe(carried.peaks_mib.map(|peaks| peaks[end]));
        table.row([name.to_owned(), maybe(mib), maybe(median(&carried.ms)), peak(0), peak(1)]);
        outcome.less(&format!("daemon's peak, {name}"), "MiB", carried.peak_mib().as_slice());
    }
    outcome.less(
        "eight alike: sent",
        "MB",
        &carried[3].bytes.iter().map(|it| it / 1e6).collect::<Vec<_>>(),
    );
    outcome.less("eight alike: first round", "ms", &carried[3].ms);
    outcome.tables.push(table);
}
