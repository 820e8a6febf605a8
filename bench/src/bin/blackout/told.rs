//! What the moves came to: tables, goals and pictures.

use std::collections::BTreeSet;

use bench::goals;
use bench::measure::statistics::{median, quantile};
use bench::show::chart::{self, Bar};
use bench::show::outcome::Outcome;
use bench::show::table::{Table, digits, maybe};
use bench::stage::{Moved, laps};

use crate::away;
use crate::kinds::Kind;

/// What the link between the nodes can do.
pub(crate) struct Link {
    pub(crate) bytes_per_s: f64,
    pub(crate) round_trip_ms: f64,
}

impl Link {
    /// The blackout if nothing but the link took time.
    fn ideal_ms(&self, moved: &Moved) -> f64 {
        moved.delta_bytes() as f64 / self.bytes_per_s * 1e3 + self.round_trip_ms
    }
}

/// One move.
pub(crate) struct Run {
    pub(crate) moved: Moved,
    pub(crate) stall_ms: f64,
    pub(crate) timeouts: i64,
    pub(crate) lost: u64,
}

/// All moves of one kind of VE.
pub(crate) struct Seen {
    pub(crate) kind: Kind,
    /// The longest answer without a move.
    pub(crate) quiet_ms: f64,
    pub(crate) runs: Vec<Run>,
    /// Those without pre-copy.
    pub(crate) stopped: Vec<Run>,
}

impl Seen {
    fn stalls(&self) -> Vec<f64> {
        self.runs.iter().map(|run| run.stall_ms).collect()
    }

    fn each(&self, figure: impl Fn(&Moved) -> f64) -> Vec<f64> {
        self.runs.iter().map(|run| figure(&run.moved)).collect()
    }

    fn stopped_stalls(&self) -> Vec<f64> {
        self.stopped.iter().map(|run| run.stall_ms).collect()
    }
}

pub(crate) fn tell(outcome: &mut Outcome, link: &Link, all: &[Seen]) {
    outcome.more("link, plain TCP", "MB/s", &[link.bytes_per_s / 1e6]);
    outcome.less("link, round trip", "ms", &[link.round_trip_ms]);
    for seen in all {
        outcome.less(&format!("{}: client stall", seen.kind), "ms", &seen.stalls());
        outcome.less(&format!("{}: told downtime", seen.kind), "ms", &seen.each(away));
        let predicted = seen.each(|moved| moved.report.predicted_downtime_ms);
        outcome.less(&format!("{}: predicted downtime", seen.kind), "ms", &predicted);
        let stopped = seen.stopped_stalls();
        outcome.less(&format!("{}: stall of stop-and-copy", seen.kind), "ms", &stopped);
    }
    outcome.tables.push(stalls(link, all));
    outcome.tables.push(phases(all));
    outcome.tables.extend(all.iter().map(steps));
    judge(outcome, link, all);
    picture(outcome, link, all);
    note(outcome, all);
}

fn stalls(link: &Link, all: &[Seen]) -> Table {
    let title = format!(
        "Client stall in ms (link {} MB/s, round trip {} ms)",
        digits(link.bytes_per_s / 1e6),
        digits(link.round_trip_ms)
    );
    let head = [
        "VE",
        "runs",
        "stall",
        "p99",
        "told",
        "predicted",
        "quiet",
        "delta KiB",
        "ideal",
        "÷ ideal",
        "stop-and-copy",
        "timeouts",
        "lost",
    ];
    let mut table = Table::new(&title, &head);
    for seen in all {
        let ideal = median(&seen.each(|moved| link.ideal_ms(moved)));
        let told = median(&seen.each(away));
        let ratio = told.zip(ideal).map(|(told, ideal)| told / ideal);
        let kib = |moved: &Moved| moved.delta_bytes() as f64 / 1024.0;
        // Stop-and-copy stands still for longer than a timeout.
        let timeouts = seen.runs.iter().map(|run| run.timeouts).sum::<i64>();
        let lost = seen.runs.iter().chain(&seen.stopped).map(|run| run.lost).sum::<u64>();
        table.row([
            seen.kind.to_string(),
            seen.runs.len().to_string(),
            maybe(median(&seen.stalls())),
            maybe(quantile(&seen.stalls(), 0.99)),
            maybe(told),
            maybe(median(&seen.each(|moved| moved.report.predicted_downtime_ms))),
            digits(seen.quiet_ms),
            maybe(median(&seen.each(kib))),
            maybe(ideal),
            maybe(ratio),
            maybe(median(&seen.stopped_stalls())),
            timeouts.to_string(),
            lost.to_string(),
        ]);
    }
    table
}

/// The medians of the phases, and what no step of the daemons explains.
fn phases(all: &[Seen]) -> Table {
    let head = ["VE", "freeze", "delta", "restore", "switch", "total", "unexplained", "share"];
    let mut table = Table::new("Phases of the blackout in ms, medians", &head);
    for seen in all {
        let total = median(&seen.each(away));
        let left = median(&seen.each(unexplained));
        let share = left.zip(total).map(|(left, total)| 100.0 * left / total);
        table.row([
            seen.kind.to_string(),
            maybe(median(&seen.each(|moved| moved.report.downtime_ms.freeze))),
            maybe(median(&seen.each(|moved| moved.report.downtime_ms.delta))),
            maybe(median(&seen.each(|moved| moved.report.downtime_ms.restore))),
            maybe(median(&seen.each(|moved| moved.report.downtime_ms.switch))),
            maybe(total),
            maybe(left),
            share.map_or_else(String::new, |share| format!("{share:.0} %")),
        ]);
    }
    table
}

