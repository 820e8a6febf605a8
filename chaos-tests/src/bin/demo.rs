//! A redis with live clients goes round a cluster, on one machine.
//!
//! It brings up a testbed, makes a Virtual Environment with a redis server from the Debian
//! template, fills it, lets clients write, read and check all the time, and moves it from node to
//! node. For each move it prints what `vzmigrate` says and what the clients measured. The exit
//! status is 0 only if no request failed and no answer was wrong. The testbed is taken down in
//! every case, also after Ctrl-C.

use std::io::{IsTerminal, Read, Write};
use std::path::PathBuf;
use std::process::{Child, Command, ExitCode, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use chaos_tests::client::remote::{RemoteError, RemoteLoad};
use chaos_tests::client::report::Report;
use chaos_tests::testbed::{Host, Options, Testbed, TestbedError};
use chaos_tests::workload::supervisor::blocked_signals;
use clap::Parser;

/// A redis with live clients goes round a cluster on this machine.
#[derive(Debug, Parser)]
struct Arguments {
    /// Nodes of the cluster.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u8).range(2..=16))]
    nodes: u8,
    /// Moves, each to the next node [default: once round the cluster].
    #[arg(long)]
    moves: Option<u32>,
    /// Size of the dataset in MiB.
    #[arg(long, default_value_t = 256)]
    mib: u64,
    /// Client connections.
    #[arg(long, default_value_t = 8)]
    connections: u32,
    /// Requests per second on each connection.
    #[arg(long, default_value_t = 250)]
    rate: u32,
    /// Name of the testbed.
    #[arg(long, default_value = "demo")]
    name: String,
    /// Leave the testbed up at the end.
    #[arg(long)]
    keep: bool,
    /// Draw what the clients measured into this file, too.
    #[arg(long)]
    svg: Option<PathBuf>,
}

/// Why the demo could not be shown to its end.
#[derive(Debug, thiserror::Error)]
enum DemoError {
    #[error("interrupted")]
    Interrupted,
    #[error("the testbed failed")]
    Testbed(#[from] TestbedError),
    #[error("the clients failed")]
    Client(#[from] RemoteError),
    #[error("cannot {what}")]
    Call {
        what: &'static str,
        #[source]
        source: std::io::Error,
    },
    #[error("{command} on {host} ended with {status}")]
    Command { command: String, host: Host, status: std::process::ExitStatus },
    #[error("redis does not answer in the VE")]
    NoRedis,
}

const VE: &str = "101";
const ADDRESS: &str = "10.77.1.1";

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let interrupted = Arc::new(AtomicBool::new(false));
    match blocked_signals() {
        Ok(signals) => {
            let flag = Arc::clone(&interrupted);
            std::thread::spawn(move || {
                if signals.read_signal().is_ok() {
                    flag.store(true, Ordering::SeqCst);
                }
            });
        }
        Err(error) => {
            eprintln!("demo: cannot watch for signals: {error}");
            return ExitCode::from(2);
        }
    }
    match Demo::run(&arguments, interrupted) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("demo: {}", chaos_tests::chain(&error));
            // As the shell reports a program that SIGINT has ended.
            ExitCode::from(if matches!(error, DemoError::Interrupted) { 130 } else { 2 })
        }
    }
}

struct Demo<'a> {
    arguments: &'a Arguments,
    interrupted: Arc<AtomicBool>,
    testbed: Testbed,
    nodes: Vec<Host>,
}

/// Takes a testbed down when the demo ends, however it ends.
struct Removal {
    options: Options,
    keep: bool,
}

impl Drop for Removal {
    fn drop(&mut self) {
        if self.keep {
            eprintln!(
                "the testbed {} stays up; `testbed --name {0} down` removes it",
                self.options.name
            );
        } else if let Err(error) = Testbed::remove(&self.options.directory, &self.options.name) {
            eprintln!("demo: the testbed cannot be taken down: {}", chaos_tests::chain(&error));
        }
    }
}

