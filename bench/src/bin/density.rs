//! How many VEs a small host carries: the figure that OpenVZ was known for.
//!
//! VEs with init, syslog, cron, sshd, a mail daemon and a web server are started one after the
//! other on a node whose VEs have 768 MiB together. At each step every web server is asked for its
//! page over a new connection, until one does not answer in time or none can be started any more.

use std::net::Ipv4Addr;
use std::ops::Range;
use std::process::ExitCode;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use bench::arguments::{self, Common};
use bench::client::sweep;
use bench::goals;
use bench::measure::statistics::{median, quantile};
use bench::show::chart::{self, Curve};
use bench::show::outcome::Outcome;
use bench::show::table::{Table, digits, maybe};
use bench::stage::guard::Guard;
use bench::stage::{Stage, StageError, templates};
use chaos_tests::testbed::Host;
use clap::Parser;

/// How many VEs a small host carries.
#[derive(Debug, Parser)]
struct Arguments {
    #[command(flatten)]
    common: Common,
    /// Memory of all VEs together, in MiB.
    #[arg(long, default_value_t = 768)]
    mib: u64,
    /// How many VEs to start at most [default: 240, with --quick 10].
    #[arg(long)]
    count: Option<u32>,
    /// How many to start at a time.
    #[arg(long, default_value_t = 4)]
    at_a_time: usize,
}

const FIRST: Ipv4Addr = Ipv4Addr::new(10, 77, 2, 1);
const HOME: Host = Host::Node(1);
/// What an answer may take for a VE to count.
const IN_TIME_MS: f64 = 1000.0;

/// What was seen with so many VEs.
struct Step {
    count: u32,
    /// Of those that answered.
    ms: Vec<f64>,
    silent: usize,
    memory_mib: f64,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    arguments::run("density", &arguments.common, |guard, outcome| play(&arguments, guard, outcome))
}

fn play(arguments: &Arguments, guard: &Guard, outcome: &mut Outcome) -> Result<(), StageError> {
    let common = &arguments.common;
    templates::write(chaos_tests::testbed::DEFAULT_TEMPLATES.as_ref(), templates::HOST)?;
    let stage = Stage::up(common, guard, "dens", |options| {
        options.nodes = 1;
        options.memory.insert(HOME, arguments.mib << 20);
    })?;
    let most = arguments.count.unwrap_or(common.pick(240, 10));
    let every = common.pick(20, 5);
    let mut all = Started::default();
    let mut steps: Vec<Step> = Vec::new();
    for first in (0..most).step_by(every as usize) {
        if !guard.has_time_for(common.pick(Duration::from_secs(60), Duration::from_secs(20))) {
            outcome.notes.push(format!("no time was left for more than {first} VEs"));
            break;
        }
        let last = (first + every).min(most);
        let failed = all.start(&stage, first..last, arguments.at_a_time);
        if let Some(error) = failed {
            if guard.reason().is_some() {
                return Err(error);
            }
            outcome.notes.push(format!(
                "of the VEs up to {last} not all can be started: {}",
                chaos_tests::chain(&error)
            ));
            all.broke = true;
            break;
        }
        let step = look(&stage, common, last, arguments.mib)?;
        eprintln!("{} VEs, {} silent", step.count, step.silent);
        all.broke = step.silent > 0;
        steps.push(step);
        if all.broke {
            break;
        }
    }
    tell(outcome, &steps, &all, arguments.mib);
    Ok(())
}

/// How the starts of all VEs went.
#[derive(Default)]
struct Started {
    /// Milliseconds from the start until it was booted.
    ms: Vec<f64>,
    /// Seconds spent on starting, several at a time.
    seconds: f64,
    /// Whether the limit of this host was found.
    broke: bool,
}

impl Started {
    /// Starts these, some at a time. The first failure ends it.
    fn start(
        &mut self,
        stage: &Stage,
        numbers: Range<u32>,
        at_a_time: usize,
    ) -> Option<StageError> {
        let begun = Instant::now();
        let next = AtomicU32::new(numbers.start);
        let results: Mutex<Vec<Result<Duration, StageError>>> = Mutex::default();
        std::thread::scope(|scope| {
            for _ in 0..at_a_time.max(1) {
                scope.spawn(|| {
                    loop {
                        let number = next.fetch_add(1, Ordering::Relaxed);
                        if number >= numbers.end {
                            return;
                        }
                        let result = start(stage, number);
                        let failed = result.is_err();
                        results.lock().unwrap_or_else(PoisonError::into_inner).push(result);
                        if failed {
                            next.store(numbers.end, Ordering::Relaxed);
                        }
                    }
                });
            }
        });
        self.seconds += begun.elapsed().as_secs_f64();
        let mut failure = None;
        for result in results.into_inner().unwrap_or_else(PoisonError::into_inner) {
            match result {
                Ok(took) => self.ms.push(took.as_secs_f64() * 1e3),
                Err(error) => failure = Some(error),
            }
        }
        failure
    }
}

