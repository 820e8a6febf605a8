//! Runs workloads that check themselves. Inside a Virtual Environment that is moved meanwhile, it
//! proves that nothing was lost.
//!
//! `selfcheck run --seconds 10` runs all for a while and prints the verdicts. `selfcheck run
//! --detach` leaves them running, `selfcheck status` looks at them, and `selfcheck verify` ends
//! them and prints the verdicts. `selfcheck peer` is the companion on another host. The exit
//! status is 0 only if nothing was wrong.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, Write};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use chaos_tests::workload::context::Context;
use chaos_tests::workload::outcome::Failure;
use chaos_tests::workload::supervisor::{Plan, Supervisor, Verdict, blocked_signals, read_checks};
use chaos_tests::workload::{AREAS, Workload, all, find, listing, named, peer};
use clap::{Args, Parser, Subcommand};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// Workloads that check themselves.
#[derive(Debug, Parser)]
struct Arguments {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Start workloads.
    Run(Run),
    /// Look at detached workloads: exit status 1 if one has failed or stands still.
    Status(Place),
    /// End detached workloads and print the verdicts.
    Verify(Place),
    /// List the workloads.
    List {
        /// Renew the list in this page of the documentation instead.
        #[arg(long, value_name = "FILE")]
        docs: Option<PathBuf>,
    },
    /// Be the host that workloads talk to.
    Peer {
        /// Address and port to listen on, for TCP and UDP.
        #[arg(long)]
        listen: SocketAddr,
    },
    /// One workload, as `run` starts it.
    #[command(hide = true)]
    Workload(One),
}

#[derive(Debug, Args)]
struct Place {
    /// The folder of the run.
    #[arg(long, default_value = "/var/tmp/selfcheck")]
    dir: PathBuf,
}

#[derive(Debug, Args)]
struct Run {
    #[command(flatten)]
    place: Place,
    /// Only these workloads.
    #[arg(long, value_delimiter = ',')]
    only: Vec<String>,
    /// Not these.
    #[arg(long, value_delimiter = ',')]
    skip: Vec<String>,
    /// Address and port of `selfcheck peer`; without it the workloads that need it are left out.
    #[arg(long)]
    peer: Option<SocketAddr>,
    /// Damage what these workloads hold; their own checks must notice.
    #[arg(long, value_delimiter = ',')]
    plant: Vec<String>,
    /// End after so many seconds.
    #[arg(long)]
    seconds: Option<u64>,
    /// Return as soon as all run; end them with `verify`.
    #[arg(long, conflicts_with = "seconds")]
    detach: bool,
    /// Run in a session of its own; what `--detach` starts does.
    #[arg(long, hide = true)]
    own_session: bool,
}

#[derive(Debug, Args)]
struct One {
    name: String,
    #[arg(long)]
    dir: PathBuf,
    #[arg(long)]
    peer: Option<SocketAddr>,
    #[arg(long)]
    plant: bool,
}

