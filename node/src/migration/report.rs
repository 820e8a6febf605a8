//! What a finished move tells its user.

use serde::{Deserialize, Serialize};

use super::postcopy::PostcopyReport;

/// One round of pre-copy.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct RoundReport {
    /// Pages with contents.
    pub pages: u64,
    /// Bytes on the wire.
    pub bytes: u64,
    /// Until the target had applied them.
    pub ms: f64,
    /// The share of its CPU time that the VE was left meanwhile, in percent, if it was slowed
    /// down.
    #[serde(default)]
    pub throttle_percent: Option<u8>,
}

/// Where the blackout went, in milliseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Downtime {
    /// Stopping the processes and holding the packets.
    pub freeze: f64,
    /// Reading and sending what was left.
    pub delta: f64,
    /// Rebuilding on the target.
    pub restore: f64,
    /// The change of owner, and letting go.
    pub switch: f64,
    /// All of it.
    pub total: f64,
}

/// The object that `vzmigrate --json` prints as its last line.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// The VE.
    pub ve: u32,
    /// The node that ran it.
    pub source: String,
    /// The node that runs it.
    pub target: String,
    /// The rounds while the VE ran.
    pub rounds: Vec<RoundReport>,
    /// The blackout by phase.
    pub downtime_ms: Downtime,
    /// What was predicted when the VE was frozen.
    pub predicted_downtime_ms: f64,
    /// The whole move.
    pub total_ms: f64,
    /// Bytes sent, the template not counted.
    pub bytes: u64,
    /// What came after the switch, if the move ended in post-copy.
    #[serde(default)]
    pub postcopy: Option<PostcopyReport>,
}

impl std::fmt::Display for Report {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Downtime { freeze, delta, restore, switch, total } = self.downtime_ms;
        write!(
            f,
            "{} moved {} → {} in {:.1} s, downtime {total:.0} ms \
             (freeze {freeze:.1}, delta {delta:.1}, restore {restore:.1}, switch {switch:.1})",
            self.ve,
            self.source,
            self.target,
            self.total_ms / 1000.0,
        )?;
        let Some(PostcopyReport { bytes, faults, ms, .. }) = self.postcopy else { return Ok(()) };
        let (mebibytes, seconds) = (bytes as f64 / 1_048_576.0, ms / 1000.0);
        write!(f, ", {mebibytes:.0} MiB in {seconds:.1} s of post-copy ({faults} waits)")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_line_says_where_the_blackout_went() {
        let report = Report {
            ve: 101,
            source: "node1".into(),
            target: "node2".into(),
            rounds: Vec::new(),
            downtime_ms: Downtime {
                freeze: 1.1,
                delta: 6.0,
                restore: 8.1,
                switch: 2.8,
                total: 18.0,
            },
            predicted_downtime_ms: 20.0,
            total_ms: 1234.0,
            bytes: 0,
            postcopy: None,
        };
        let line = "101 moved node1 → node2 in 1.2 s, downtime 18 ms \
                    (freeze 1.1, delta 6.0, restore 8.1, switch 2.8)";
        assert_eq!(report.to_string(), line);
        let postcopy = PostcopyReport { pages: 31488, bytes: 123 << 20, faults: 45, ms: 2300.0 };
        let report = Report { postcopy: Some(postcopy), ..report };
        let more = ", 123 MiB in 2.3 s of post-copy (45 waits)";
        assert_eq!(report.to_string(), format!("{line}{more}"));
    }
}
