//! What pre-copy costs the programs in a VE: operations per second and the slowest answers before,
//! during and after it.
//!
//! On a machine that plays both nodes and the clients, what copies takes processors from what is
//! copied. So there are two ways to look: clients that do as much as they can, which is an upper
//! bound for two machines; and clients at a steady rate beside a copy that has a limit, so that a
//! processor is free, and what is left is what the tracking of writes costs. The second one is what
//! the goals speak of.

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, ChildStdout, Command, ExitCode, Stdio};
use std::time::Duration;

use bench::arguments::{self, Common};
use bench::client::exchange::Exchange;
use bench::client::press::Stretch;
use bench::goals;
use bench::measure::statistics::median;
use bench::show::outcome::Outcome;
use bench::show::table::{Table, maybe};
use bench::stage::guard::Guard;
use bench::stage::{Stage, StageError, Ve, services, system, templates};
use chaos_tests::testbed::{Host, Rate};
use clap::{Parser, ValueEnum};

/// What pre-copy costs the programs in a VE.
#[derive(Debug, Parser)]
struct Arguments {
    #[command(flatten)]
    common: Common,
    /// Only these services.
    #[arg(long, value_delimiter = ',')]
    only: Vec<Service>,
    /// What is in memory beside the service, so that there is something to copy, in MiB
    /// [default: 1024, with --quick 256].
    #[arg(long)]
    mib: Option<usize>,
    /// Limit of the links of the nodes, such as 1gbit.
    #[arg(long)]
    rate: Option<Rate>,
    /// Limit of the copy where clients are steady, as `vzmigrate --bwlimit` takes it.
    #[arg(long, default_value = "120M")]
    bwlimit: String,
    /// Operations in a second of steady clients.
    #[arg(long, default_value_t = 1000)]
    pace: u32,
}

/// How the clients behave.
#[derive(Clone, Copy, Debug)]
struct Manner<'a> {
    /// What it is called.
    name: &'static str,
    /// Operations in a second; none for as many as can be.
    pace: Option<u32>,
    /// Limit of the copy.
    bwlimit: Option<&'a str>,
}

/// What runs in the VE.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Service {
    /// Writes to redis.
    Memory,
    /// Transactions of PostgreSQL.
    Database,
    /// Requests to nginx.
    Web,
}

impl Service {
    const ALL: &[Self] = &[Self::Memory, Self::Database, Self::Web];

    fn name(self) -> &'static str {
        match self {
            Self::Memory => "in memory (redis)",
            Self::Database => "database (PostgreSQL)",
            Self::Web => "web (nginx)",
        }
    }

    /// Starts it, and says what to do with it.
    fn start(self, stage: &Stage, ve: &Ve) -> Result<(Exchange, u16), StageError> {
        Ok(match self {
            Self::Memory => {
                stage.scene.open_redis(ve.home, ve.id)?;
                (Exchange::RedisSet, 6379)
            }
            Self::Database => {
                services::start_postgres(stage, ve)?;
                (Exchange::PostgresTransaction, 5432)
            }
            Self::Web => {
                services::start_nginx(stage, ve)?;
                (Exchange::Http, 80)
            }
        })
    }
}

/// Stretches of one move.
struct Seen {
    before: Stretch,
    during: Stretch,
    after: Stretch,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    arguments::run("tracking", &arguments.common, |guard, outcome| play(&arguments, guard, outcome))
}

fn play(arguments: &Arguments, guard: &Guard, outcome: &mut Outcome) -> Result<(), StageError> {
    let common = &arguments.common;
    templates::write(chaos_tests::testbed::DEFAULT_TEMPLATES.as_ref(), templates::SERVICES)?;
    let mut stage = Stage::up(common, guard, "trk", |_| {})?;
    stage.rate(arguments.rate)?;
    let limit = Some(arguments.bwlimit.as_str());
    let steady = Manner { name: "steady", pace: Some(arguments.pace), bwlimit: limit };
    let all_they_can = Manner { name: "all they can", pace: None, bwlimit: None };
    let worst = look(arguments, guard, &stage, steady, outcome)?;
    outcome.judge(goals::SLOWDOWN, worst.median);
    outcome.judge(goals::SLOWDOWN_WORST, worst.p99);
    look(arguments, guard, &stage, all_they_can, outcome)?;
    outcome.notes.push(format!(
        "both nodes and the clients share {} processors; steady: {} operations in a second, and \
         a copy of at most {} bytes in one",
        outcome.machine.processors, arguments.pace, arguments.bwlimit
    ));
    Ok(())
}

/// The service that suffers most.
#[derive(Debug, Default)]
struct Worst {
    median: Option<f64>,
    p99: Option<f64>,
}

