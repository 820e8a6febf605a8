//! The daemons of a testbed's nodes. They live on when the command that started them ends.

use std::{
    fs::{self, File},
    io,
    os::fd::AsFd,
    os::unix::{net::UnixDatagram, process::CommandExt},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use ckpt_engine::sys::task;
use nix::{
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::{
        signal::{Signal, kill},
        wait::{WaitPidFlag, WaitStatus, waitpid},
    },
    unistd::Pid,
};
use serde::{Deserialize, Serialize};

use super::{
    TestbedError, cgroups,
    lan::{NODE_BRIDGE, OUTSIDE},
    names::{Host, Layout},
    state::State,
    system,
};

const READY_SECONDS: u64 = 30;
const LOG_TAIL_LINES: usize = 12;

/// Puts itself into a cgroup and becomes the daemon. Were it put there from outside, a testbed
/// killed in between would leave a daemon that nobody finds.
const INTO_CGROUP: &str = "echo $$ > \"$1\" && shift && exec \"$@\"";

/// A daemon, told apart from a later process with the same number by when it started.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Daemon {
    pid: i32,
    started: u64,
}

impl Daemon {
    /// Starts the daemon of a node. It is of use once it is [`Starting::wait`]ed for.
    pub(super) fn start(
        layout: &Layout,
        state: &State,
        node: &Host,
    ) -> Result<Starting, TestbedError> {
        let configuration = layout.configuration(node);
        let text = configuration_of(layout, state, node);
        fs::write(&configuration, text).map_err(system("write", &configuration))?;
        let log = layout.log(node);
        let mut to_log = File::options();
        let file = to_log.create(true).append(true).open(&log).map_err(system("open", &log))?;
        let errors = file.try_clone().map_err(system("open", &log))?;
        // Bound before the daemon runs, so that its word is not lost.
        let ready = layout.ready_socket(node);
        remove_file(&ready)?;
        let listener = UnixDatagram::bind(&ready).map_err(system("bind", &ready))?;
        let program = layout.programs().join("vzd");
        let mut command = Command::new("sh");
        command
            .args(["-c", INTO_CGROUP, "sh"])
            .arg(cgroups::of_daemon(layout, node)?.join("cgroup.procs"))
            .arg(&program)
            .arg("--config")
            .arg(&configuration)
            .current_dir("/")
            .env("NOTIFY_SOCKET", &ready)
            .stdin(Stdio::null())
            .stdout(file)
            .stderr(errors)
            // Not the terminal's: Ctrl-C at the testbed must not reach it.
            .process_group(0);
        let netns = layout.open_netns(node)?;
        let child = netns
            .run(|| command.spawn())
            .map_err(system("enter the namespace of", node.to_string()))?
            .map_err(system("run", &program))?;
        let pid = i32::try_from(child.id()).expect("a process number fits");
        let started = start_time(pid).unwrap_or_default();
        Ok(Starting { daemon: Self { pid, started }, listener, node: *node, log })
    }

    pub(super) fn pid(&self) -> i32 {
        self.pid
    }

    pub(super) fn is_running(&self) -> bool {
        self.ended().is_none()
    }

    /// How it ended, as far as that can be known, if it has.
    fn ended(&self) -> Option<String> {
        if start_time(self.pid) == Some(self.started) && !all_threads_ended(self.pid) {
            return None;
        }
        Some(reap(self.pid).unwrap_or_else(|| "an unknown status".into()))
    }

