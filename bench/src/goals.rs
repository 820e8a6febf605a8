//! What we want to reach. The ratios count; the figures beside them are of one machine.

use serde::{Deserialize, Serialize};

/// On which side of the limit a figure must be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Side {
    /// At most the limit.
    AtMost,
    /// At least the limit.
    AtLeast,
}

/// One line of the table.
#[derive(Clone, Copy, Debug)]
pub struct Goal {
    /// What it is about.
    pub what: &'static str,
    /// The side.
    pub side: Side,
    /// The limit.
    pub limit: f64,
    /// In what the figure and the limit are.
    pub unit: &'static str,
}

const fn at_most(what: &'static str, limit: f64, unit: &'static str) -> Goal {
    Goal { what, side: Side::AtMost, limit, unit }
}

const fn at_least(what: &'static str, limit: f64, unit: &'static str) -> Goal {
    Goal { what, side: Side::AtLeast, limit, unit }
}

/// How long the clients of an idle VE wait.
pub const IDLE_STALL: Goal = at_most("client stall, idle VE, median", 10.0, "ms");
/// How long those of a busy redis wait.
pub const REDIS_STALL: Goal = at_most("client stall, redis with 10k writes/s, median", 20.0, "ms");
/// The worst of those.
pub const REDIS_STALL_WORST: Goal =
    at_most("client stall, redis with 10k writes/s, p99", 50.0, "ms");
/// The same against a move without pre-copy.
pub const AGAINST_STOP_AND_COPY: Goal =
    at_most("redis with 10k writes/s: stall ÷ that of stop-and-copy", 0.05, "×");
/// The blackout against what the link allows.
pub const AGAINST_IDEAL: Goal =
    at_most("redis with 10k writes/s: blackout ÷ (delta ÷ link + round trip)", 3.0, "×");
/// What TCP had to repeat after waiting.
pub const TIMEOUTS: Goal = at_most("retransmission timeouts caused by moves", 0.0, "");
/// A thousand processes that do nothing.
pub const PROCESSES: Goal =
    at_most("freeze + capture + rebuild of 1,000 idle processes", 150.0, "ms");
/// That their cost is the same for each.
pub const PROCESSES_LINEAR: Goal = at_least("linearity (R²) of the same over processes", 0.95, "");
/// A thousand connections.
pub const CONNECTIONS: Goal =
    at_most("1,000 established connections, part of the blackout", 15.0, "ms");
/// How well the blackout is known before.
pub const PREDICTION: Goal =
    at_least("moves whose blackout was predicted within 25 %", 0.9, "of all");
/// Pages that nothing can make smaller, against the library with our settings.
pub const AGAINST_TUNED: Goal =
    at_least("random pages: move ÷ bare QUIC with our settings", 0.9, "×");
/// The same against the library as it comes.
pub const AGAINST_LIBRARY: Goal =
    at_least("random pages: move ÷ bare QUIC as the library comes", 1.2, "×");
/// Pages that hold nothing.
pub const ZERO_PAGES: Goal = at_most("bytes sent for zero pages ÷ for random pages", 0.01, "×");
/// Pages that eight processes have alike.
pub const ALIKE_PAGES: Goal =
    at_most("bytes sent for what 8 processes have alike ÷ for random pages", 0.2, "×");
/// What the daemons need for a move.
pub const DAEMON_MEMORY: Goal = at_most("memory of a daemon at its peak in a move", 128.0, "MiB");
/// That it does not depend on the size of the VE.
pub const DAEMON_MEMORY_GROWTH: Goal =
    at_most("the same, for a VE of twice the size, beyond the first", 8.0, "MiB");
/// What pre-copy takes from the programs in the VE, where a processor is free for it.
pub const SLOWDOWN: Goal =
    at_most("slow-down during pre-copy, median operation", 0.05, "of its time");
/// The same for the slowest answers.
pub const SLOWDOWN_WORST: Goal =
    at_most("slow-down during pre-copy, p99 of the operations", 0.10, "of p99");
/// Many VEs on a small host.
pub const DENSITY: Goal = at_least("VEs on 768 MiB that all answer within 1 s", 120.0, "VEs");

/// A goal with what was measured.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Judged {
    /// What it is about.
    pub what: String,
    /// The side of the limit.
    pub side: Side,
    /// The limit.
    pub limit: f64,
    /// In what both are.
    pub unit: String,
    /// The figure.
    pub value: f64,
    /// Whether it is on the right side.
    pub met: bool,
}

impl Goal {
    /// Compares a figure with the goal.
    pub fn judge(&self, value: f64) -> Judged {
        let met = match self.side {
            Side::AtMost => value <= self.limit,
            Side::AtLeast => value >= self.limit,
        };
        let Self { what, side, limit, unit } = *self;
        Judged { what: what.to_owned(), side, limit, unit: unit.to_owned(), value, met }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_figure_is_on_one_side() {
        assert!(IDLE_STALL.judge(10.0).met);
        assert!(!IDLE_STALL.judge(10.1).met);
        assert!(AGAINST_TUNED.judge(0.9).met);
        assert!(!AGAINST_TUNED.judge(0.89).met);
        assert!(!IDLE_STALL.judge(f64::NAN).met);
    }
}