/// One table: each service, with clients of this manner.
fn look(
    arguments: &Arguments,
    guard: &Guard,
    stage: &Stage,
    manner: Manner<'_>,
    outcome: &mut Outcome,
) -> Result<Worst, StageError> {
    let common = &arguments.common;
    let usual = if common.quick { &Service::ALL[..1] } else { Service::ALL };
    let services = if arguments.only.is_empty() { usual } else { &arguments.only[..] };
    let mib = arguments.mib.unwrap_or(common.pick(1024, 256));
    let mut table = Table::new(
        &format!("Operations of clients around pre-copy, medians: {}", manner.name),
        &HEAD,
    );
    let mut worst = Worst::default();
    for &service in services {
        eprintln!("{}: {}", manner.name, service.name());
        let ve = Ve::new(templates::SERVICES, mib as u64 + 1024);
        let seen = match watch(stage, common, guard, (service, manner), mib, ve.clone()) {
            Ok(seen) => seen,
            Err(error) if guard.reason().is_none() => {
                // The others can be measured all the same.
                let cause = chaos_tests::chain(&error);
                outcome.notes.push(format!("{} failed: {cause}", service.name()));
                stage.remove_ve(&ve)?;
                continue;
            }
            Err(error) => return Err(error),
        };
        let growth = |of: fn(&Stretch) -> f64| -> Vec<f64> {
            seen.iter().map(|seen| of(&seen.during) / of(&seen.before) - 1.0).collect()
        };
        let (rate, p50, p99) =
            (growth(|it| it.rate), growth(|it| it.p50_us), growth(|it| it.p99_us));
        table.row(row(service, &seen, [&rate, &p50, &p99]));
        let name = format!("{}, {}", service.name(), manner.name);
        // As ratios, which can be compared with those of another revision.
        let ratio = |growth: &[f64]| growth.iter().map(|it| it + 1.0).collect::<Vec<_>>();
        outcome.less(&format!("{name}: median during pre-copy"), "×", &ratio(&p50));
        outcome.less(&format!("{name}: p99 during pre-copy"), "×", &ratio(&p99));
        outcome.more(&format!("{name}: operations during pre-copy"), "×", &ratio(&rate));
        let most = |one: Option<f64>, other| one.into_iter().chain(other).reduce(f64::max);
        worst.median = most(worst.median, median(&p50));
        worst.p99 = most(worst.p99, median(&p99));
    }
    outcome.tables.push(table);
    Ok(worst)
}

const HEAD: [&str; 14] = [
    "service",
    "runs",
    "ops/s before",
    "during",
    "after",
    "change",
    "median µs before",
    "during",
    "after",
    "growth",
    "p99 µs before",
    "during",
    "after",
    "growth",
];

fn row(service: Service, seen: &[Seen], growths: [&[f64]; 3]) -> Vec<String> {
    let mut row = vec![service.name().to_owned(), seen.len().to_string()];
    let measures: [fn(&Stretch) -> f64; 3] = [|it| it.rate, |it| it.p50_us, |it| it.p99_us];
    for (measure, growth) in measures.into_iter().zip(growths) {
        let parts: [fn(&Seen) -> &Stretch; 3] =
            [|seen| &seen.before, |seen| &seen.during, |seen| &seen.after];
        for part in parts {
            let all: Vec<f64> = seen.iter().map(|seen| measure(part(seen))).collect();
            row.push(maybe(median(&all)));
        }
        row.push(maybe(median(growth)));
    }
    row
}

fn watch(
    stage: &Stage,
    common: &Common,
    guard: &Guard,
    (service, manner): (Service, Manner<'_>),
    mib: usize,
    mut ve: Ve,
) -> Result<Vec<Seen>, StageError> {
    stage.make_ve(&ve)?;
    stage.start_ballast(&ve, &format!("--random-mib {mib}"))?;
    let (exchange, port) = service.start(stage, &ve)?;
    let mut press = Press::start(stage, exchange, &format!("{}:{port}", ve.address), manner.pace)?;
    let calm = common.pick(Duration::from_secs(3), Duration::from_secs(1));
    let mut seen = Vec::new();
    for _ in 0..common.runs(5, 2) {
        if !guard.has_time_for(calm * 4) {
            break;
        }
        std::thread::sleep(calm);
        let start = press.ask("now")?.to_s;
        let limit = manner.bwlimit.map(|limit| ["--bwlimit", limit]);
        let mut options = vec!["--max-downtime", "20000"];
        options.extend(limit.iter().flatten());
        let report = stage.migrate(&mut ve, &options)?.report;
        let end = press.ask("now")?.to_s;
        std::thread::sleep(calm);
        let last = press.ask("now")?.to_s;
        let gap = press.ask(&format!("gap {start} {end}"))?;
        // The rounds are what comes right before the freeze.
        let rounds: f64 = report.rounds.iter().map(|round| round.ms / 1e3).sum();
        let calm = calm.as_secs_f64() * 0.8;
        seen.push(Seen {
            before: press.stretch(start - calm, start)?,
            during: press.stretch((gap.from_s - rounds).max(start), gap.from_s)?,
            after: press.stretch(last - calm, last)?,
        });
    }
    drop(press);
    stage.remove_ve(&ve)?;
    Ok(seen)
}

/// The clients, on their host.
struct Press {
    child: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
}

impl Press {
    fn start(
        stage: &Stage,
        exchange: Exchange,
        address: &str,
        pace: Option<u32>,
    ) -> Result<Self, StageError> {
        let exchange = exchange.to_possible_value().expect("none is skipped");
        let mut command = Command::new(&stage.part);
        command
            .args(["press", "--exchange", exchange.get_name(), "--address", address])
            .args(pace.map(|pace| format!("--pace={pace}")))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped());
        let mut child = stage.scene.testbed.spawn(&Host::Client, &mut command)?;
        let (input, output) = (child.stdin.take(), child.stdout.take());
        let input = input.expect("it is piped");
        let output = BufReader::new(output.expect("it is piped"));
        Ok(Self { child, input, output })
    }

    fn ask(&mut self, question: &str) -> Result<Stretch, StageError> {
        writeln!(self.input, "{question}").map_err(system("speak to the clients"))?;
        let mut line = String::new();
        self.output.read_line(&mut line).map_err(system("hear the clients"))?;
        serde_json::from_str(line.trim())
            .map_err(|_| StageError::Said { program: "benchpart press".to_owned(), said: line })
    }

    fn stretch(&mut self, from_s: f64, to_s: f64) -> Result<Stretch, StageError> {
        self.ask(&format!("stretch {from_s} {to_s}"))
    }
}

impl Drop for Press {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
