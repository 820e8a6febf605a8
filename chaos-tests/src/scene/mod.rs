//! A cluster with Virtual Environments in it, for tests: how to make one, what to run in it, and
//! what must be left when it is gone.

pub mod cgroup;
pub mod traces;

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use crate::client::remote::{RemoteError, RemoteLoad};
use crate::testbed::{Host, Options, TemporaryTestbed, TestbedError};

/// Why a scene could not be played.
#[derive(Debug, thiserror::Error)]
pub enum SceneError {
    /// The testbed failed.
    #[error("the testbed failed")]
    Testbed(#[from] TestbedError),
    /// The clients failed.
    #[error("the clients failed")]
    Client(#[from] RemoteError),
    /// A call of our own failed.
    #[error("cannot {what}")]
    Call {
        /// What was to be done.
        what: &'static str,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// A command did not end as it should.
    #[error("{ran}")]
    Command {
        /// What was run and what came of it.
        ran: Box<Ran>,
    },
    /// Something that was waited for did not come.
    #[error("{what} did not come about within {seconds} s")]
    NotInTime {
        /// What was waited for.
        what: String,
        /// How long.
        seconds: u64,
    },
}

/// A command that has ended.
#[derive(Clone, Debug)]
pub struct Ran {
    /// The host and the words.
    pub command: String,
    /// Its exit status, if it was not ended by a signal.
    pub code: Option<i32>,
    /// What it printed.
    pub stdout: String,
    /// What it said beside that.
    pub stderr: String,
}

impl std::fmt::Display for Ran {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} ended with {:?}: {}{}", self.command, self.code, self.stdout, self.stderr)
    }
}

impl Ran {
    /// Waits for the end of a command that was started with [`Scene::start`].
    pub fn end(command: &str, child: Child) -> io::Result<Self> {
        let output = child.wait_with_output()?;
        Ok(Self {
            command: command.to_owned(),
            code: output.status.code(),
            stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        })
    }

    /// What it printed, if it succeeded.
    pub fn good(self) -> Result<String, SceneError> {
        if self.code == Some(0) {
            return Ok(self.stdout);
        }
        Err(SceneError::Command { ran: Box::new(self) })
    }
}

/// A cluster on this machine, taken down when this is dropped.
#[derive(Debug)]
pub struct Scene {
    /// The cluster.
    pub testbed: TemporaryTestbed,
    programs: PathBuf,
    name: String,
}

/// The workloads that run side by side in one VE: one for each kind of object. All of them are
/// what `make workloads` is for.
const TOGETHER: &[&str] = &[
    "counters",
    "maps",
    "churn",
    "threads",
    "registers",
    "mutexes",
    "signals",
    "timers",
    "waits",
    "identity",
    "family",
    "stopped",
    "regular",
    "pipes",
    "unix",
    "tcp",
    "udp",
    "epoll",
    "epoll-signals",
    "events",
    "terminals",
    "devices",
    "tcp-peer",
    "udp-peer",
];

/// The port that `selfcheck peer` listens on at the client.
const PEER_PORT: u16 = 7700;

impl Scene {
    /// Brings up a cluster of this many nodes. Two checkouts may play the same scene at once, and
    /// one that plays it again clears away what it left when it was killed.
    pub fn up(name: &str, nodes: usize) -> Result<Self, SceneError> {
        Self::up_with(name, nodes, |_| {})
    }

    /// As [`Self::up`], with other options.
    pub fn up_with(
        name: &str,
        nodes: usize,
        adapt: impl FnOnce(&mut Options),
    ) -> Result<Self, SceneError> {
        let mut options = Options::new(name).map_err(call("find the programs"))?;
        options.name_by_checkout();
        options.nodes = nodes;
        adapt(&mut options);
        let testbed = TemporaryTestbed::up(&options)?;
        Ok(Self { testbed, programs: options.programs, name: options.name })
    }

    /// The name of the testbed.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Runs a command on a host.
    pub fn run(&self, host: Host, words: &[&str]) -> Result<Ran, SceneError> {
        self.run_with(host, words, Stdio::null())
    }

    /// Runs a command on a host that must succeed, and returns what it printed.
    pub fn good(&self, host: Host, words: &[&str]) -> Result<String, SceneError> {
        self.run(host, words)?.good()
    }

    /// Runs a command on a host with this standard input.
    pub fn run_with(&self, host: Host, words: &[&str], input: Stdio) -> Result<Ran, SceneError> {
        let child = self.start(host, words, input)?;
        let command = format!("{host}: {}", words.join(" "));
        Ran::end(&command, child).map_err(call("wait for a command"))
    }

    /// Starts a command on a host, with its output piped.
    pub fn start(&self, host: Host, words: &[&str], input: Stdio) -> Result<Child, SceneError> {
        let (program, rest) = words.split_first().unwrap_or((&"true", &[]));
        let mut command = Command::new(program);
        command.args(rest).stdin(input).stdout(Stdio::piped()).stderr(Stdio::piped());
        Ok(self.testbed.spawn(&host, &mut command)?)
    }

    /// Creates a VE from the Debian template and starts it.
    pub fn make_ve(&self, host: Host, ve: &str, address: &str) -> Result<(), SceneError> {
        self.make_ve_of(host, ve, address, "debian-12-minimal")
    }

    /// Creates a VE from a template and starts it.
    pub fn make_ve_of(
        &self,
        host: Host,
        ve: &str,
        address: &str,
        ostemplate: &str,
    ) -> Result<(), SceneError> {
        let address = format!("{address}/16");
        self.good(
            host,
            &[
                "vzctl",
                "create",
                ve,
                "--ostemplate",
                ostemplate,
                "--ipadd",
                &address,
                "--ram",
                "1G",
            ],
        )?;
        self.good(host, &["vzctl", "start", ve, "--wait"])?;
        Ok(())
    }

