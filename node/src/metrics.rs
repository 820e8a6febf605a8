//! What a node tells a monitoring system, in the OpenMetrics text format.
//!
//! Counters and histograms begin with the daemon. What each name means is said here and in
//! `docs/reference/metrics.md`, which a test compares with this file.

use prometheus_client::{
    encoding::{EncodeLabelSet, text},
    metrics::{counter::Counter, family::Family, gauge::Gauge, histogram::Histogram, info::Info},
    registry::{Registry, Unit},
};

use crate::{api::Failure, cluster::Cluster, migration::Report, ve::Runtime};

/// The media type of [`Metrics::text`].
pub const MEDIA_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// Seconds of a blackout, and of its parts.
const BLACKOUT: [f64; 14] =
    [0.001, 0.0025, 0.005, 0.01, 0.015, 0.02, 0.03, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0];
/// Seconds of a whole move.
const WHOLE: [f64; 11] = [0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0];
/// How many times as long as predicted.
const RATIO: [f64; 11] = [0.25, 0.5, 0.75, 0.8, 0.9, 1.0, 1.1, 1.25, 1.5, 2.0, 4.0];

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Outcome {
    /// `moved`, or the word of the failure.
    outcome: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Phase {
    phase: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Status {
    status: &'static str,
}

/// A node's figures.
#[derive(Debug)]
pub struct Metrics {
    registry: Registry,
    moves: Family<Outcome, Counter>,
    moving: Gauge,
    duration: Histogram,
    bytes: Counter,
    downtime: Histogram,
    predicted: Histogram,
    ratio: Histogram,
    phases: Family<Phase, Histogram>,
    ves: Family<Status, Gauge>,
    has_leader: Gauge,
    leads: Gauge,
}

impl Default for Metrics {
    fn default() -> Self {
        let metrics = Self {
            registry: Registry::with_prefix("ferry"),
            moves: Family::default(),
            moving: Gauge::default(),
            duration: Histogram::new(WHOLE),
            bytes: Counter::default(),
            downtime: Histogram::new(BLACKOUT),
            predicted: Histogram::new(BLACKOUT),
            ratio: Histogram::new(RATIO),
            phases: Family::new_with_constructor(|| Histogram::new(BLACKOUT)),
            ves: Family::default(),
            has_leader: Gauge::default(),
            leads: Gauge::default(),
        };
        metrics.registered()
    }
}

impl Metrics {
    fn registered(mut self) -> Self {
        let all = &mut self.registry;
        let build = Info::new([("version", env!("CARGO_PKG_VERSION"))]);
        all.register("build", "The version of the daemon", build);
        let help = "Moves of VEs away from this node that have ended, by how";
        all.register("moves", help, self.moves.clone());
        let help = "Moves of VEs away from this node that are under way";
        all.register("moves_under_way", help, self.moving.clone());
        let help = "How long moves away from this node took in all";
        all.register_with_unit("move_duration", help, Unit::Seconds, self.duration.clone());
        let help = "What moves away from this node have sent, without templates";
        all.register_with_unit("move_sent", help, Unit::Bytes, self.bytes.clone());
        let help = "How long VEs stood still in moves away from this node";
        all.register_with_unit("move_downtime", help, Unit::Seconds, self.downtime.clone());
        let help = "How long that was predicted to be when they were frozen";
        all.register_with_unit(
            "move_predicted_downtime",
            help,
            Unit::Seconds,
            self.predicted.clone(),
        );
        let help = "How many times as long as predicted VEs stood still";
        let ratio = Unit::Other("ratio".to_owned());
        all.register_with_unit("move_downtime_to_predicted", help, ratio, self.ratio.clone());
        let help = "The parts of the time for which VEs stood still";
        all.register_with_unit("move_downtime_phase", help, Unit::Seconds, self.phases.clone());
        all.register("ves", "VEs of this node by their status", self.ves.clone());
        let help = "Whether this node knows a leader of the cluster's log";
        all.register("cluster_has_leader", help, self.has_leader.clone());
        let help = "Whether this node leads the cluster's log";
        all.register("cluster_leads", help, self.leads.clone());
        self
    }

    /// Counts a move that is under way until the guard is dropped.
    pub(crate) fn begin_move(&self) -> Moving {
        self.moving.inc();
        Moving(self.moving.clone())
    }

    /// Takes in how a move ended.
    pub(crate) fn end_move(&self, ended: Result<&Report, &Failure>) {
        let outcome = match ended {
            Ok(_) => "moved".to_owned(),
            Err(failure) => failure.code.clone(),
        };
        self.moves.get_or_create(&Outcome { outcome }).inc();
        let Ok(report) = ended else { return };
        let seconds = |ms: f64| ms / 1000.0;
        let downtime = &report.downtime_ms;
        self.duration.observe(seconds(report.total_ms));
        self.bytes.inc_by(report.bytes);
        self.downtime.observe(seconds(downtime.total));
        self.predicted.observe(seconds(report.predicted_downtime_ms));
        if report.predicted_downtime_ms > 0.0 {
            self.ratio.observe(downtime.total / report.predicted_downtime_ms);
        }
        let phases = [
            ("freeze", downtime.freeze),
            ("delta", downtime.delta),
            ("restore", downtime.restore),
            ("switch", downtime.switch),
        ];
        for (phase, ms) in phases {
            self.phases.get_or_create(&Phase { phase }).observe(seconds(ms));
        }
    }

    /// Everything, as of now.
    pub(crate) fn text(&self, runtime: &Runtime, cluster: &Cluster) -> String {
        for (status, count) in runtime.count_by_status() {
            self.ves.get_or_create(&Status { status }).set(count);
        }
        let leader = cluster.leader();
        self.has_leader.set(leader.is_some().into());
        self.leads.set((leader == Some(cluster.node())).into());
        let mut all = String::new();
        match text::encode(&mut all, &self.registry) {
            Ok(()) => all,
            // Writing to memory does not fail.
            Err(error) => format!("# {error}\n# EOF\n"),
        }
    }
}

/// A move that is under way.
#[derive(Debug)]
pub(crate) struct Moving(Gauge);

impl Drop for Moving {
    fn drop(&mut self) {
        self.0.dec();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::migration::Downtime;

    fn encoded(metrics: &Metrics) -> String {
        let mut all = String::new();
        text::encode(&mut all, &metrics.registry).unwrap();
        all
    }

    fn report() -> Report {
        Report {
            ve: 101,
            source: "node1".into(),
            target: "node2".into(),
            rounds: Vec::new(),
            downtime_ms: Downtime {
                freeze: 1.0,
                delta: 5.0,
                restore: 4.0,
                switch: 2.0,
                total: 12.0,
            },
            predicted_downtime_ms: 10.0,
            total_ms: 1500.0,
            bytes: 4096,
            postcopy: None,
        }
    }

    #[test]
    fn a_move_shows_with_what_was_predicted_and_what_came() {
        let metrics = Metrics::default();
        let moving = metrics.begin_move();
        assert!(encoded(&metrics).contains("ferry_moves_under_way 1\n"));
        metrics.end_move(Ok(&report()));
        metrics.end_move(Err(&Failure::new("blocked", 21, "no")));
        drop(moving);
        let text = encoded(&metrics);
        for line in [
            "ferry_moves_total{outcome=\"moved\"} 1",
            "ferry_moves_total{outcome=\"blocked\"} 1",
            "ferry_moves_under_way 0",
            "ferry_move_sent_bytes_total 4096",
            "ferry_move_downtime_seconds_bucket{le=\"0.01\"} 0",
            "ferry_move_downtime_seconds_bucket{le=\"0.015\"} 1",
            "ferry_move_predicted_downtime_seconds_bucket{le=\"0.01\"} 1",
            "ferry_move_downtime_to_predicted_ratio_bucket{le=\"1.1\"} 0",
            "ferry_move_downtime_to_predicted_ratio_bucket{le=\"1.25\"} 1",
            "ferry_move_downtime_phase_seconds_bucket{le=\"0.005\",phase=\"delta\"} 1",
        ] {
            assert!(text.lines().any(|found| found == line), "{line} is missing in\n{text}");
        }
    }

    #[test]
    fn every_metric_is_described() {
        let manual = include_str!("../../docs/reference/metrics.md");
        let metrics = Metrics::default();
        metrics.end_move(Ok(&report()));
        for line in encoded(&metrics).lines() {
            let Some(rest) = line.strip_prefix("# TYPE ") else { continue };
            let name = rest.split(' ').next().unwrap();
            assert!(manual.contains(&format!("`{name}`")), "{name} is not in the manual");
        }
    }
}
