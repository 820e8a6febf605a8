//! A cluster on one machine.
//!
//! Hosts are network namespaces joined by a bridge in a namespace of its own, the LAN:
//!
//! ```text
//!   node1            node2            client
//!   vzbr0 .255.1     vzbr0 .255.2     eth0 .255.250
//!     │ uplink         │ uplink         │
//!     └────────┬───────┴────────────────┘
//!             LAN  10.77.0.0/16
//! ```
//!
//! On each node runs the real `vzd`, with its state below the testbed's directory and its VEs in
//! cgroups of the testbed's own. VEs take any other address of the LAN and are reached directly.
//! Several testbeds, each with a name, stand side by side: their LANs do not touch.
//!
//! Everything that a testbed makes is found again by its name, so [`Testbed::remove`] leaves
//! nothing behind even when every process of it was killed half way.

use std::{
    collections::BTreeMap,
    ffi::OsStr,
    io,
    net::{SocketAddr, TcpStream},
    path::{Path, PathBuf},
    process::{Child, Command},
    time::Duration,
};

use node::network::NetworkError;

use self::{daemon::Daemon, names::Layout, state::State};
pub use self::{names::Host, rate::Rate, small::Share, state::NodeStatus};

mod cgroups;
mod cluster;
mod daemon;
mod lan;
mod names;
mod rate;
mod remove;
mod small;
mod state;

/// The directory that holds the testbeds when none is given.
pub const DEFAULT_DIRECTORY: &str = "/var/tmp/ferry-testbed";
/// Where templates are kept for all testbeds, so that they are built once.
pub const DEFAULT_TEMPLATES: &str = "/var/lib/vz/template";

/// Why something about a testbed could not be done.
#[derive(Debug, thiserror::Error)]
pub enum TestbedError {
    /// The name cannot be part of names of interfaces and cgroups.
    #[error("{name:?} is no name for a testbed: 1 to 12 letters and digits")]
    BadName {
        /// What was given.
        name: String,
    },
    /// Too few or too many nodes.
    #[error("a testbed has 1 to 64 nodes, not {nodes}")]
    BadNodeCount {
        /// What was asked for.
        nodes: usize,
    },
    /// It stands already.
    #[error("the testbed {name} is up already; take it down first")]
    AlreadyUp {
        /// Its name.
        name: String,
    },
    /// There is none of that name.
    #[error("there is no testbed {name}; bring it up first")]
    NotUp {
        /// Its name.
        name: String,
    },
    /// Another command is changing it.
    #[error("the testbed {name} is being changed by another command")]
    Busy {
        /// Its name.
        name: String,
    },
    /// There is no such host.
    #[error("the testbed has no host {name:?}; it has {hosts}")]
    UnknownHost {
        /// What was given.
        name: String,
        /// What there is.
        hosts: String,
    },
    /// The daemon runs or does not run.
    #[error("the daemon of {node} {state}")]
    DaemonState {
        /// The node.
        node: String,
        /// `is not running` or `is running already`.
        state: &'static str,
    },
    /// The daemon ended before it was ready.
    #[error(
        "the daemon of {node} ended with {status} before it was ready; its log ends with\n{log}"
    )]
    DaemonEnded {
        /// The node.
        node: String,
        /// How it ended.
        status: String,
        /// The end of its log.
        log: String,
    },
    /// The daemon did not get ready in time.
    #[error("the daemon of {node} is not ready after {seconds} s; see {log}")]
    NotReady {
        /// The node.
        node: String,
        /// How long it had.
        seconds: u64,
        /// Its log.
        log: PathBuf,
    },
    /// A program of the cluster failed.
    #[error("{command} on {node} failed with {status}: {output}")]
    Program {
        /// What was run.
        command: String,
        /// Where.
        node: String,
        /// How it ended.
        status: String,
        /// What it said.
        output: String,
    },
    /// A program is not where the testbed's own program is.
    #[error("there is no program {path}; build the workspace first")]
    NoProgram {
        /// Where it should be.
        path: PathBuf,
    },
    /// Something that belongs to the testbed does not go away.
    #[error("{what} {name} does not go away")]
    Stuck {
        /// `the cgroup`, `the process`.
        what: &'static str,
        /// Which.
        name: String,
    },
    /// A network request failed.
    #[error(transparent)]
    Network(#[from] NetworkError),
    /// A system call failed.
    #[error("cannot {what} {path}")]
    System {
        /// What was to be done.
        what: &'static str,
        /// To what.
        path: PathBuf,
        /// The kernel's answer.
        source: io::Error,
    },
}