/// Why nothing could be said about the workloads.
#[derive(Debug, thiserror::Error)]
enum SelfcheckError {
    #[error("no workload is called {name}; see selfcheck list")]
    Unknown { name: String },
    #[error("nothing runs in {}", folder.display())]
    NotRunning { folder: PathBuf },
    #[error("the workloads did not start: {said}")]
    NotStarted { said: String },
    #[error("a call failed")]
    Call(#[from] io::Error),
    #[error("a call failed")]
    Nix(#[from] nix::Error),
    #[error("{} has no list of workloads", page.display())]
    NoList { page: PathBuf },
    #[error("the verdicts are missing")]
    NoVerdicts,
}

fn main() -> ExitCode {
    let result = match Arguments::parse().verb {
        Verb::Run(run) if run.detach => detach(&run),
        Verb::Run(run) => run_here(&run),
        Verb::Status(place) => status(&place.dir),
        Verb::Verify(place) => verify(&place.dir),
        Verb::List { docs: Some(page) } => renew(&page),
        Verb::List { docs: None } => {
            for area in AREAS {
                println!("{}:", area.name);
                for workload in area.workloads {
                    println!("  {:<14} {}", workload.name, workload.about);
                }
            }
            Ok(true)
        }
        Verb::Peer { listen } => peer::serve(listen).map_err(SelfcheckError::Call),
        Verb::Workload(one) => Ok(run_one(&one)),
    };
    match result {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("selfcheck: {}", chaos_tests::chain(&error));
            ExitCode::from(2)
        }
    }
}

/// Renews the list of workloads in a page.
fn renew(page: &Path) -> Result<bool, SelfcheckError> {
    let text = fs::read_to_string(page)?;
    let no_list = || SelfcheckError::NoList { page: page.to_path_buf() };
    fs::write(page, listing::refreshed(&text).ok_or_else(no_list)?)?;
    Ok(true)
}

fn run_one(one: &One) -> bool {
    let run = || -> Result<(), Failure> {
        let workload = find(&one.name).ok_or_else(|| Failure::new("no such workload"))?;
        let mut context = Context::new(&one.dir, one.peer, one.plant)?;
        (workload.run)(&mut context)
    };
    match run() {
        Ok(()) => true,
        Err(failure) => {
            eprintln!("{failure}");
            false
        }
    }
}

fn chosen(run: &Run) -> Result<Vec<&'static Workload>, SelfcheckError> {
    for name in run.only.iter().chain(&run.skip).chain(&run.plant) {
        if named(name).is_empty() {
            return Err(SelfcheckError::Unknown { name: name.clone() });
        }
    }
    let wanted = |workload: &&Workload| {
        let meant = |list: &[String]| {
            list.iter().flat_map(|name| named(name)).any(|it| it.name == workload.name)
        };
        (run.only.is_empty() || meant(&run.only))
            && !meant(&run.skip)
            && (run.peer.is_some() || !workload.needs_peer)
    };
    Ok(all().filter(wanted).collect())
}

fn run_here(run: &Run) -> Result<bool, SelfcheckError> {
    let workloads = chosen(run)?;
    if run.own_session {
        nix::unistd::setsid()?;
    }
    let signals = blocked_signals()?;
    fs::create_dir_all(&run.place.dir)?;
    fs::write(run.place.dir.join("pid"), std::process::id().to_string())?;
    // What an earlier run in this folder left would be taken for ours.
    let _ = fs::remove_file(run.place.dir.join("verdicts"));
    for workload in all() {
        let folder = run.place.dir.join(workload.name);
        if folder.exists() {
            fs::remove_dir_all(folder)?;
        }
    }
    let count = workloads.len();
    let plan = Plan {
        workloads,
        folder: run.place.dir.clone(),
        peer: run.peer,
        plant: run.plant.clone(),
        time: run.seconds.map(Duration::from_secs),
    };
    let supervisor = Supervisor::start(plan)?;
    println!("{count} workloads run");
    io::stdout().flush()?;
    if run.own_session {
        // Whoever started us may go away now; nothing of theirs is held any longer.
        let null = File::options().read(true).write(true).open("/dev/null")?;
        nix::unistd::dup2_stdout(null)?;
    }
    let verdicts = supervisor.run(&signals)?;
    let table = render(&verdicts);
    let part = run.place.dir.join("verdicts.part");
    fs::write(&part, &table)?;
    fs::rename(part, run.place.dir.join("verdicts"))?;
    print!("{table}");
    Ok(verdicts.iter().all(|verdict| verdict.failure.is_none()))
}

fn render(verdicts: &[Verdict]) -> String {
    let mut out = String::from("workload       checks  result\n");
    for verdict in verdicts {
        let result = match &verdict.failure {
            None => "ok".to_owned(),
            Some(failure) => format!("FAIL  {failure}"),
        };
        out += &format!("{:<12} {:>8}  {result}\n", verdict.name, verdict.checks);
    }
    let failed = verdicts.iter().filter(|verdict| verdict.failure.is_some()).count();
    out += &format!("{} ok, {failed} failed\n", verdicts.len() - failed);
    out
}

