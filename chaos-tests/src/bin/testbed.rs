//! `testbed`: a cluster on one machine, by hand.

use std::{
    error::Error,
    ffi::OsString,
    io::Write,
    os::unix::process::CommandExt,
    path::PathBuf,
    process::{Command, ExitCode},
};

use chaos_tests::testbed::{
    DEFAULT_DIRECTORY, DEFAULT_TEMPLATES, Host, NodeStatus, Options, Rate, Share, Testbed,
};
use clap::{Args, Parser, Subcommand};

/// A cluster of Ferry nodes on this machine: hosts are network namespaces on one LAN.
///
/// The LAN is 10.77.0.0/16. Nodes are 10.77.255.1, .2 and so on, the client is 10.77.255.250, and
/// a VE may take any other address outside 10.77.255.0/24. Needs root.
#[derive(Parser)]
#[command(name = "testbed", after_help = EXAMPLE)]
struct Arguments {
    /// Which testbed: several can stand side by side.
    #[arg(long, global = true, default_value = "default")]
    name: String,
    /// Where testbeds keep their state.
    #[arg(long = "dir", global = true, default_value = DEFAULT_DIRECTORY)]
    directory: PathBuf,
    #[command(subcommand)]
    verb: Verb,
}

const EXAMPLE: &str = "Example:
  testbed up --nodes 3
  testbed exec node1 -- vzctl create 101 --ostemplate debian-12-minimal --ipadd 10.77.1.1/16
  testbed exec node1 -- vzctl start 101
  testbed client -- ping -c 3 10.77.1.1
  testbed exec node1 -- vzmigrate --online node2 101
  testbed down";

#[derive(Subcommand)]
enum Verb {
    /// Build the LAN, start a daemon on each node, and join them into a cluster.
    Up(Up),
    /// Run a command on a node; the vz programs there talk to its daemon.
    Exec {
        /// `node1`, `node2` ...
        node: String,
        /// The command and its arguments.
        #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true)]
        command: Vec<OsString>,
    },
    /// Run a command on the client, a host on the LAN that is no node.
    Client {
        /// The command and its arguments.
        #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true)]
        command: Vec<OsString>,
    },
    /// Stop all traffic between two hosts, both ways; `all` for the second means every other.
    Cut {
        /// A node or `client`.
        one: String,
        /// A node, `client` or `all`.
        other: String,
    },
    /// Undo every cut.
    Heal,
    /// Limit the link of a host in both directions.
    Rate {
        /// A node or `client`.
        host: String,
        /// For example 100mbit, or `off`.
        rate: String,
    },
    /// Kill the daemon of a node, and nothing else, with SIGKILL.
    Kill {
        /// The node.
        node: String,
    },
    /// Start the daemon of a node again.
    Start {
        /// The node.
        node: String,
    },
    /// Show the hosts.
    Status {
        /// As JSON.
        #[arg(long)]
        json: bool,
    },
    /// Show the log of a node's daemon.
    Logs {
        /// The node.
        node: String,
    },
    /// Remove everything: daemons, VEs, namespaces, cgroups, mounts and files.
    Down,
}

