//! The kernel's own counters of this network namespace: what TCP had to repeat, and why.

use std::collections::BTreeMap;
use std::{fs, io};

/// Counters that tell whether a connection was disturbed.
const WATCHED: &[&str] = &[
    "Tcp.ActiveOpens",
    "Tcp.EstabResets",
    "Tcp.RetransSegs",
    "Tcp.InErrs",
    "Tcp.OutRsts",
    "TcpExt.TCPTimeouts",
    "TcpExt.TCPSpuriousRTOs",
    "TcpExt.TCPLossProbes",
    "TcpExt.TCPLossProbeRecovery",
    "TcpExt.TCPFastRetrans",
    "TcpExt.TCPSlowStartRetrans",
    "TcpExt.TCPLostRetransmit",
    "TcpExt.TCPAbortOnData",
    "TcpExt.TCPAbortOnTimeout",
    "TcpExt.TCPDSACKRecv",
    "TcpExt.TCPChallengeACK",
    "TcpExt.TCPZeroWindowDrop",
];

/// Counter values at one moment.
#[derive(Clone, Debug, Default)]
pub struct Counters(BTreeMap<&'static str, i64>);

impl Counters {
    /// Reads the counters of the network namespace that this thread is in.
    pub fn read() -> io::Result<Self> {
        // Not /proc/net: that follows the process's main thread.
        let snmp = fs::read_to_string("/proc/thread-self/net/snmp")?;
        let netstat = fs::read_to_string("/proc/thread-self/net/netstat")?;
        Ok(Self::parse(&[&snmp, &netstat]))
    }

    fn parse(texts: &[&str]) -> Self {
        let mut found = BTreeMap::new();
        for text in texts {
            let lines: Vec<&str> = text.lines().collect();
            for pair in lines.chunks_exact(2) {
                let (Some((group, names)), Some((_, values))) =
                    (pair[0].split_once(':'), pair[1].split_once(':'))
                else {
                    continue;
                };
                for (name, value) in names.split_whitespace().zip(values.split_whitespace()) {
                    let watched = WATCHED.iter().find(|watched| {
                        watched.split_once('.').is_some_and(|(g, n)| g == group && n == name)
                    });
                    if let (Some(watched), Ok(value)) = (watched, value.parse()) {
                        found.insert(*watched, value);
                    }
                }
            }
        }
        Self(found)
    }

    /// What was counted between an earlier moment and this one, without what did not change.
    pub fn since(&self, earlier: &Self) -> BTreeMap<String, i64> {
        let mut changed = BTreeMap::new();
        for (name, value) in &self.0 {
            let difference = value - earlier.0.get(name).copied().unwrap_or(0);
            if difference != 0 {
                let short = name.split_once('.').map_or(*name, |(_, short)| short);
                changed.insert(short.to_owned(), difference);
            }
        }
        changed
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernel_has_all_watched_counters() {
        let counters = Counters::read().unwrap();
        for name in WATCHED {
            assert!(counters.0.contains_key(name), "{name} is unknown to this kernel");
        }
    }

    #[test]
    fn differences_are_by_name() {
        let before = Counters::parse(&["Tcp: RetransSegs InErrs\nTcp: 5 1\n"]);
        let after = Counters::parse(&["Tcp: RetransSegs InErrs\nTcp: 7 1\n"]);
        assert_eq!(after.since(&before), BTreeMap::from([("RetransSegs".to_owned(), 2)]));
    }
}