    /// Runs a command line in a VE that must succeed, and returns what it printed.
    pub fn inside(&self, host: Host, ve: &str, line: &str) -> Result<String, SceneError> {
        self.good(host, &["vzctl", "exec2", ve, line])
    }

    /// Waits for the redis of a VE and lets it be reached from outside.
    pub fn open_redis(&self, host: Host, ve: &str) -> Result<(), SceneError> {
        self.wait("redis", 60, || {
            let ran = self.run(host, &["vzctl", "exec2", ve, "redis-cli ping"])?;
            Ok(ran.stdout.contains("PONG"))
        })?;
        for setting in ["protected-mode no", "save ''", "bind '* -::*'"] {
            self.inside(host, ve, &format!("redis-cli config set {setting}"))?;
        }
        Ok(())
    }

    /// Fills a redis with so many MiB and puts a checked load on it from the client host.
    pub fn load(
        &self,
        address: &str,
        mib: u32,
        connections: u32,
    ) -> Result<RemoteLoad, SceneError> {
        let mut command = Command::new(self.programs.join("loadclient"));
        command.arg("--address").arg(format!("{address}:6379"));
        command.arg("--connections").arg(connections.to_string()).args(["--rate", "200"]);
        command.arg("--fill-mib").arg(mib.to_string());
        RemoteLoad::prepare(&mut command);
        let mut load = RemoteLoad::new(self.testbed.spawn(&Host::Client, &mut command)?)?;
        // Answered when the dataset is filled and the connections are there.
        load.mark("filled")?;
        Ok(load)
    }

    /// Copies the self-checking workloads into a VE.
    pub fn put_selfcheck(&self, host: Host, ve: &str) -> Result<(), SceneError> {
        let file = File::open(self.program("selfcheck")).map_err(call("open selfcheck"))?;
        let copy = "cat > /usr/local/bin/selfcheck && chmod 755 /usr/local/bin/selfcheck";
        self.run_with(host, &["vzctl", "exec2", ve, copy], file.into())?.good().map(drop)
    }

    /// Copies the self-checking workloads into a VE and starts them, with a companion on the
    /// client host.
    pub fn start_selfcheck(&self, host: Host, ve: &str) -> Result<Companion, SceneError> {
        self.start_selfcheck_without(host, ve, &[])
    }

    /// As [`Self::start_selfcheck`], without some of the workloads.
    pub fn start_selfcheck_without(
        &self,
        host: Host,
        ve: &str,
        skip: &[&str],
    ) -> Result<Companion, SceneError> {
        self.put_selfcheck(host, ve)?;
        let companion = self.start_companion()?;
        let peer = Self::peer();
        let mut line =
            format!("selfcheck run --detach --only {} --peer {peer}", TOGETHER.join(","));
        if !skip.is_empty() {
            line += &format!(" --skip {}", skip.join(","));
        }
        self.inside(host, ve, &line)?;
        Ok(companion)
    }

    /// Starts the host that workloads talk to.
    pub fn start_companion(&self) -> Result<Companion, SceneError> {
        Companion::start(self, &self.program("selfcheck"))
    }

    /// Where it listens.
    pub fn peer() -> String {
        format!("{}:{PEER_PORT}", Host::Client.address())
    }

    /// Where a program of ours is.
    pub fn program(&self, name: &str) -> PathBuf {
        self.programs.join(name)
    }

    /// The nodes on which a VE runs.
    pub fn running_on(&self, ve: &str) -> Result<Vec<Host>, SceneError> {
        let mut found = Vec::new();
        for node in self.testbed.nodes() {
            let status = self.run(node, &["vzctl", "status", ve])?;
            if status.stdout.split_whitespace().any(|word| word == "running") {
                found.push(node);
            }
        }
        Ok(found)
    }

    /// Waits for a condition, asking again and again.
    pub fn wait(
        &self,
        what: &str,
        seconds: u64,
        mut holds: impl FnMut() -> Result<bool, SceneError>,
    ) -> Result<(), SceneError> {
        let deadline = Instant::now() + Duration::from_secs(seconds);
        while !holds()? {
            if Instant::now() > deadline {
                return Err(SceneError::NotInTime { what: what.to_owned(), seconds });
            }
            std::thread::park_timeout(Duration::from_millis(50));
        }
        Ok(())
    }
}

/// `selfcheck peer` on the client host, ended when this is dropped.
#[derive(Debug)]
pub struct Companion(Child);

impl Companion {
    fn start(scene: &Scene, program: &Path) -> Result<Self, SceneError> {
        use std::io::{BufRead, BufReader};

        let mut command = Command::new(program);
        let listen = format!("{}:{PEER_PORT}", Host::Client.address());
        command.args(["peer", "--listen", &listen]).stdin(Stdio::null()).stdout(Stdio::piped());
        let mut companion = Self(scene.testbed.spawn(&Host::Client, &mut command)?);
        let mut line = String::new();
        if let Some(output) = companion.0.stdout.take() {
            BufReader::new(output).read_line(&mut line).map_err(call("hear the companion"))?;
        }
        if line.is_empty() {
            let what = "the companion of the workloads".to_owned();
            return Err(SceneError::NotInTime { what, seconds: 0 });
        }
        Ok(companion)
    }
}

impl Drop for Companion {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

pub(crate) fn call(what: &'static str) -> impl FnOnce(io::Error) -> SceneError {
    move |source| SceneError::Call { what, source }
}
