//! The daemons of a testbed's nodes. They live on when the command that started them ends.

use std::{
    fs::{self, File},
    io,
    os::unix::{net::UnixDatagram, process::CommandExt},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use nix::{
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

/// A daemon, told apart from a later process with the same number by when it started.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Daemon {
    pid: i32,
    started: u64,
}

impl Daemon {
    /// Starts the daemon of a node.
    pub(super) fn start(
        layout: &Layout,
        state: &State,
        node: &Host,
    ) -> Result<Self, TestbedError> {
        let configuration = layout.configuration(node);
        let text = configuration_of(layout, state, node);
        fs::write(&configuration, text).map_err(system("write", &configuration))?;
        let ready = layout.ready_socket(node);
        remove_file(&ready)?;
        let log = layout.log(node);
        let file = File::options()
            .create(true)
            .append(true)
            .open(&log)
            .map_err(system("open", &log))?;
        let errors = file.try_clone().map_err(system("open", &log))?;
        let program = layout.programs().join("vzd");
        // Bound before the daemon runs, so that its word is not lost; read in wait_until_ready.
        let listener = UnixDatagram::bind(&ready).map_err(system("bind", &ready))?;
        let mut command = Command::new(&program);
        command
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
        cgroups::enter(&cgroups::of_daemon(layout, node)?, child.id())?;
        let pid = i32::try_from(child.id()).expect("a process number fits");
        let started = start_time(pid).unwrap_or_default();
        wait_for_ready(&listener, layout, node, pid)?;
        Ok(Self { pid, started })
    }

    pub(super) fn pid(&self) -> i32 {
        self.pid
    }

    pub(super) fn is_running(&self) -> bool {
        reap(self.pid);
        start_time(self.pid) == Some(self.started)
    }

    /// Kills it and waits until it is gone.
    pub(super) fn kill(&self, node: &Host) -> Result<(), TestbedError> {
        let gone = |errno: nix::errno::Errno| system("kill the daemon of", node.to_string())(errno.into());
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
