//! Puts a checked load on a redis server and tells how long its clients waited.
//!
//! With `--control` it obeys commands on standard input, one line each, and answers each with one
//! JSON object on a line: `mark NAME` ends a stretch of time and reports on it, `report` tells
//! about the whole run so far, `plot` draws it, `verify` reads the whole dataset, `stop` (or the
//! end of input) ends the run with the last report. Exit status 0 only if no request failed and
//! no answer was wrong.

use std::io::{self, BufRead, Write};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use chaos_tests::client::counters::Counters;
use chaos_tests::client::load::{Dataset, Load, LoadPlan, Tally};
use chaos_tests::client::report::Report;
use chaos_tests::client::resp::{Connection, ReplyError};
use chaos_tests::client::{plot, svg};
use clap::Parser;

/// Checked load for a redis server.
#[derive(Debug, Parser)]
struct Arguments {
    /// Address and port of the server.
    #[arg(long)]
    address: SocketAddr,
    /// Connections.
    #[arg(long, default_value_t = 4)]
    connections: u64,
    /// Requests per second on each connection.
    #[arg(long, default_value_t = 500)]
    rate: u32,
    /// Bytes of each value written.
    #[arg(long, default_value_t = 256)]
    value_bytes: usize,
    /// Keys of each connection.
    #[arg(long, default_value_t = 1000)]
    keys: u64,
    /// Fill the server with a dataset of this many MiB first.
    #[arg(long, default_value_t = 0)]
    fill_mib: u64,
    /// Read this many MiB of an earlier fill instead of filling.
    #[arg(long, default_value_t = 0, conflicts_with = "fill_mib")]
    filled_mib: u64,
    /// Run for this many seconds.
    #[arg(long, default_value_t = 10, conflicts_with = "control")]
    seconds: u64,
    /// Obey commands on standard input instead.
    #[arg(long)]
    control: bool,
    /// A reply that takes longer than this many seconds counts as a lost connection.
    #[arg(long, default_value_t = 30)]
    patience_seconds: u64,
    /// Write the longest latency per 10 ms to this file.
    #[arg(long)]
    series: Option<PathBuf>,
    /// Draw the run into this file.
    #[arg(long)]
    svg: Option<PathBuf>,
    /// Draw the run on standard error at the end.
    #[arg(long)]
    plot: bool,
}

/// Why there was no run to report on.
#[derive(Debug, thiserror::Error)]
enum RunError {
    #[error("no load on {address}")]
    Server {
        address: SocketAddr,
        #[source]
        source: ReplyError,
    },
    #[error("cannot read the kernel's counters")]
    Counters(#[source] io::Error),
    #[error("cannot write {}", path.display())]
    Output {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
}

fn main() -> ExitCode {
    match run(&Arguments::parse()) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("loadclient: {}", chaos_tests::chain(&error));
            ExitCode::from(2)
        }
    }
}

fn run(arguments: &Arguments) -> Result<bool, RunError> {
    let server = |source| RunError::Server { address: arguments.address, source };
    let patience = Duration::from_secs(arguments.patience_seconds);
    let dataset = Dataset::of_mib(arguments.fill_mib.max(arguments.filled_mib));
    if arguments.fill_mib > 0 {
        let mut connection = Connection::open(arguments.address, patience).map_err(server)?;
        dataset.fill(&mut connection).map_err(server)?;
        eprintln!("filled {} MiB", arguments.fill_mib);
    }
    let plan = LoadPlan {
        address: arguments.address,
        run: SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |now| now.as_secs()),
        connections: arguments.connections,
        requests_per_second: arguments.rate,
        value_bytes: arguments.value_bytes,
        keys: arguments.keys,
        patience,
        dataset,
    };
    let mut session = Session::start(plan).map_err(server)?;
    if arguments.control {
        session.obey(io::stdin())?;
    } else {
        let end = session.epoch + Duration::from_secs(arguments.seconds);
        while Instant::now() < end && !session.load.is_over() {
            std::thread::sleep(Duration::from_millis(20));
        }
    }
    session.finish(arguments)
}

/// A run with all that was counted in it.
struct Session {
    plan: LoadPlan,
    load: Load,
    epoch: Instant,
    marks: Vec<(f64, String)>,
    mark_s: f64,
    whole: Tally,
    counters_start: Option<Counters>,
    counters_mark: Option<Counters>,
}

impl Session {
    fn start(plan: LoadPlan) -> Result<Self, ReplyError> {
        let counters = Counters::read().ok();
        let epoch = Instant::now();
        let load = Load::start(&plan, epoch)?;
        Ok(Self {
            plan,
            load,
            epoch,
            marks: Vec::new(),
            mark_s: 0.0,
            whole: Tally::default(),
            counters_start: counters.clone(),
            counters_mark: counters,
        })
    }