    /// Kills it and waits until it is gone.
    pub(super) fn kill(&self, node: &Host) -> Result<(), TestbedError> {
        let gone =
            |errno: nix::errno::Errno| system("kill the daemon of", node.to_string())(errno.into());
        match kill(Pid::from_raw(self.pid), Signal::SIGKILL) {
            Ok(()) | Err(nix::errno::Errno::ESRCH) => {}
            Err(errno) => return Err(gone(errno)),
        }
        let deadline = Instant::now() + Duration::from_secs(10);
        while self.is_running() {
            if Instant::now() > deadline {
                let name = self.pid.to_string();
                return Err(TestbedError::Stuck { what: "the process", name });
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        Ok(())
    }
}

/// A daemon that was started and is not yet ready.
#[derive(Debug)]
pub(super) struct Starting {
    pub(super) daemon: Daemon,
    listener: UnixDatagram,
    node: Host,
    log: PathBuf,
}

impl Starting {
    /// Waits until the daemon says that it is ready.
    pub(super) fn wait(self) -> Result<(), TestbedError> {
        let deadline = Instant::now() + Duration::from_secs(READY_SECONDS);
        let node = self.node.to_string();
        // Short, to notice a daemon that ended.
        self.listener
            .set_read_timeout(Some(Duration::from_millis(100)))
            .map_err(system("set up the ready socket of", &node))?;
        let mut buffer = [0; 4096];
        loop {
            match self.listener.recv(&mut buffer) {
                Ok(length) => {
                    let text = String::from_utf8_lossy(&buffer[..length]);
                    if text.lines().any(|line| line == "READY=1") {
                        return Ok(());
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(system("read the ready socket of", &node)(error)),
            }
            if let Some(status) = self.daemon.ended() {
                return Err(TestbedError::DaemonEnded { node, status, log: tail(&self.log) });
            }
            if Instant::now() > deadline {
                let log = self.log.clone();
                return Err(TestbedError::NotReady { node, seconds: READY_SECONDS, log });
            }
        }
    }
}

impl Drop for Starting {
    fn drop(&mut self) {
        if let Ok(address) = self.listener.local_addr()
            && let Some(path) = address.as_pathname()
        {
            let _ = fs::remove_file(path);
        }
    }
}

fn configuration_of(layout: &Layout, state: &State, node: &Host) -> String {
    let text = |path: &Path| toml_string(&path.to_string_lossy());
    format!(
        "# Written by the testbed each time it starts this daemon.\n\
         state_dir = {}\nrun_dir = {}\nsocket = {}\ntemplate_dir = {}\n\n\
         [template]\nnetwork_namespace = {}\n\n[cgroup]\nparent = {}\n\n\
         [network]\nbridge = {}\n",
        text(&layout.state(node)),
        text(&layout.run_directory(node)),
        text(&layout.socket(node)),
        text(&state.templates),
        text(&layout.netns_path(OUTSIDE)),
        toml_string(&cgroups::of_ves(layout, node)),
        toml_string(NODE_BRIDGE),
    )
}

/// A basic string of TOML. JSON's escapes are a part of TOML's.
fn toml_string(text: &str) -> String {
    serde_json::Value::from(text).to_string()
}

/// When a process started, in ticks since boot; none when it is gone.
fn start_time(pid: i32) -> Option<u64> {
    let text = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name in parentheses may hold anything; what follows it does not.
    text.rsplit_once(')')?.1.split_whitespace().nth(19)?.parse().ok()
}

/// Whether a process has ended as a whole. Its first thread may be a zombie long before: what the
/// others still hold open (sockets, locks) stays in use until the last one is gone, and only the
/// pidfd waits for that one (pidfd_open(2)).
fn all_threads_ended(pid: i32) -> bool {
    let Ok(pidfd) = task::pidfd_open(pid) else { return true };
    let mut files = [PollFd::new(pidfd.as_fd(), PollFlags::POLLIN)];
    poll(&mut files, PollTimeout::ZERO).is_ok_and(|ready| ready > 0)
}

/// Takes notice of the end of a daemon that this process started; how it ended, when it has.
fn reap(pid: i32) -> Option<String> {
    match waitpid(Pid::from_raw(pid), Some(WaitPidFlag::WNOHANG)) {
        Ok(WaitStatus::Exited(_, code)) => Some(format!("exit status {code}")),
        Ok(WaitStatus::Signaled(_, signal, _)) => Some(signal.to_string()),
        _ => None,
    }
}

fn tail(log: &Path) -> String {
    let text = fs::read_to_string(log).unwrap_or_default();
    let lines: Vec<_> = text.lines().collect();
    lines[lines.len().saturating_sub(LOG_TAIL_LINES)..].join("\n")
}

fn remove_file(path: &Path) -> Result<(), TestbedError> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(system("remove", path)(error)),
        _ => Ok(()),
    }
}
