//! Starts the workloads, watches them, and ends them all for the verdict.
//!
//! Each workload is a process with its own session, its standard input a pipe from here: when the
//! pipe ends, it makes its last checks and exits. What the supervisor holds is itself part of what
//! is moved.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io;
use std::net::SocketAddr;
use std::os::fd::AsFd;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};

use super::Workload;

/// How long a workload may take for its last checks.
const LAST_CHECKS: Duration = Duration::from_secs(20);

/// What is to be run, and how.
#[derive(Clone, Debug)]
pub struct Plan {
    /// The workloads.
    pub workloads: Vec<&'static Workload>,
    /// Where each gets a folder of its own.
    pub folder: PathBuf,
    /// The companion on another host.
    pub peer: Option<SocketAddr>,
    /// Workloads whose checks must fail.
    pub plant: Vec<String>,
    /// Ends by itself after this time; without it on SIGTERM or SIGINT.
    pub time: Option<Duration>,
}

/// The verdict on one workload.
#[derive(Clone, Debug)]
pub struct Verdict {
    /// Its name.
    pub name: String,
    /// Checks that it made.
    pub checks: u64,
    /// What was wrong, or nothing.
    pub failure: Option<String>,
}

/// Running workloads. Dropping it ends them.
#[derive(Debug)]
pub struct Supervisor {
    plan: Plan,
    running: BTreeMap<&'static str, Child>,
}

impl Supervisor {
    /// Starts all and waits until each has made its first checks or has failed.
    pub fn start(plan: Plan) -> io::Result<Self> {
        let program = std::env::current_exe()?;
        let mut running = BTreeMap::new();
        for workload in &plan.workloads {
            let folder = plan.folder.join(workload.name);
            fs::create_dir_all(&folder)?;
            let log = File::create(folder.join("log"))?;
            let mut command = Command::new(&program);
            command.arg("workload").arg(workload.name).arg("--dir").arg(&folder);
            if let Some(peer) = plan.peer {
                command.arg("--peer").arg(peer.to_string());
            }
            if plan.plant.iter().any(|name| name == workload.name) {
                command.arg("--plant");
            }
            command.stdin(Stdio::piped()).stdout(log.try_clone()?).stderr(log).process_group(0);
            running.insert(workload.name, command.spawn()?);
        }
        let mut supervisor = Self { plan, running };
        supervisor.wait_for_first_checks();
        Ok(supervisor)
    }

    fn wait_for_first_checks(&mut self) {
        let deadline = Instant::now() + LAST_CHECKS;
        let folder = self.plan.folder.clone();
        let mut waiting: Vec<_> = self.running.iter_mut().collect();
        while !waiting.is_empty() && Instant::now() < deadline {
            waiting.retain_mut(|(name, child)| {
                let over = !matches!(child.try_wait(), Ok(None));
                !over && read_checks(&folder.join(name)) == 0
            });
            std::thread::park_timeout(Duration::from_millis(20));
        }
    }

    /// Runs until the time is over or a signal says so, then collects the verdicts.
    pub fn run(mut self, signals: &SignalFd) -> io::Result<Vec<Verdict>> {
        let end = self.plan.time.map(|time| Instant::now() + time);
        loop {
            let left = end.map(|end| end.saturating_duration_since(Instant::now()));
            if left == Some(Duration::ZERO) {
                break;
            }
            let wait = left.unwrap_or(Duration::from_secs(3600)).min(Duration::from_secs(3600));
            let timeout = PollTimeout::try_from(wait + Duration::from_micros(999))
                .unwrap_or(PollTimeout::NONE);
            let mut fds = [PollFd::new(signals.as_fd(), PollFlags::POLLIN)];
            if poll(&mut fds, timeout)? > 0 {
                // Taken out, so that it is not delivered later.
                let _ = signals.read_signal();
                break;
            }
        }
        Ok(self.finish())
    }

    /// Tells all to stop and waits for them.
    fn finish(&mut self) -> Vec<Verdict> {
        for child in self.running.values_mut() {
            drop(child.stdin.take());
        }
        let deadline = Instant::now() + LAST_CHECKS;
        let folder = self.plan.folder.clone();
        let running = std::mem::take(&mut self.running);
        running
            .into_iter()
            .map(|(name, mut child)| {
                let status = wait_until(&mut child, deadline);
                verdict(name, &folder.join(name), status)
            })
            .collect()
    }
}

impl Drop for Supervisor {
    fn drop(&mut self) {
        self.finish();
    }
}

/// The signals that end a run, blocked for this process and its threads from now on.
pub fn blocked_signals() -> nix::Result<SignalFd> {
    let mut set = SigSet::empty();
    set.add(Signal::SIGTERM);
    set.add(Signal::SIGINT);
    set.thread_block()?;
    SignalFd::with_flags(&set, SfdFlags::SFD_CLOEXEC)
}

fn wait_until(child: &mut Child, deadline: Instant) -> Option<ExitStatus> {
    loop {
        match child.try_wait() {
            Ok(Some(status)) => return Some(status),
            Ok(None) if Instant::now() < deadline => {
                std::thread::park_timeout(Duration::from_millis(5));
            }
            _ => {
                // It does not answer: take it away, the verdict says so.
                let _ = child.kill();
                let _ = child.wait();
                return None;
            }
        }
    }
}

fn verdict(name: &str, folder: &Path, status: Option<ExitStatus>) -> Verdict {
    let checks = read_checks(folder);
    let failure = match status {
        None => Some("it did not stop when told to".to_owned()),
        Some(status) if status.success() && checks == 0 => Some("it checked nothing".to_owned()),
        Some(status) if status.success() => None,
        Some(status) => Some(last_words(folder).unwrap_or_else(|| format!("ended with {status}"))),
    };
    Verdict { name: name.to_owned(), checks, failure }
}

fn last_words(folder: &Path) -> Option<String> {
    let log = fs::read_to_string(folder.join("log")).ok()?;
    log.lines().rev().find(|line| !line.trim().is_empty()).map(str::to_owned)
}

/// The number of checks that a workload wrote last.
pub fn read_checks(folder: &Path) -> u64 {
    let text = fs::read_to_string(folder.join("status")).unwrap_or_default();
    text.lines().last().and_then(|line| line.parse().ok()).unwrap_or(0)
}