impl From<node::network::NetlinkError> for TestbedError {
    fn from(error: node::network::NetlinkError) -> Self {
        Self::Network(error.into())
    }
}

/// Turns an `io::Error` into a [`TestbedError`] that says what was to be done to what.
fn system(what: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> TestbedError {
    let path = path.into();
    move |source| TestbedError::System { what, path, source }
}

/// How to bring a testbed up.
#[derive(Clone, Debug)]
pub struct Options {
    /// The name.
    pub name: String,
    /// The directory in which the testbed makes its own.
    pub directory: PathBuf,
    /// How many nodes.
    pub nodes: usize,
    /// Join the nodes into a cluster.
    pub cluster: bool,
    /// Where templates are kept.
    pub templates: PathBuf,
    /// Where `vzd` and the vz programs are.
    pub programs: PathBuf,
    /// The nodes whose VEs have only so much memory, in bytes.
    pub memory: BTreeMap<Host, u64>,
    /// The nodes whose state is on a disk of only so many bytes.
    pub disks: BTreeMap<Host, u64>,
}

impl Options {
    /// Three nodes in a cluster, with the programs that stand beside the running one (or, for a
    /// test, in the directory above).
    pub fn new(name: &str) -> io::Result<Self> {
        let program = std::env::current_exe()?;
        let mut programs = program.parent().unwrap_or(Path::new("/")).to_path_buf();
        if programs.ends_with("deps") {
            programs.pop();
        }
        Ok(Self {
            name: name.into(),
            directory: DEFAULT_DIRECTORY.into(),
            nodes: 3,
            cluster: true,
            templates: DEFAULT_TEMPLATES.into(),
            programs,
            memory: BTreeMap::new(),
            disks: BTreeMap::new(),
        })
    }

    /// Adds three characters to the name that stand for the directory of the programs: two
    /// checkouts then do not meet, and one checkout finds again what it left behind.
    pub fn name_by_checkout(&mut self) {
        let hash = blake3::hash(self.programs.as_os_str().as_encoded_bytes()).to_hex();
        self.name.push_str(&hash[..3]);
    }
}

/// Makes connections from a host of a testbed.
#[derive(Clone, Debug)]
pub struct Connector {
    layout: Layout,
    host: Host,
}

impl Connector {
    /// Connects to an address of the LAN.
    pub fn connect(&self, address: SocketAddr) -> io::Result<TcpStream> {
        let netns = self.layout.open_netns(&self.host).map_err(io::Error::other)?;
        netns.run(|| TcpStream::connect_timeout(&address, Duration::from_secs(20)))?
    }
}

/// A testbed that stands.
#[derive(Debug)]
pub struct Testbed {
    layout: Layout,
    state: State,
}

impl Testbed {
    /// Brings a testbed up. Whatever an earlier one of this name left behind is removed first.
    /// A testbed that cannot be brought up leaves nothing.
    pub fn up(options: &Options) -> Result<Self, TestbedError> {
        let layout = Layout::new(&options.directory, &options.name)?;
        if !(1..=64).contains(&options.nodes) {
            return Err(TestbedError::BadNodeCount { nodes: options.nodes });
        }
        let _lock = layout.lock()?;
        if State::load(&layout)?.is_some_and(|state| state.complete) {
            return Err(TestbedError::AlreadyUp { name: options.name.clone() });
        }
        remove::everything(&layout)?;
        Self::build(layout.clone(), options).inspect_err(|_| {
            // The first error is the one to tell.
            let _ = remove::everything(&layout);
        })
    }

    fn build(layout: Layout, options: &Options) -> Result<Self, TestbedError> {
        let mut state = State::new(options);
        layout.make_directories(&state)?;
        state.save(&layout)?;
        cgroups::make(&layout, &state)?;
        small::make(&layout, options)?;
        lan::build(&layout, &state)?;
        let mut starting = Vec::new();
        for node in state.nodes() {
            let started = Daemon::start(&layout, &state, &node)?;
            state.daemons.insert(node.to_string(), started.daemon.clone());
            state.save(&layout)?;
            starting.push(started);
        }
        starting.into_iter().try_for_each(daemon::Starting::wait)?;
        let testbed = Self { layout, state };
        if options.cluster {
            cluster::join(&testbed)?;
        }
        let Self { layout, mut state } = testbed;
        state.complete = true;
        state.save(&layout)?;
        Ok(Self { layout, state })
    }

    /// Finds a testbed that was brought up before, by whatever process.
    pub fn open(directory: &Path, name: &str) -> Result<Self, TestbedError> {
        let layout = Layout::new(directory, name)?;
        match State::load(&layout)? {
            Some(state) => Ok(Self { layout, state }),
            None => Err(TestbedError::NotUp { name: name.into() }),
        }
    }

    /// Removes all that a testbed of this name made: processes, VEs, namespaces, cgroups, mounts
    /// and files. That there is nothing is no error.
    pub fn remove(directory: &Path, name: &str) -> Result<(), TestbedError> {
        let layout = Layout::new(directory, name)?;
        let _lock = layout.lock()?;
        remove::everything(&layout)
    }

    /// The nodes and the client.
    pub fn hosts(&self) -> Vec<Host> {
        self.state.hosts()
    }

    /// The nodes.
    pub fn nodes(&self) -> Vec<Host> {
        self.state.nodes()
    }

    /// The host of that name.
    pub fn host(&self, name: &str) -> Result<Host, TestbedError> {
        self.hosts().into_iter().find(|host| host.to_string() == name).ok_or_else(|| {
            let hosts: Vec<_> = self.hosts().iter().map(ToString::to_string).collect();
            TestbedError::UnknownHost { name: name.into(), hosts: hosts.join(", ") }
        })
    }

    /// The address of a host.
    pub fn address(&self, host: &Host) -> std::net::Ipv4Addr {
        host.address()
    }

    /// The file to which a node's daemon logs.
    pub fn log(&self, node: &Host) -> PathBuf {
        self.layout.log(node)
    }

    /// The directory of a node: its configuration, state and log.
    pub fn node_directory(&self, node: &Host) -> PathBuf {
        self.layout.node(node)
    }

    /// Prepares a command to run on a host: the vz programs are on its PATH and talk to the
    /// daemon there.
    pub fn prepare(&self, host: &Host, command: &mut Command) {
        let path = std::env::var_os("PATH").unwrap_or_default();
        let mut places = vec![self.layout.programs()];
        places.extend(std::env::split_paths(&path));
        if let Ok(joined) = std::env::join_paths(places) {
            command.env("PATH", joined);
        }
        command.env("FERRY_HOST", host.to_string());
        match host {
            Host::Node(_) => command.env("VZD_SOCKET", self.layout.socket(host)),
            Host::Client => command.env_remove("VZD_SOCKET"),
        };
    }

    /// A command that runs on a host and goes away with the testbed, whatever it starts. Its
    /// process becomes the program, so its number, input, output and exit status are the
    /// program's.
    pub fn command(&self, host: &Host, program: impl AsRef<OsStr>) -> Command {
        // By way of the testbed program: it is inside before the program runs. A process that
        // was moved from outside could have children by then.
        let mut command = Command::new(self.state.programs.join("testbed"));
        command.args(["--name", self.layout.name()]).arg("--dir").arg(self.layout.base());
        match host {
            Host::Node(_) => command.args(["exec", &host.to_string()]),
            Host::Client => command.arg("client"),
        };
        command.arg("--").arg(program);
        command
    }

    /// Starts a command on a host, as [`Self::prepare`] makes it. It goes away with the testbed,
    /// but what it starts in its first moment may not: for a shell use [`Self::command`].
    pub fn spawn(&self, host: &Host, command: &mut Command) -> Result<Child, TestbedError> {
        self.prepare(host, command);
        let netns = self.layout.open_netns(host)?;
        let program = PathBuf::from(command.get_program());
        let child = netns
            .run(|| command.spawn())
            .map_err(system("enter the namespace of", host.to_string()))?
            .map_err(system("run", program))?;
        cgroups::adopt(&self.layout, child.id())?;
        Ok(child)
    }

    /// Makes connections from a host, for as long as the testbed stands.
    pub fn connector(&self, host: &Host) -> Connector {
        Connector { layout: self.layout.clone(), host: *host }
    }

    /// Moves the calling thread, which must be the only one of its process, into a host for
    /// good: what it executes then runs there.
    pub fn enter(&self, host: &Host) -> Result<(), TestbedError> {
        cgroups::adopt(&self.layout, std::process::id())?;
        let netns = self.layout.open_netns(host)?;
        nix::sched::setns(&netns, nix::sched::CloneFlags::CLONE_NEWNET)
            .map_err(|errno| system("enter the namespace of", host.to_string())(errno.into()))
    }

    /// Stops all traffic between two hosts, both ways, and no other.
    pub fn cut(&mut self, one: &Host, other: &Host) -> Result<(), TestbedError> {
        self.change(|layout, state| {
            state.add_cut(one, other);
            lan::apply_cuts(layout, state)
        })
    }

    /// Stops all traffic of a host.
    pub fn cut_all(&mut self, one: &Host) -> Result<(), TestbedError> {
        self.change(|layout, state| {
            for other in state.hosts().iter().filter(|other| *other != one) {
                state.add_cut(one, other);
            }
            lan::apply_cuts(layout, state)
        })
    }

    /// Undoes every cut.
    pub fn heal(&mut self) -> Result<(), TestbedError> {
        self.change(|layout, state| {
            state.cuts.clear();
            lan::apply_cuts(layout, state)
        })
    }

    /// Limits the link of a host in both directions; no rate lifts the limit.
    pub fn rate(&mut self, host: &Host, rate: Option<Rate>) -> Result<(), TestbedError> {
        self.change(|layout, state| {
            lan::limit(layout, host, rate)?;
            match rate {
                Some(rate) => state.rates.insert(host.to_string(), rate),
                None => state.rates.remove(&host.to_string()),
            };
            Ok(())
        })
    }

    /// Kills the daemon of a node, and nothing else, with SIGKILL.
    pub fn kill(&mut self, node: &Host) -> Result<(), TestbedError> {
        self.change(|_, state| {
            let daemon = state.daemons.remove(&node.to_string());
            let ended =
                TestbedError::DaemonState { node: node.to_string(), state: "is not running" };
            let daemon = daemon.filter(Daemon::is_running).ok_or(ended)?;
            daemon.kill(node)
        })
    }

    /// Starts the daemon of a node again and waits until it is ready.
    pub fn start(&mut self, node: &Host) -> Result<(), TestbedError> {
        self.change(|layout, state| {
            if state.daemons.get(&node.to_string()).is_some_and(Daemon::is_running) {
                let state = "is running already";
                return Err(TestbedError::DaemonState { node: node.to_string(), state });
            }
            let started = Daemon::start(layout, state, node)?;
            state.daemons.insert(node.to_string(), started.daemon.clone());
            started.wait()
        })
    }

    /// How each node is.
    pub fn status(&self) -> Vec<NodeStatus> {
        self.state.status(&self.layout)
    }

    /// Runs a change under the lock, on the state as it is now, and keeps the result even when
    /// the change fails half way: it is closer to the truth.
    fn change(
        &mut self,
        change: impl FnOnce(&Layout, &mut State) -> Result<(), TestbedError>,
    ) -> Result<(), TestbedError> {
        let _lock = self.layout.lock()?;
        self.state = State::load(&self.layout)?
            .ok_or_else(|| TestbedError::NotUp { name: self.layout.name().into() })?;
        let result = change(&self.layout, &mut self.state);
        self.state.save(&self.layout)?;
        result
    }
}

/// A testbed of a test: removed when it is dropped.
#[derive(Debug)]
pub struct TemporaryTestbed(Testbed);

impl TemporaryTestbed {
    /// As [`Testbed::up`].
    pub fn up(options: &Options) -> Result<Self, TestbedError> {
        Ok(Self(Testbed::up(options)?))
    }
}

impl std::ops::Deref for TemporaryTestbed {
    type Target = Testbed;

    fn deref(&self) -> &Testbed {
        &self.0
    }
}

impl std::ops::DerefMut for TemporaryTestbed {
    fn deref_mut(&mut self) -> &mut Testbed {
        &mut self.0
    }
}

impl Drop for TemporaryTestbed {
    fn drop(&mut self) {
        let result = self.0.layout.lock().and_then(|_lock| remove::everything(&self.0.layout));
        if let Err(error) = result {
            // A test that is failing already must be able to say why.
            if !std::thread::panicking() {
                panic!("{}", crate::chain(&error));
            }
        }
    }
}
