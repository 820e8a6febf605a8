//! What a benchmark plays on: a cluster of two nodes with a client host, VEs in it, and the
//! programs that load them.

pub mod guard;
pub mod laps;
pub mod services;
pub mod templates;

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use chaos_tests::client::remote::{RemoteError, RemoteLoad};
use chaos_tests::scene::{Scene, SceneError};
use chaos_tests::testbed::{Host, Options, Rate, TestbedError};
use node::cgroup::{Controller, Hierarchies};
use node::migration::Report;
use tempfile::NamedTempFile;

use self::guard::Guard;
use self::laps::{Laps, LogMark};
use crate::arguments::Common;
use crate::wire::{self, Transferred, Way, WireError};

/// Why a benchmark stopped.
#[derive(Debug, thiserror::Error)]
pub enum StageError {
    /// The scene failed.
    #[error(transparent)]
    Scene(#[from] SceneError),
    /// A client failed.
    #[error("a client failed")]
    Client(#[from] RemoteError),
    /// The certificates for a transfer.
    #[error("cannot prepare a transfer")]
    Wire(#[from] WireError),
    /// Something of the system.
    #[error("cannot {what}")]
    System {
        /// What was to be done.
        what: &'static str,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// A program said something else than it should.
    #[error("{program} said {said:?}")]
    Said {
        /// The program.
        program: String,
        /// Its words.
        said: String,
    },
}

impl From<TestbedError> for StageError {
    fn from(error: TestbedError) -> Self {
        Self::Scene(error.into())
    }
}

/// Says what was to be done when a call of the system fails.
pub fn system(what: &'static str) -> impl FnOnce(io::Error) -> StageError {
    move |source| StageError::System { what, source }
}

/// The file in a VE that is there once its ballast is.
const READY: &str = "/run/ballast.ready";

/// The cluster.
#[derive(Debug)]
pub struct Stage {
    /// The scene with its testbed.
    pub scene: Scene,
    /// The program with the parts of a benchmark that run elsewhere. Not where the daemon is, if
    /// that is of another revision.
    pub part: PathBuf,
    /// The same without what only a debugger wants: it is moved with each VE.
    stripped: NamedTempFile,
    guard: Guard,
}

/// What a move came to.
#[derive(Clone, Debug)]
pub struct Moved {
    /// What vzmigrate told.
    pub report: Report,
    /// The steps of the blackout.
    pub laps: Laps,
}

impl Moved {
    /// Bytes that were sent while the VE stood still.
    pub fn delta_bytes(&self) -> u64 {
        let before: u64 = self.report.rounds.iter().map(|round| round.bytes).sum();
        self.report.bytes.saturating_sub(before)
    }

    /// How far the blackout was from what was predicted, as a share of it.
    pub fn misprediction(&self) -> f64 {
        let total = self.report.downtime_ms.total;
        (self.report.predicted_downtime_ms - total).abs() / total.max(f64::MIN_POSITIVE)
    }
}

impl Stage {
    /// Brings the cluster up. `word` tells apart the benchmarks that may run side by side.
    pub fn up(
        common: &Common,
        guard: &Guard,
        word: &str,
        adapt: impl FnOnce(&mut Options),
    ) -> Result<Self, StageError> {
        let mut part = PathBuf::new();
        let scene = Scene::up_with(&format!("{}{word}", common.name), 2, |options| {
            adapt(options);
            part = options.programs.join("benchpart");
            if let Some(programs) = &common.programs {
                options.programs.clone_from(programs);
            }
            guard.watch(Some(&options.name));
        })?;
        let stripped = strip(&part)?;
        Ok(Self { scene, part, stripped, guard: guard.clone() })
    }

    /// Limits the links of both nodes.
    pub fn rate(&mut self, rate: Option<Rate>) -> Result<(), StageError> {
        for node in self.scene.testbed.nodes() {
            self.scene.testbed.rate(&node, rate)?;
        }
        Ok(())
    }

    /// Creates a VE and starts it, with what a benchmark needs in it.
    pub fn make_ve(&self, ve: &Ve) -> Result<(), StageError> {
        let Ve { id, address, template, memory_mib, home } = ve;
        let (address, memory) = (format!("{address}/16"), format!("{memory_mib}M"));
        let words = ["vzctl", "create", id, "--ostemplate", template, "--ipadd", &address, "--ram"];
        self.scene.good(*home, &[&words[..], &[&memory]].concat())?;
        self.scene.good(*home, &["vzctl", "start", id, "--wait"])?;
        self.put_part(*home, id)?;
        // An earlier VE may have had this address on the other node: switches and the client learn
        // where it is now when it says something.
        let ping = format!("ping -c 1 -W 1 {}", Host::Client.address());
        self.scene.wait("the network of a VE", 60, || {
            Ok(self.scene.run(*home, &["vzctl", "exec2", id, &ping])?.code == Some(0))
        })?;
        Ok(())
    }

    /// Copies the parts of a benchmark into a VE.
    fn put_part(&self, host: Host, ve: &str) -> Result<(), StageError> {
        let file = File::open(self.stripped.path()).map_err(system("open benchpart"))?;
        let copy = "cat > /usr/local/bin/benchpart && chmod 755 /usr/local/bin/benchpart";
        self.scene.run_with(host, &["vzctl", "exec2", ve, copy], file.into())?.good()?;
        Ok(())
    }

    /// Removes a VE from wherever it is.
    pub fn remove_ve(&self, ve: &Ve) -> Result<(), StageError> {
        for node in self.scene.running_on(ve.id)? {
            self.scene.good(node, &["vzctl", "stop", ve.id, "--fast"])?;
            self.scene.good(node, &["vzctl", "destroy", ve.id])?;
        }
        Ok(())
    }

    /// Starts a ballast in a VE and waits until it has taken on everything.
    pub fn start_ballast(&self, ve: &Ve, options: &str) -> Result<(), StageError> {
        let line = format!(
            "rm -f {READY}; ulimit -n 1000000; setsid benchpart ballast --ready {READY} {options} \
             </dev/null >/var/log/ballast.log 2>&1 &"
        );
        self.scene.inside(ve.home, ve.id, &line)?;
        let there = format!("test -e {READY}");
        self.scene.wait("the ballast", 60, || {
            Ok(self.scene.run(ve.home, &["vzctl", "exec2", ve.id, &there])?.code == Some(0))
        })?;
        Ok(())
    }

    /// Ends the ballast of a VE, if there is one.
    pub fn end_ballast(&self, ve: &Ve) -> Result<(), StageError> {
        self.scene.inside(ve.home, ve.id, "pkill -KILL -x benchpart; true")?;
        self.scene.wait("the end of the ballast", 30, || {
            let ran = self.scene.run(ve.home, &["vzctl", "exec2", ve.id, "pgrep -x benchpart"])?;
            Ok(ran.stdout.trim().is_empty())
        })?;
        Ok(())
    }

    /// Starts a part of ours on the client host that reports at marks.
    pub fn start_client(&self, arguments: &[String]) -> Result<RemoteLoad, StageError> {
        let mut command = Command::new(&self.part);
        command.args(arguments).stdin(Stdio::piped()).stdout(Stdio::piped());
        Ok(RemoteLoad::new(self.scene.testbed.spawn(&Host::Client, &mut command)?)?)
    }

    /// Moves a VE to the other node.
    pub fn migrate(&self, ve: &mut Ve, options: &[&str]) -> Result<Moved, StageError> {
        let target = if ve.home == Host::Node(1) { Host::Node(2) } else { Host::Node(1) };
        let logs = self.scene.testbed.nodes().into_iter().map(|node| self.scene.testbed.log(&node));
        let mark = LogMark::set(logs);
        let name = target.to_string();
        let words = [&["vzmigrate", "--online", "--json"], options, &[&name, ve.id]].concat();
        let said = self.scene.good(ve.home, &words)?;
        let line = said.lines().last().unwrap_or_default();
        let report = serde_json::from_str(line).map_err(|_| StageError::Said {
            program: "vzmigrate".to_owned(),
            said: line.to_owned(),
        })?;
        ve.home = target;
        let text = mark.text().map_err(system("read the logs of the nodes"))?;
        Ok(Moved { report, laps: laps::parse(&text) })
    }

    /// Retransmission timeouts that the VE itself has counted in its present network namespace,
    /// which a move makes anew.
    pub fn timeouts_inside(&self, ve: &Ve) -> Result<i64, StageError> {
        let text = self.scene.inside(ve.home, ve.id, "cat /proc/net/netstat")?;
        Ok(counter(&text, "TcpExt:", "TCPTimeouts").unwrap_or(0))
    }

    /// The daemon of a node.
    pub fn daemon(&self, node: Host) -> Option<i32> {
        let name = node.to_string();
        self.scene.testbed.status().into_iter().find(|status| status.host == name)?.daemon
    }

    /// What the VEs of a node use of its memory together.
    pub fn memory_of_ves(&self, node: Host) -> Option<u64> {
        let below = format!("ferry-testbed-{}/{node}/ve", self.scene.name());
        let found = Hierarchies::find().ok()?;
        let legacy = found.legacy.iter().find(|(controller, _)| *controller == Controller::Memory);
        let path = match legacy {
            Some((_, top)) => top.join(below).join("memory.usage_in_bytes"),
            None => found.unified.join(below).join("memory.current"),
        };
        std::fs::read_to_string(path).ok()?.trim().parse().ok()
    }

    /// Sends so many MiB, or makes so many round trips, from the second node to the first.
    /// What both ends found: the sender, then the receiver.
    pub fn transfer(&self, way: Way, count: u64) -> Result<(Transferred, Transferred), StageError> {
        let folder = tempfile::tempdir().map_err(system("make a folder"))?;
        wire::issue(folder.path())?;
        let (receiver, sender) = (Host::Node(1), Host::Node(2));
        let place = format!("{}:7800", receiver.address());
        let folder = folder.path().display().to_string();
        let way = clap::ValueEnum::to_possible_value(&way).expect("each way has a name");
        let way = way.get_name();
        let mut receiving = self.start_part(receiver, &["receive", way, &place, &folder])?;
        let mut output = BufReader::new(receiving.stdout.take().expect("it is piped"));
        let mut line = String::new();
        output.read_line(&mut line).map_err(system("hear the receiver"))?;
        let count = count.to_string();
        let sending = self.start_part(sender, &["send", way, &place, &count, &folder])?;
        let sent = sending.wait_with_output().map_err(system("wait for the sender"))?;
        let mut said = String::new();
        output.read_to_string(&mut said).map_err(system("hear the receiver"))?;
        receiving.wait().map_err(system("wait for the receiver"))?;
        Ok((heard(&String::from_utf8_lossy(&sent.stdout))?, heard(&said)?))
    }

    fn start_part(&self, host: Host, words: &[&str]) -> Result<Child, StageError> {
        let program = self.part.display().to_string();
        Ok(self.scene.start(host, &[&[program.as_str()], words].concat(), Stdio::null())?)
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        // The scene goes now, and another may have its name afterwards.
        self.guard.watch(None);
    }
}

/// A copy of a program without its symbols.
fn strip(program: &Path) -> Result<NamedTempFile, StageError> {
    let copy = NamedTempFile::new().map_err(system("make a file"))?;
    let mut command = Command::new("strip");
    command.arg("-o").arg(copy.path()).arg(program).stdin(Stdio::null());
    let status = command.status().map_err(system("run strip"))?;
    if status.success() {
        return Ok(copy);
    }
    Err(StageError::Said { program: "strip".to_owned(), said: status.to_string() })
}

/// A counter in a file where each line of names is followed by one of numbers.
fn counter(text: &str, group: &str, name: &str) -> Option<i64> {
    let mut lines = text.lines().filter_map(|line| line.strip_prefix(group));
    let (names, values) = (lines.next()?, lines.next()?);
    let place = names.split_whitespace().position(|word| word == name)?;
    values.split_whitespace().nth(place)?.parse().ok()
}

fn heard(said: &str) -> Result<Transferred, StageError> {
    serde_json::from_str(said.trim())
        .map_err(|_| StageError::Said { program: "benchpart".to_owned(), said: said.to_owned() })
}

/// A VE of a benchmark.
#[derive(Clone, Debug)]
pub struct Ve {
    /// Its number.
    pub id: &'static str,
    /// Its address.
    pub address: &'static str,
    /// What it is made from.
    pub template: &'static str,
    /// Its limit of memory.
    pub memory_mib: u64,
    /// Where it is.
    pub home: Host,
}

impl Ve {
    /// One that is to be made on the first node.
    pub fn new(template: &'static str, memory_mib: u64) -> Self {
        Self { id: "101", address: "10.77.1.1", template, memory_mib, home: Host::Node(1) }
    }
}