/// Starts the run in a session of its own, with nothing of ours open.
fn detach(run: &Run) -> Result<bool, SelfcheckError> {
    chosen(run)?;
    fs::create_dir_all(&run.place.dir)?;
    let mut command = Command::new(std::env::current_exe()?);
    command.args(["run", "--own-session", "--dir"]).arg(&run.place.dir);
    let lists = [("--only", &run.only), ("--skip", &run.skip), ("--plant", &run.plant)];
    for (option, list) in lists {
        if !list.is_empty() {
            command.arg(option).arg(list.join(","));
        }
    }
    if let Some(peer) = run.peer {
        command.arg("--peer").arg(peer.to_string());
    }
    let log = File::create(run.place.dir.join("log"))?;
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(log);
    command.current_dir("/");
    let mut child = command.spawn()?;
    let mut line = String::new();
    if let Some(output) = child.stdout.take() {
        BufReader::new(output).read_line(&mut line)?;
    }
    if line.is_empty() {
        let said = fs::read_to_string(run.place.dir.join("log")).unwrap_or_default();
        return Err(SelfcheckError::NotStarted { said: said.trim().to_owned() });
    }
    print!("{line}");
    Ok(true)
}

fn supervisor_pid(folder: &Path) -> Result<Pid, SelfcheckError> {
    let not_running = || SelfcheckError::NotRunning { folder: folder.to_path_buf() };
    let text = fs::read_to_string(folder.join("pid")).map_err(|_| not_running())?;
    let pid: i32 = text.trim().parse().map_err(|_| not_running())?;
    let command = fs::read(format!("/proc/{pid}/cmdline")).map_err(|_| not_running())?;
    let ours = command.windows(9).any(|part| part == b"selfcheck");
    if ours { Ok(Pid::from_raw(pid)) } else { Err(not_running()) }
}

/// The checks of each workload that has a folder.
fn all_checks(folder: &Path) -> io::Result<BTreeMap<String, u64>> {
    let mut found = BTreeMap::new();
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        if entry.file_type()?.is_dir() && find(&name).is_some() {
            found.insert(name, read_checks(&entry.path()));
        }
    }
    Ok(found)
}

/// How long a workload may stand still before it counts as stuck.
const STANDSTILL: Duration = Duration::from_secs(10);

fn status(folder: &Path) -> Result<bool, SelfcheckError> {
    supervisor_pid(folder)?;
    let before = all_checks(folder)?;
    let deadline = Instant::now() + STANDSTILL;
    let mut now = before.clone();
    let advanced = |now: &BTreeMap<String, u64>| now.iter().all(|(k, v)| *v > before[k]);
    while !advanced(&now) && Instant::now() < deadline {
        std::thread::park_timeout(Duration::from_millis(50));
        now = all_checks(folder)?;
        now.retain(|name, _| before.contains_key(name));
    }
    let mut good = true;
    for (name, checks) in &now {
        let stuck = *checks <= before[name];
        let words = fs::read_to_string(folder.join(name).join("log")).unwrap_or_default();
        let failed = !words.trim().is_empty();
        good &= !stuck && !failed;
        let state = if failed {
            words.trim()
        } else if stuck {
            "stands still"
        } else {
            "runs"
        };
        println!("{name:<12} {checks:>8}  {state}");
    }
    Ok(good)
}

fn verify(folder: &Path) -> Result<bool, SelfcheckError> {
    let pid = supervisor_pid(folder)?;
    kill(pid, Signal::SIGTERM)?;
    let verdicts = folder.join("verdicts");
    let deadline = Instant::now() + Duration::from_secs(60);
    while !verdicts.exists() && Instant::now() < deadline {
        std::thread::park_timeout(Duration::from_millis(20));
    }
    let table = fs::read_to_string(verdicts).map_err(|_| SelfcheckError::NoVerdicts)?;
    print!("{table}");
    Ok(table.lines().last().is_some_and(|line| line.ends_with(" 0 failed")))
}