impl<'a> Demo<'a> {
    fn run(arguments: &'a Arguments, interrupted: Arc<AtomicBool>) -> Result<bool, DemoError> {
        heading("Ferry: a redis with live clients goes round a cluster on this machine");
        let mut options = Options::new(&arguments.name)
            .map_err(|source| DemoError::Call { what: "find the programs", source })?;
        options.nodes = arguments.nodes.into();
        let removal = Removal { options, keep: arguments.keep };
        let started = Instant::now();
        let testbed = Testbed::up(&removal.options)?;
        let nodes = testbed.nodes();
        let names: Vec<String> = nodes.iter().map(Host::to_string).collect();
        step(started, &format!("cluster of {} and a client host", names.join(" ")));
        let demo = Self { arguments, interrupted, testbed, nodes };
        demo.make_ve()?;
        let clean = demo.go_round()?;
        drop(removal);
        Ok(clean)
    }

    /// Makes, starts and prepares the VE on the first node.
    fn make_ve(&self) -> Result<(), DemoError> {
        let home = &self.nodes[0];
        let memory = format!("{}M", 512 + 2 * self.arguments.mib);
        let address = format!("{ADDRESS}/16");
        let started = Instant::now();
        self.vz(
            home,
            &[
                "vzctl",
                "create",
                VE,
                "--ostemplate",
                "debian-12-minimal",
                "--ipadd",
                &address,
                "--hostname",
                "shop",
                "--ram",
                &memory,
            ],
        )?;
        step(started, &format!("VE {VE} from debian-12-minimal on {home}"));
        let started = Instant::now();
        self.vz(home, &["vzctl", "start", VE])?;
        self.wait_for_redis(home)?;
        // One word each: the VE's shell takes the line apart.
        for setting in ["protected-mode no", "save ''", "bind '* -::*'"] {
            let line = format!("redis-cli config set {setting}");
            self.vz(home, &["vzctl", "exec2", VE, &line])?;
        }
        step(started, &format!("started; its redis listens on {ADDRESS}"));
        Ok(())
    }

    fn wait_for_redis(&self, home: &Host) -> Result<(), DemoError> {
        let deadline = Instant::now() + Duration::from_secs(60);
        while Instant::now() < deadline {
            let mut ping = Command::new("vzctl");
            ping.args(["exec2", VE, "redis-cli", "ping"]).stderr(Stdio::null());
            if self.output(home, &mut ping).is_ok_and(|said| said.contains("PONG")) {
                return Ok(());
            }
            self.pause(Duration::from_millis(200))?;
        }
        Err(DemoError::NoRedis)
    }

    /// Starts the clients, moves the VE, and reports.
    fn go_round(&self) -> Result<bool, DemoError> {
        let started = Instant::now();
        let mut load = self.start_clients()?;
        load.mark("start")?;
        let Arguments { mib, connections, rate, .. } = self.arguments;
        step(started, &format!("filled {mib} MiB; {connections} clients, {rate} requests/s each"));
        self.pause(Duration::from_secs(2))?;
        let quiet = load.mark("quiet")?;
        say("without a move", &clients_line(&quiet));
        let count = self.nodes.len();
        let moves = self.arguments.moves.unwrap_or(u32::try_from(count).unwrap_or(u32::MAX));
        let mut clean = quiet.is_clean();
        let mut stalls = Vec::new();
        for (source, target) in
            self.nodes.iter().cycle().zip(self.nodes.iter().cycle().skip(1)).take(moves as usize)
        {
            println!();
            heading(&format!("{source} → {target}"));
            let said = self.vz(source, &["vzmigrate", "--online", &target.to_string(), VE])?;
            say("vzmigrate", said.trim_end().lines().last().unwrap_or_default());
            self.pause(Duration::from_secs(1))?;
            let report = load.mark(&target.to_string())?;
            say("clients", &clients_line(&report));
            clean &= report.is_clean();
            stalls.push(report.longest_stall_ms);
            if !report.is_clean() {
                report.complaints.iter().take(5).for_each(|what| say("", what));
            }
        }
        println!();
        let verified = load.verify()?;
        say(
            "dataset",
            &format!("{} keys read back, {} wrong", verified.verified_keys, verified.wrong),
        );
        let (whole, status) = load.stop()?;
        say("all in all", &clients_line(&whole));
        stalls.sort_by(f64::total_cmp);
        if let Some(median) = stalls.get(stalls.len() / 2) {
            let worst = stalls.last().unwrap_or(median);
            say(
                "stalls",
                &format!("median {median:.1} ms, longest {worst:.1} ms, of {moves} moves"),
            );
        }
        Ok(clean && verified.wrong == 0 && whole.is_clean() && status.success())
    }

