//! How the cost of a move grows with what a VE holds: processes, threads, areas, descriptors,
//! sockets and memory.
//!
//! For each, a VE that holds more and more of it is moved there and back. What grows is the part
//! of the blackout that depends on the VE: freeze, capture and rebuild. A straight line through the
//! points says what one more costs, and how straight it is.

use std::collections::BTreeSet;
use std::process::ExitCode;
use std::time::Duration;

use bench::arguments::{self, Common};
use bench::goals;
use bench::measure::statistics::{Line, median};
use bench::show::chart::{self, Curve};
use bench::show::outcome::Outcome;
use bench::show::table::{Table, digits, maybe};
use bench::stage::guard::Guard;
use bench::stage::{Moved, Stage, StageError, Ve};
use clap::{Parser, ValueEnum};

/// How the cost of a move grows.
#[derive(Debug, Parser)]
struct Arguments {
    #[command(flatten)]
    common: Common,
    /// Only these things.
    #[arg(long, value_delimiter = ',')]
    only: Vec<Thing>,
}

/// What a VE holds more and more of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Thing {
    Processes,
    Threads,
    Areas,
    Files,
    Sockets,
    Memory,
}

impl Thing {
    const ALL: &[Self] =
        &[Self::Processes, Self::Threads, Self::Areas, Self::Files, Self::Sockets, Self::Memory];

    fn name(self) -> &'static str {
        match self {
            Self::Processes => "processes",
            Self::Threads => "threads",
            Self::Areas => "areas",
            Self::Files => "open files",
            Self::Sockets => "pairs of sockets",
            Self::Memory => "MiB",
        }
    }

    fn option(self) -> &'static str {
        match self {
            Self::Processes => "--processes",
            Self::Threads => "--threads",
            Self::Areas => "--areas",
            Self::Files => "--files",
            Self::Sockets => "--sockets",
            Self::Memory => "--random-mib",
        }
    }

    fn sizes(self, quick: bool) -> &'static [usize] {
        match (self, quick) {
            (Self::Processes | Self::Threads, false) => &[0, 100, 250, 500, 1000],
            (Self::Processes, true) => &[0, 50, 100],
            (Self::Areas, false) => &[0, 2500, 5000, 10_000, 20_000],
            (Self::Files, false) => &[0, 500, 1000, 2000, 4000],
            (Self::Sockets, false) => &[0, 125, 250, 500, 1000],
            (Self::Memory, false) => &[0, 256, 512, 1024, 2048],
            (Self::Threads, true) => &[0, 100],
            (Self::Areas | Self::Files, true) => &[0, 1000],
            (Self::Sockets, true) => &[0, 100],
            (Self::Memory, true) => &[0, 128],
        }
    }
}

/// Moves of a VE that holds so many.
struct Point {
    size: usize,
    moves: Vec<Moved>,
}

impl Point {
    fn median(&self, part: impl Fn(&Moved) -> f64) -> Option<f64> {
        median(&self.moves.iter().map(part).collect::<Vec<_>>())
    }
}

/// Freeze, capture and rebuild: the switch costs the same for every VE.
fn grows(moved: &Moved) -> f64 {
    let down = moved.report.downtime_ms;
    down.freeze + down.delta + down.restore
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    arguments::run("scale", &arguments.common, |guard, outcome| play(&arguments, guard, outcome))
}

fn play(arguments: &Arguments, guard: &Guard, outcome: &mut Outcome) -> Result<(), StageError> {
    let common = &arguments.common;
    let stage = Stage::up(common, guard, "scal", |_| {})?;
    let mut ve = Ve::new("debian-12-minimal", 4096);
    stage.make_ve(&ve)?;
    let things = if arguments.only.is_empty() { Thing::ALL } else { &arguments.only[..] };
    let mut curves = Vec::new();
    for &thing in things {
        let mut points = Vec::new();
        for &size in thing.sizes(common.quick) {
            if !guard.has_time_for(common.pick(Duration::from_secs(10), Duration::from_secs(5))) {
                outcome.notes.push(format!("no time was left for {size} {}", thing.name()));
                continue;
            }
            eprintln!("{size} {}", thing.name());
            match measure(&stage, &mut ve, common, thing, size) {
                Ok(point) => points.push(point),
                Err(error) if guard.reason().is_none() => {
                    let cause = chaos_tests::chain(&error);
                    outcome.notes.push(format!("{size} {} failed: {cause}", thing.name()));
                }
                Err(error) => return Err(error),
            }
        }
        curves.extend(tell(outcome, thing, &points));
    }
    let title = "Freeze, capture and rebuild against what a VE holds, median";
    let picture = chart::curves(title, "share of the largest size", "ms", &curves);
    outcome.pictures.push(("scale".into(), picture));
    Ok(())
}