    fn obey(&mut self, input: io::Stdin) -> Result<(), RunError> {
        let (sender, lines) = mpsc::channel();
        std::thread::spawn(move || {
            for line in input.lock().lines() {
                let Ok(line) = line else { return };
                if sender.send(line).is_err() {
                    return;
                }
            }
        });
        loop {
            let line = match lines.recv_timeout(Duration::from_secs(1)) {
                Ok(line) => line,
                Err(RecvTimeoutError::Timeout) => continue,
                Err(RecvTimeoutError::Disconnected) => return Ok(()),
            };
            let (verb, rest) = line.trim().split_once(' ').unwrap_or((line.trim(), ""));
            match verb {
                "mark" => {
                    let name = self.stretch_name(rest);
                    self.say(&name)?;
                }
                "report" => self.say("")?,
                "plot" => print!("{}", plot::terminal(&self.load.series(), &self.marks, 100, 8)),
                "verify" => self.verify(),
                "stop" => return Ok(()),
                other => println!("{{\"error\":\"unknown command {}\"}}", other.escape_default()),
            }
            // A controller that has gone away is noticed at the next read.
            let _ = io::stdout().flush();
        }
    }

    fn stretch_name(&self, name: &str) -> String {
        if name.is_empty() { format!("mark {}", self.marks.len() + 1) } else { name.to_owned() }
    }

    /// Ends a stretch under this name and prints its report, or with no name that of all so far.
    fn say(&mut self, name: &str) -> Result<(), RunError> {
        let report = if name.is_empty() { self.report_all()? } else { self.end_stretch(name)? };
        let line = serde_json::to_string(&report).expect("a report is plain data");
        println!("{line}");
        Ok(())
    }

    fn end_stretch(&mut self, name: &str) -> Result<Report, RunError> {
        let now_s = self.epoch.elapsed().as_secs_f64();
        let counters = Counters::read().map_err(RunError::Counters)?;
        let tally = self.load.take_tally();
        self.whole.merge(&tally);
        let changed =
            self.counters_mark.as_ref().map(|before| counters.since(before)).unwrap_or_default();
        let report = Report::new(name, self.mark_s, now_s, &tally, changed);
        self.marks.push((self.mark_s, name.to_owned()));
        self.mark_s = now_s;
        self.counters_mark = Some(counters);
        Ok(report)
    }

    fn report_all(&self) -> Result<Report, RunError> {
        let counters = Counters::read().map_err(RunError::Counters)?;
        // What was counted since the last mark stays with its stretch.
        let mut sum = self.whole.clone();
        sum.merge(&self.load.peek_tally());
        let changed =
            self.counters_start.as_ref().map(|before| counters.since(before)).unwrap_or_default();
        Ok(Report::new("all", 0.0, self.epoch.elapsed().as_secs_f64(), &sum, changed))
    }

    fn verify(&mut self) {
        let wrong = Connection::open(self.plan.address, self.plan.patience)
            .and_then(|mut connection| self.plan.dataset.verify(&mut connection));
        match wrong {
            Ok(wrong) => {
                self.whole.wrong_answers += wrong.len() as u64;
                let keys = self.plan.dataset.keys;
                self.whole.complaints.extend(wrong.iter().take(5).cloned());
                println!("{{\"verified_keys\":{keys},\"wrong\":{}}}", wrong.len());
            }
            Err(error) => {
                self.whole.lost_connections += 1;
                println!("{{\"error\":\"{}\"}}", chaos_tests::chain(&error).escape_default());
            }
        }
    }

    fn finish(mut self, arguments: &Arguments) -> Result<bool, RunError> {
        self.load.stop();
        self.say("")?;
        let report = self.report_all()?;
        for complaint in &report.complaints {
            eprintln!("loadclient: {complaint}");
        }
        let series = self.load.series();
        if let Some(path) = &arguments.series {
            let mut text = String::from("seconds,requests,longest_us\n");
            for (index, slice) in series.slices.iter().enumerate() {
                let at = index as f64 / 100.0;
                text += &format!("{at:.2},{},{}\n", slice.requests, slice.longest_us);
            }
            write_file(path, &text)?;
        }
        if let Some(path) = &arguments.svg {
            write_file(path, &svg::picture(&series, &self.marks))?;
        }
        if arguments.plot {
            eprint!("{}", plot::terminal(&series, &self.marks, 100, 8));
        }
        Ok(report.is_clean() && report.requests > 0)
    }
}

fn write_file(path: &PathBuf, text: &str) -> Result<(), RunError> {
    std::fs::write(path, text).map_err(|source| RunError::Output { path: path.clone(), source })
}