/// Creates a VE and starts it; its boot goes on by itself once its web server answers.
fn start(stage: &Stage, number: u32) -> Result<Duration, StageError> {
    let (ve, address) = ((1000 + number).to_string(), sweep::address(FIRST, number));
    let place = format!("{address}/16");
    let words = ["vzctl", "create", &ve, "--ostemplate", templates::HOST, "--ipadd", &place];
    stage.scene.good(HOME, &words)?;
    let begun = Instant::now();
    stage.scene.good(HOME, &["vzctl", "start", &ve, "--wait"])?;
    Ok(begun.elapsed())
}

fn look(stage: &Stage, common: &Common, count: u32, limit: u64) -> Result<Step, StageError> {
    let part = stage.part.display().to_string();
    let words = [part.as_str(), "sweep", &FIRST.to_string(), &count.to_string()];
    let mut step = Step { count, ms: Vec::new(), silent: 0, memory_mib: limit as f64 };
    for _ in 0..common.runs(3, 1) {
        let said = stage.scene.good(Host::Client, &words)?;
        let took: Vec<Option<f64>> = serde_json::from_str(said.trim())
            .map_err(|_| StageError::Said { program: "benchpart sweep".to_owned(), said })?;
        step.silent = step.silent.max(took.iter().filter(|took| took.is_none()).count());
        step.ms.extend(took.into_iter().flatten());
    }
    if let Some(bytes) = stage.memory_of_ves(HOME) {
        step.memory_mib = bytes as f64 / f64::from(1 << 20);
    }
    Ok(step)
}

fn tell(outcome: &mut Outcome, steps: &[Step], all: &Started, limit: u64) {
    let head = ["VEs", "median ms", "p99 ms", "longest ms", "silent", "MiB in all", "MiB each"];
    let title = format!("Answers of the web servers of VEs on {limit} MiB");
    let mut table = Table::new(&title, &head);
    let mut carried = 0;
    for step in steps {
        let longest = quantile(&step.ms, 1.0);
        table.row([
            step.count.to_string(),
            maybe(median(&step.ms)),
            maybe(quantile(&step.ms, 0.99)),
            maybe(longest),
            step.silent.to_string(),
            digits(step.memory_mib),
            digits(step.memory_mib / f64::from(step.count)),
        ]);
        outcome.less(&format!("{} VEs: answer", step.count), "ms", &step.ms);
        if step.silent == 0 && longest.is_some_and(|ms| ms < IN_TIME_MS) {
            carried = carried.max(step.count);
        }
    }
    outcome.tables.push(table);
    outcome.less("start until booted", "ms", &all.ms);
    if let Some(ms) = median(&all.ms) {
        let rate = all.ms.len() as f64 / all.seconds;
        outcome.more("VEs started in a second", "1/s", &[rate]);
        outcome.notes.push(format!(
            "a VE is booted after {} ms (median); {} VEs are made and started in a second",
            digits(ms),
            digits(rate)
        ));
    }
    // A run that ended before the limit was found says nothing about it.
    let known = all.broke || f64::from(carried) >= goals::DENSITY.limit;
    outcome.judge(goals::DENSITY, known.then_some(f64::from(carried)));
    let curve = |name: &str, figure: fn(&[f64]) -> Option<f64>| Curve {
        name: name.to_owned(),
        points: steps
            .iter()
            .filter_map(|step| Some((f64::from(step.count), figure(&step.ms)?)))
            .collect(),
    };
    let drawn = [
        curve("median", median),
        curve("p99", |ms| quantile(ms, 0.99)),
        curve("longest", |ms| quantile(ms, 1.0)),
    ];
    let title = format!("Answers of web servers, one in each VE, on {limit} MiB");
    outcome.pictures.push(("density".into(), chart::curves(&title, "VEs", "ms", &drawn)));
}
