//! What pre-copy costs the programs in a VE: operations per second and the slowest answers before,
//! during and after it.
//!
//! The clients do as much as they can. On a machine that plays both nodes and the clients, what
//! copies takes processors from what is copied: the figures are an upper bound for two machines.

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
    let usual = if common.quick { &Service::ALL[..1] } else { Service::ALL };
    let services = if arguments.only.is_empty() { usual } else { &arguments.only[..] };
    templates::write(chaos_tests::testbed::DEFAULT_TEMPLATES.as_ref(), templates::SERVICES)?;
    let mut stage = Stage::up(common, guard, "trk", |_| {})?;
    stage.rate(arguments.rate)?;
    let mib = arguments.mib.unwrap_or(common.pick(1024, 256));
    let head = [
        "service",
        "runs",
        "ops/s before",
        "during",
        "after",
        "loss",
        "p99 µs before",
        "during",
        "after",
        "growth",
    ];
    let mut table = Table::new("Operations of clients around pre-copy, medians", &head);
    let (mut losses, mut growths) = (Vec::new(), Vec::new());
    for &service in services {
        eprintln!("{}", service.name());
        let ve = Ve::new(templates::SERVICES, mib as u64 + 1024);
        let seen = match watch(&stage, common, guard, service, mib, ve.clone()) {
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
        let of = |part: fn(&Seen) -> f64| median(&seen.iter().map(part).collect::<Vec<_>>());
        let loss: Vec<f64> =
            seen.iter().map(|seen| 1.0 - seen.during.rate / seen.before.rate).collect();
        let growth: Vec<f64> =
            seen.iter().map(|seen| seen.during.p99_us / seen.before.p99_us - 1.0).collect();
        table.row([
            service.name().to_owned(),
            seen.len().to_string(),
            maybe(of(|seen| seen.before.rate)),
            maybe(of(|seen| seen.during.rate)),
            maybe(of(|seen| seen.after.rate)),
            maybe(median(&loss)),
            maybe(of(|seen| seen.before.p99_us)),
            maybe(of(|seen| seen.during.p99_us)),
            maybe(of(|seen| seen.after.p99_us)),
            maybe(median(&growth)),
        ]);
        outcome.less(&format!("{}: loss during pre-copy", service.name()), "share", &loss);
        outcome.less(&format!("{}: growth of p99", service.name()), "share", &growth);
        losses.extend(median(&loss));
        growths.extend(median(&growth));
    }
    outcome.tables.push(table);
    // The worst of the services counts.
    outcome.judge(goals::SLOWDOWN, losses.into_iter().max_by(f64::total_cmp));
    outcome.judge(goals::SLOWDOWN_WORST, growths.into_iter().max_by(f64::total_cmp));
    outcome.notes.push(format!(
        "both nodes and the clients share {} processors",
        outcome.machine.processors
    ));
    Ok(())
}

fn watch(
    stage: &Stage,
    common: &Common,
    guard: &Guard,
    service: Service,
    mib: usize,
    mut ve: Ve,
) -> Result<Vec<Seen>, StageError> {
    stage.make_ve(&ve)?;
    stage.start_ballast(&ve, &format!("--random-mib {mib}"))?;
    let (exchange, port) = service.start(stage, &ve)?;
    let mut press = Press::start(stage, exchange, &format!("{}:{port}", ve.address))?;
    let calm = common.pick(Duration::from_secs(3), Duration::from_secs(1));
    let mut seen = Vec::new();
    for _ in 0..common.runs(5, 2) {
        if !guard.has_time_for(calm * 4) {
            break;
        }
        std::thread::sleep(calm);
        let start = press.ask("now")?.to_s;
        let report = stage.migrate(&mut ve, &["--max-downtime", "20000"])?.report;
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
    fn start(stage: &Stage, exchange: Exchange, address: &str) -> Result<Self, StageError> {
        let exchange = exchange.to_possible_value().expect("none is skipped");
        let mut command = Command::new(&stage.part);
        command
            .args(["press", "--exchange", exchange.get_name(), "--address", address])
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