#[derive(Args)]
struct Up {
    /// How many nodes.
    #[arg(long, default_value_t = 3)]
    nodes: usize,
    /// Leave every node alone, a cluster of one.
    #[arg(long)]
    no_cluster: bool,
    /// Where templates are kept, shared by all nodes and testbeds.
    #[arg(long, default_value = DEFAULT_TEMPLATES)]
    templates: PathBuf,
    /// Where vzd and the vz programs are [default: beside this program].
    #[arg(long)]
    programs: Option<PathBuf>,
    /// Give the VEs of a node only so much memory; may be repeated.
    #[arg(long, value_name = "NODE=SIZE")]
    memory: Vec<Share>,
    /// Give a node a disk of its own of this size; may be repeated.
    #[arg(long, value_name = "NODE=SIZE")]
    disk: Vec<Share>,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    match run(arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("testbed: {}", chaos_tests::chain(&*error));
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: Arguments) -> Result<(), Box<dyn Error>> {
    let Arguments { name, directory, verb } = arguments;
    let open = || Testbed::open(&directory, &name);
    match verb {
        Verb::Up(up) => {
            let mut options = Options::new(&name)?;
            options.directory = directory;
            options.nodes = up.nodes;
            options.cluster = !up.no_cluster;
            options.templates = up.templates;
            options.programs = up.programs.unwrap_or(options.programs);
            options.memory = up.memory.into_iter().map(|it| (it.node, it.bytes)).collect();
            options.disks = up.disk.into_iter().map(|it| (it.node, it.bytes)).collect();
            let testbed = Testbed::up(&options)?;
            print(&summary(&name, &options, &testbed))?;
        }
        Verb::Exec { node, command } => {
            let testbed = open()?;
            let host = node_of(&testbed, &node)?;
            return Err(execute(&testbed, &host, &command));
        }
        Verb::Client { command } => return Err(execute(&open()?, &Host::Client, &command)),
        Verb::Cut { one, other } => {
            let mut testbed = open()?;
            let one = testbed.host(&one)?;
            if other == "all" {
                testbed.cut_all(&one)?;
            } else {
                let other = testbed.host(&other)?;
                if one == other {
                    return Err("a host cannot be cut off from itself".into());
                }
                testbed.cut(&one, &other)?;
            }
        }
        Verb::Heal => open()?.heal()?,
        Verb::Rate { host, rate } => {
            let mut testbed = open()?;
            let host = testbed.host(&host)?;
            let rate = if rate == "off" { None } else { Some(rate.parse::<Rate>()?) };
            testbed.rate(&host, rate)?;
        }
        Verb::Kill { node } => {
            let mut testbed = open()?;
            let node = node_of(&testbed, &node)?;
            testbed.kill(&node)?;
        }
        Verb::Start { node } => {
            let mut testbed = open()?;
            let node = node_of(&testbed, &node)?;
            testbed.start(&node)?;
        }
        Verb::Status { json } => print(&table(&open()?.status(), json)?)?,
        Verb::Logs { node } => {
            let testbed = open()?;
            let log = testbed.log(&node_of(&testbed, &node)?);
            print(&std::fs::read_to_string(log)?)?;
        }
        Verb::Down => Testbed::remove(&directory, &name)?,
    }
    Ok(())
}

fn node_of(testbed: &Testbed, name: &str) -> Result<Host, Box<dyn Error>> {
    match testbed.host(name)? {
        Host::Client => Err("the client is no node; use `testbed client -- COMMAND`".into()),
        node => Ok(node),
    }
}

/// Becomes the command, so that its input, output, signals and exit status are its own.
fn execute(testbed: &Testbed, host: &Host, command: &[OsString]) -> Box<dyn Error> {
    let (program, arguments) = command.split_first().expect("clap requires one");
    let mut command = Command::new(program);
    command.args(arguments);
    testbed.prepare(host, &mut command);
    if let Err(error) = testbed.enter(host) {
        return error.into();
    }
    let error = command.exec();
    format!("cannot run {}: {error}", program.display()).into()
}

fn summary(name: &str, options: &Options, testbed: &Testbed) -> String {
    let nodes = testbed.nodes();
    let kind = match (options.cluster, nodes.len()) {
        (true, 1) => "a cluster of one node",
        (true, _) => "one cluster",
        (false, _) => "no cluster",
    };
    let mut text = format!("testbed {name} is up: {} nodes, {kind}\n", nodes.len());
    for host in testbed.hosts() {
        text += &format!("  {host:<8}{}\n", host.address());
    }
    let option = if name == "default" { String::new() } else { format!(" --name {name}") };
    text + &format!("try: testbed{option} exec node1 -- vzcluster status\n")
}

fn table(status: &[NodeStatus], json: bool) -> Result<String, serde_json::Error> {
    if json {
        return Ok(serde_json::to_string_pretty(status)? + "\n");
    }
    let mut text =
        String::from("HOST     ADDRESS         DAEMON         RATE       CUT OFF FROM\n");
    for host in status {
        let daemon = match (&host.log, host.daemon) {
            (None, _) => "-".into(),
            (Some(_), Some(pid)) => format!("pid {pid}"),
            (Some(_), None) => "not running".into(),
        };
        let rate = host.rate.map_or("full".into(), |rate| rate.to_string());
        let cut = if host.cut_from.is_empty() { "-".into() } else { host.cut_from.join(" ") };
        let (name, address) = (&host.host, host.address.to_string());
        text += &format!("{name:<8} {address:<15} {daemon:<14} {rate:<10} {cut}\n");
    }
    Ok(text)
}

/// Prints; that nobody reads it is no error.
fn print(text: &str) -> std::io::Result<()> {
    match std::io::stdout().write_all(text.as_bytes()) {
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => Ok(()),
        result => result,
    }
}