fn measure(
    stage: &Stage,
    ve: &mut Ve,
    common: &Common,
    thing: Thing,
    size: usize,
) -> Result<Point, StageError> {
    stage.end_ballast(ve)?;
    stage.start_ballast(ve, &format!("{} {size}", thing.option()))?;
    let mut point = Point { size, moves: Vec::new() };
    for _ in 0..common.runs(5, 2) {
        point.moves.push(stage.migrate(ve, &["--max-downtime", "20000"])?);
    }
    Ok(point)
}

/// The steps of the daemons that take longer with the most than with the least, the worst first.
fn growing(thing: Thing, points: &[Point]) -> Option<Table> {
    const LEAST_MS: f64 = 0.5;
    let (least, most) = (points.first()?, points.last().filter(|_| points.len() > 1)?);
    let step = |point: &Point, name: &str| {
        point.median(|moved| moved.laps.get(name).copied().unwrap_or(0.0)).unwrap_or(0.0)
    };
    let names: BTreeSet<&String> = most.moves.iter().flat_map(|moved| moved.laps.keys()).collect();
    let mut steps: Vec<(&String, f64)> = names
        .into_iter()
        .map(|name| (name, step(most, name) - step(least, name)))
        .filter(|(_, ms)| *ms >= LEAST_MS)
        .collect();
    steps.sort_by(|one, other| other.1.total_cmp(&one.1));
    let title = format!("{}: steps that grow", thing.name());
    let more = (most.size - least.size) as f64;
    let mut table = Table::new(&title, &["step", "ms more", "µs for one more"]);
    for (name, ms) in steps {
        table.row([name.clone(), digits(ms), digits(ms * 1e3 / more)]);
    }
    Some(table)
}

/// The table of one thing, its goals, and its curve with sizes as shares of the largest.
fn tell(outcome: &mut Outcome, thing: Thing, points: &[Point]) -> Option<Curve> {
    let name = thing.name();
    let head = [name, "freeze", "delta", "restore", "sum", "switch", "whole move", "runs"];
    let mut table = Table::new(&format!("{name}: medians in ms"), &head);
    let mut line = Vec::new();
    for point in points {
        let sum = point.median(grows);
        table.row([
            point.size.to_string(),
            maybe(point.median(|moved| moved.report.downtime_ms.freeze)),
            maybe(point.median(|moved| moved.report.downtime_ms.delta)),
            maybe(point.median(|moved| moved.report.downtime_ms.restore)),
            maybe(sum),
            maybe(point.median(|moved| moved.report.downtime_ms.switch)),
            maybe(point.median(|moved| moved.report.total_ms)),
            point.moves.len().to_string(),
        ]);
        line.extend(sum.map(|sum| (point.size as f64, sum)));
        let sums: Vec<f64> = point.moves.iter().map(grows).collect();
        outcome.less(&format!("{} {name}: freeze + capture + rebuild", point.size), "ms", &sums);
    }
    outcome.tables.push(table);
    outcome.tables.extend(growing(thing, points));
    let fitted = Line::through(&line);
    if let Some(Line { base, slope, fit }) = fitted {
        outcome.notes.push(format!(
            "{name}: {} µs for one more, {} ms without any, R² {fit:.3}",
            digits(slope * 1e3),
            digits(base)
        ));
    }
    if thing == Thing::Processes {
        let thousand = points.iter().find(|point| point.size == 1000);
        outcome.judge(goals::PROCESSES, thousand.and_then(|point| point.median(grows)));
        let enough = fitted.filter(|_| line.len() > 2);
        outcome.judge(goals::PROCESSES_LINEAR, enough.map(|line| line.fit));
    }
    let largest = line.iter().map(|point| point.0).fold(0.0, f64::max);
    let points = line.into_iter().map(|(size, ms)| (size / largest.max(1.0), ms)).collect();
    (largest > 0.0).then(|| Curve { name: format!("{name}, up to {}", digits(largest)), points })
}
