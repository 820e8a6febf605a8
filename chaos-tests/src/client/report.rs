//! What a run of the client found, as one JSON object.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::load::Tally;

/// What happened in a stretch of time, or in the whole run.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Report {
    /// The name given with the mark that ended it, or `all`.
    pub name: String,
    /// When it began, in seconds since the start.
    pub from_s: f64,
    /// When it ended.
    pub to_s: f64,
    /// Requests made.
    pub requests: u64,
    /// Requests that the server refused.
    pub errors: u64,
    /// Answers that were wrong.
    pub wrong_answers: u64,
    /// Connections that ended; the client never opens one again.
    pub lost_connections: u64,
    /// The longest that a client waited for an answer.
    pub longest_stall_ms: f64,
    /// Half of the requests took at most this long, and so on.
    pub latency_us: Quantiles,
    /// Upper bound in microseconds and number of requests.
    pub histogram: Vec<(u64, u64)>,
    /// Counters of the client's kernel that changed.
    pub counters: BTreeMap<String, i64>,
    /// What was wrong, the first few.
    pub complaints: Vec<String>,
}

/// Latencies that a share of the requests did not exceed.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct Quantiles {
    /// Half of them.
    pub p50: u64,
    /// 99 of a hundred.
    pub p99: u64,
    /// 999 of a thousand.
    pub p999: u64,
}

impl Report {
    /// The report on what was counted between two moments.
    pub fn new(
        name: &str,
        from_s: f64,
        to_s: f64,
        tally: &Tally,
        counters: BTreeMap<String, i64>,
    ) -> Self {
        let latencies = &tally.latencies;
        Self {
            name: name.to_owned(),
            from_s,
            to_s,
            requests: latencies.total(),
            errors: tally.errors,
            wrong_answers: tally.wrong_answers,
            lost_connections: tally.lost_connections,
            longest_stall_ms: latencies.longest().as_secs_f64() * 1e3,
            latency_us: Quantiles {
                p50: latencies.quantile_us(0.5),
                p99: latencies.quantile_us(0.99),
                p999: latencies.quantile_us(0.999),
            },
            histogram: latencies.buckets(),
            counters,
            complaints: tally.complaints.clone(),
        }
    }

    /// Whether no request failed and no answer was wrong.
    pub fn is_clean(&self) -> bool {
        self.errors + self.wrong_answers + self.lost_connections == 0
    }
}