/// The part of the blackout that no step of the daemons is responsible for.
fn unexplained(moved: &Moved) -> f64 {
    away(moved) - laps::explained(&moved.laps)
}

/// The medians of the steps of one kind, the longest first.
fn steps(seen: &Seen) -> Table {
    let mut table = Table::new(&format!("Steps of {}", seen.kind), &["step", "ms", "share"]);
    let names: BTreeSet<&String> = seen.runs.iter().flat_map(|run| run.moved.laps.keys()).collect();
    let total = median(&seen.each(away)).unwrap_or(f64::NAN);
    let step =
        |name: &str| median(&seen.each(|moved| moved.laps.get(name).copied().unwrap_or(0.0)));
    let mut steps: Vec<(&str, f64)> =
        names.into_iter().filter_map(|name| Some((name.as_str(), step(name)?))).collect();
    steps.push(("unexplained", median(&seen.each(unexplained)).unwrap_or(0.0)));
    steps.sort_by(|one, other| other.1.total_cmp(&one.1));
    for (name, ms) in steps.into_iter().filter(|(_, ms)| ms / total >= 0.01) {
        table.row([name.to_owned(), digits(ms), format!("{:.0} %", 100.0 * ms / total)]);
    }
    table
}

fn judge(outcome: &mut Outcome, link: &Link, all: &[Seen]) {
    let of = |kind| all.iter().find(|seen: &&Seen| seen.kind == kind && !seen.runs.is_empty());
    let idle = of(Kind::Idle).and_then(|seen| median(&seen.stalls()));
    outcome.judge(goals::IDLE_STALL, idle);
    if let Some(redis) = of(Kind::Redis10k) {
        let stall = median(&redis.stalls());
        outcome.judge(goals::REDIS_STALL, stall);
        outcome.judge(goals::REDIS_STALL_WORST, quantile(&redis.stalls(), 0.99));
        let stopped = median(&redis.stopped_stalls());
        let share = stall.zip(stopped).map(|(stall, stopped)| stall / stopped);
        outcome.judge(goals::AGAINST_STOP_AND_COPY, share);
        let ratio = median(&redis.each(|moved| away(moved) / link.ideal_ms(moved)));
        outcome.judge(goals::AGAINST_IDEAL, ratio);
    }
    // What the connections cost is what a VE without them does not.
    if let (Some(many), Some(idle)) = (of(Kind::Connections1000), of(Kind::Idle)) {
        let cost = median(&many.each(away)).zip(median(&idle.each(away)));
        outcome.judge(goals::CONNECTIONS, cost.map(|(many, idle)| many - idle));
    }
    let runs: Vec<&Run> = all.iter().flat_map(|seen| &seen.runs).collect();
    if !runs.is_empty() {
        let timeouts: i64 = runs.iter().map(|run| run.timeouts).sum();
        outcome.judge(goals::TIMEOUTS, Some(timeouts as f64));
        let good = runs.iter().filter(|run| run.moved.misprediction() <= 0.25).count();
        outcome.judge(goals::PREDICTION, Some(good as f64 / runs.len() as f64));
    }
}

fn picture(outcome: &mut Outcome, link: &Link, all: &[Seen]) {
    let mut bars = Vec::new();
    for seen in all.iter().filter(|seen| !seen.runs.is_empty()) {
        let phase = |part: fn(&node::migration::Downtime) -> f64| {
            median(&seen.each(|moved| part(&moved.report.downtime_ms))).unwrap_or(0.0)
        };
        let mut pieces = vec![
            phase(|down| down.freeze),
            phase(|down| down.delta),
            phase(|down| down.restore),
            phase(|down| down.switch),
        ];
        let told: f64 = pieces.iter().sum();
        let stall = median(&seen.stalls()).unwrap_or(0.0);
        pieces.push((stall - told).max(0.0));
        bars.push(Bar { name: seen.kind.to_string(), pieces });
        let ideal = median(&seen.each(|moved| link.ideal_ms(moved))).unwrap_or(0.0);
        let pieces = vec![0.0, 0.0, 0.0, 0.0, 0.0, ideal];
        bars.push(Bar { name: "the link alone".into(), pieces });
    }
    let pieces = ["freeze", "delta", "restore", "switch", "until a client noticed", "ideal"];
    let title = "What a client waits for when a VE moves, median";
    outcome.pictures.push(("blackout".into(), chart::bars(title, "ms", &pieces, &bars)));
}

fn note(outcome: &mut Outcome, all: &[Seen]) {
    for seen in all {
        let total = median(&seen.each(away)).unwrap_or(0.0);
        let left = median(&seen.each(unexplained)).unwrap_or(0.0);
        if left > total * 0.05 {
            outcome.notes.push(format!(
                "{}: {left:.1} ms of {total:.1} ms ({:.0} %) are in no step that the daemons log",
                seen.kind,
                100.0 * left / total
            ));
        }
    }
}