    fn start_clients(&self) -> Result<RemoteLoad, DemoError> {
        let program = std::env::current_exe()
            .map_err(|source| DemoError::Call { what: "find the programs", source })?
            .with_file_name("loadclient");
        let mut command = Command::new(program);
        command.arg("--address").arg(format!("{ADDRESS}:6379"));
        command.arg("--connections").arg(self.arguments.connections.to_string());
        command.arg("--rate").arg(self.arguments.rate.to_string());
        command.arg("--fill-mib").arg(self.arguments.mib.to_string()).arg("--plot");
        if let Some(svg) = &self.arguments.svg {
            command.arg("--svg").arg(svg);
        }
        RemoteLoad::prepare(&mut command);
        Ok(RemoteLoad::new(self.testbed.spawn(&Host::Client, &mut command)?)?)
    }

    /// Runs one of the vz programs on a node and returns what it printed.
    fn vz(&self, host: &Host, words: &[&str]) -> Result<String, DemoError> {
        let (program, rest) = words.split_first().unwrap_or((&"true", &[]));
        let mut command = Command::new(program);
        command.args(rest);
        self.output(host, &mut command)
    }

    fn output(&self, host: &Host, command: &mut Command) -> Result<String, DemoError> {
        command.stdin(Stdio::null()).stdout(Stdio::piped());
        let mut child = self.testbed.spawn(host, command)?;
        let stdout = child.stdout.take();
        let reader = std::thread::spawn(move || {
            let mut text = String::new();
            // What cannot be read is only missing in what is shown.
            let _ = stdout.map(|mut stdout| stdout.read_to_string(&mut text));
            text
        });
        let status = self.wait(&mut child)?;
        let text = reader.join().unwrap_or_default();
        if status.success() {
            return Ok(text);
        }
        let words: Vec<_> = std::iter::once(command.get_program())
            .chain(command.get_args())
            .map(|word| word.to_string_lossy().into_owned())
            .collect();
        Err(DemoError::Command { command: words.join(" "), host: *host, status })
    }

    /// Waits for a child; ends it when the demo is interrupted.
    fn wait(&self, child: &mut Child) -> Result<std::process::ExitStatus, DemoError> {
        loop {
            let ended = child
                .try_wait()
                .map_err(|source| DemoError::Call { what: "wait for a command", source })?;
            if let Some(status) = ended {
                return if self.is_interrupted() {
                    Err(DemoError::Interrupted)
                } else {
                    Ok(status)
                };
            }
            if self.is_interrupted() {
                // It may have ended meanwhile.
                let _ = child.kill();
                let _ = child.wait();
                return Err(DemoError::Interrupted);
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    fn pause(&self, time: Duration) -> Result<(), DemoError> {
        let end = Instant::now() + time;
        while Instant::now() < end {
            if self.is_interrupted() {
                return Err(DemoError::Interrupted);
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    }

    fn is_interrupted(&self) -> bool {
        self.interrupted.load(Ordering::SeqCst)
    }
}

/// What clients measured, in one line.
fn clients_line(report: &Report) -> String {
    let count = |name: &str| report.counters.get(name).copied().unwrap_or(0);
    format!(
        "{} requests, {} errors, {} wrong answers, {} lost connections; longest stall {:.1} ms, \
         half within {:.2} ms; {} retransmission timeouts",
        report.requests,
        report.errors,
        report.wrong_answers,
        report.lost_connections,
        report.longest_stall_ms,
        report.latency_us.p50 as f64 / 1e3,
        count("TCPTimeouts"),
    )
}

fn colour(code: &str, text: &str) -> String {
    let plain = !std::io::stdout().is_terminal() || std::env::var_os("NO_COLOR").is_some();
    if plain { text.to_owned() } else { format!("\x1b[{code}m{text}\x1b[0m") }
}

fn heading(text: &str) {
    println!("{}", colour("1;36", &format!("── {text} ──")));
    // Progress is no reason to stop.
    let _ = std::io::stdout().flush();
}

fn step(started: Instant, text: &str) {
    println!("{:>8.1} s  {text}", started.elapsed().as_secs_f64());
}

fn say(who: &str, text: &str) {
    println!("{} {text}", colour("1", &format!("{who:>14}")));
}
