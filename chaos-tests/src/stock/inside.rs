//! What a VE says about itself: failed units, complaints, processes of its services, and what its
//! databases think of their own contents.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::Value;

/// Prints the units that have failed.
pub(super) const FAILED: &str = "systemctl list-units --failed --plain --no-legend --no-pager";
/// Prints the main process of each service that runs.
pub(super) const SERVICES: &str = "systemctl list-units --type=service --state=running --plain \
     --no-legend --no-pager | while read -r unit rest; do case $unit in session-*|user@*|user-*) \
     ;; *) echo $unit $(systemctl show -P MainPID $unit) $(systemctl show -P NRestarts $unit);; \
     esac; done";
/// Prints all that is a warning or worse in the journal.
pub(super) const JOURNAL: &str = "journalctl -p warning -o json --no-pager \
     --output-fields=SYSLOG_IDENTIFIER,MESSAGE";
/// Prints what services complain about in logs of their own.
pub(super) const LOGS: &str = "grep -hE 'WARNING|ERROR|FATAL|PANIC' /var/log/postgresql/*.log; \
     cat /var/log/nginx/error.log; grep -h ' # ' /var/log/redis/*.log; \
     cat /var/log/exim4/paniclog 2>/dev/null; true";
/// Ends well if PostgreSQL finds all tables and indexes of all databases whole.
pub(super) const AMCHECK: &str = "su postgres -c '/usr/lib/postgresql/*/bin/pg_amcheck --all \
     --install-missing --heapallindexed --parent-check'";
/// Prints whether all sums of pgbench are the same.
pub(super) const SUMS: &str = "su postgres -c \"psql -d bench -Atc 'select (select sum(abalance) \
     from pgbench_accounts) = s and (select sum(tbalance) from pgbench_tellers) = s and (select \
     sum(bbalance) from pgbench_branches) = s from (select sum(delta) as s from pgbench_history) \
     as h'\"";
/// Ends well if redis finds its files whole, both the log and a dump of now.
pub(super) const REDIS: &str = "redis-cli save && redis-check-rdb /var/lib/redis/dump.rdb && \
     for file in /var/lib/redis/appendonlydir/*.manifest; do echo y | redis-check-aof $file; done";
/// Prints how many different letters have come.
pub(super) const LETTERS: &str = "exim4 -qff; grep -h '^Subject: letter ' /var/mail/stock | sort \
     | uniq | wc -l";
/// Prints the numbers of the lines that the Python program has logged, in the order of the log.
pub(super) const TICKS: &str =
    "sed -n 's/.*stock-python.*tick \\([0-9]*\\)$/\\1/p' /var/log/syslog";
/// Prints when cron has run its job.
pub(super) const MINUTES: &str = "cat /var/lib/stock/cron 2>/dev/null; true";

/// What can be compared with the same later.
#[derive(Clone, Debug, Default)]
pub(super) struct State {
    /// Units that have failed.
    pub(super) failed: BTreeSet<String>,
    /// Main process and restarts of each service.
    pub(super) services: BTreeMap<String, String>,
    /// Complaints, without their numbers: they are of other processes at another time.
    pub(super) complaints: BTreeMap<String, String>,
}

impl State {
    /// From what [`FAILED`], [`SERVICES`], [`JOURNAL`] and [`LOGS`] print.
    pub(super) fn new(failed: &str, services: &str, journal: &str, logs: &str) -> Self {
        let failed = failed.lines().filter_map(|line| line.split_whitespace().next());
        let services = services.lines().filter_map(|line| line.split_once(' '));
        let journal = journal.lines().filter_map(|line| serde_json::from_str(line).ok());
        let lines = journal.map(|entry| complaint(&entry)).chain(logs.lines().map(str::to_owned));
        Self {
            failed: failed.map(str::to_owned).collect(),
            services: services.map(|(unit, rest)| (unit.to_owned(), rest.to_owned())).collect(),
            complaints: lines.map(|line| (without_numbers(&line), line)).collect(),
        }
    }

    /// Units that have failed since.
    pub(super) fn failed_since(&self, before: &Self) -> Vec<String> {
        self.failed.difference(&before.failed).cloned().collect()
    }

    /// Services that are not the same process as before.
    pub(super) fn restarted_since(&self, before: &Self) -> Vec<String> {
        let same = |unit: &str, is: &String| self.services.get(unit) == Some(is);
        let other = before.services.iter().filter(|(unit, is)| !same(unit, is));
        other.map(|(unit, _)| unit.clone()).collect()
    }

    /// Complaints of a kind that was not there before.
    pub(super) fn complaints_since(&self, before: &Self) -> Vec<String> {
        let new = self.complaints.iter().filter(|(kind, _)| !before.complaints.contains_key(*kind));
        new.map(|(_, line)| line.clone()).collect()
    }
}

fn complaint(entry: &Value) -> String {
    let who = entry.get("SYSLOG_IDENTIFIER").and_then(Value::as_str).unwrap_or("?");
    match entry.get("MESSAGE") {
        Some(Value::String(text)) => format!("{who}: {text}"),
        other => format!("{who}: {}", other.unwrap_or(&Value::Null)),
    }
}

fn without_numbers(line: &str) -> String {
    let mut kind = String::with_capacity(line.len());
    for c in line.chars() {
        let c = if c.is_ascii_digit() { '0' } else { c };
        if !(c == '0' && kind.ends_with('0')) {
            kind.push(c);
        }
    }
    kind
}

/// How many numbers there are, and which is the first that does not follow the one before it.
pub(super) fn gap(numbers: &str) -> (usize, Option<(u64, u64)>) {
    let numbers: Vec<u64> = numbers.lines().filter_map(|line| line.trim().parse().ok()).collect();
    let gap = numbers.windows(2).find(|pair| pair[1] != pair[0] + 1).map(|pair| (pair[0], pair[1]));
    (numbers.len(), gap)
}

/// How often cron has run its job, and how many minutes have passed meanwhile: it makes up for
/// those in which it could not run.
pub(super) fn minutes(times: &str) -> (u64, u64) {
    let minutes: Vec<u64> =
        times.lines().filter_map(|line| Some(line.trim().parse::<u64>().ok()? / 60)).collect();
    let passed = match (minutes.first(), minutes.last()) {
        (Some(first), Some(last)) => last.saturating_sub(*first) + 1,
        _ => 0,
    };
    (minutes.len() as u64, passed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_new_kinds_of_complaints_and_other_processes_count() {
        let before = State::new(
            "a.service loaded failed",
            "ssh.service 10 0\ncron.service 11 0",
            r#"{"SYSLOG_IDENTIFIER":"kernel","MESSAGE":"took 15 ms"}"#,
            "old",
        );
        let after = State::new(
            "a.service loaded failed\nb.service loaded failed",
            "ssh.service 10 0\ncron.service 12 1\nnew.service 5 0",
            "{\"SYSLOG_IDENTIFIER\":\"kernel\",\"MESSAGE\":\"took 7 ms\"}\n{\"MESSAGE\":[1]}",
            "old",
        );
        assert_eq!(after.failed_since(&before), ["b.service"]);
        assert_eq!(after.restarted_since(&before), ["cron.service"]);
        assert_eq!(after.complaints_since(&before), ["?: [1]"]);
    }

    #[test]
    fn gaps_are_found() {
        assert_eq!(gap("1\n2\n3\n"), (3, None));
        assert_eq!(gap("1\n2\n4\n"), (3, Some((2, 4))));
        assert_eq!(minutes("60\n121\n"), (2, 2));
        assert_eq!(minutes("60\n181\n"), (2, 3));
    }
}
