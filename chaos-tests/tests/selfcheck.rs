//! The self-checking workloads themselves: they pass where nothing is moved, and each notices the
//! fault that is planted in it.

use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Output, Stdio};

use chaos_tests::pool::Pool;
use chaos_tests::workload::AREAS;

const SELFCHECK: &str = env!("CARGO_BIN_EXE_selfcheck");

/// The companion on another host, here on loopback.
struct Peer {
    child: Child,
    address: String,
}

impl Peer {
    fn start() -> Self {
        let mut child = Command::new(SELFCHECK)
            .args(["peer", "--listen", "127.0.0.1:0"])
            .stdout(Stdio::piped())
            .spawn()
            .expect("selfcheck was built");
        let mut line = String::new();
        let output = child.stdout.take().expect("it is piped");
        BufReader::new(output).read_line(&mut line).expect("it says where it listens");
        let address = line.trim().rsplit(' ').next().expect("an address").to_owned();
        Self { child, address }
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn run(arguments: &[&str]) -> (Output, String) {
    let folder = tempfile::tempdir().expect("a folder");
    let peer = Peer::start();
    let _pool = Pool::with(16).expect("the host can set huge pages aside");
    // Whatever a workload leaves goes with its namespaces: processes, segments, queues. The shell is
    // their init, which has to be one that takes orphans in.
    let output = Command::new("unshare")
        .args(["--ipc", "--pid", "--fork", "--kill-child", "--mount-proc"])
        .args(["sh", "-c", "\"$@\"; exit $?", "sh", SELFCHECK])
        .args(["run", "--peer", &peer.address, "--dir"])
        .arg(folder.path())
        .args(arguments)
        .output()
        .expect("selfcheck was built");
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    (output, text)
}

/// The lines of the table: name, checks, verdict.
fn verdicts(text: &str) -> Vec<(&str, &str)> {
    text.lines()
        .skip(2)
        .filter_map(|line| {
            let mut words = line.split_whitespace();
            let (name, _, verdict) = (words.next()?, words.next()?, words.next()?);
            Some((name, verdict))
        })
        .filter(|(_, verdict)| *verdict == "ok" || *verdict == "FAIL")
        .collect()
}

#[test]
fn all_workloads_pass_where_nothing_is_moved() {
    // All at once would be late for what their own clocks say.
    for area in AREAS {
        let (output, text) = run(&["--seconds", "4", "--only", area.name]);
        assert!(output.status.success(), "{text}");
        let verdicts = verdicts(&text);
        assert_eq!(verdicts.len(), area.workloads.len(), "{text}");
        assert!(verdicts.iter().all(|(_, verdict)| *verdict == "ok"), "{text}");
    }
}

#[test]
fn every_workload_notices_the_fault_planted_in_it() {
    let names: Vec<String> =
        chaos_tests::workload::all().map(|workload| workload.name.to_owned()).collect();
    let (output, text) = run(&["--seconds", "8", "--plant", &names.join(",")]);
    assert_eq!(output.status.code(), Some(1), "{text}");
    for name in &names {
        assert!(verdicts(&text).contains(&(name, "FAIL")), "{name} noticed nothing:\n{text}");
    }
}

#[test]
fn an_unknown_workload_is_refused() {
    let (output, _) = run(&["--seconds", "1", "--only", "nonsense"]);
    assert_eq!(output.status.code(), Some(2));
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(said.contains("no workload is called nonsense"), "{said}");
}
