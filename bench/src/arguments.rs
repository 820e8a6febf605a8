//! Options that all benchmarks have.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::Args;

use crate::show::outcome::Outcome;
use crate::stage::StageError;
use crate::stage::guard::Guard;

/// Options that all benchmarks have.
#[derive(Clone, Debug, Args)]
pub struct Common {
    /// Take about a minute: fewer runs, smaller sizes. Shows that it works, and little else.
    #[arg(long)]
    pub quick: bool,
    /// How often each measurement is repeated [default: depends on the program].
    #[arg(long)]
    pub runs: Option<usize>,
    /// Print one JSON object instead of tables.
    #[arg(long)]
    pub json: bool,
    /// Write the figures and pictures below this folder of documents.
    #[arg(long, value_name = "FOLDER")]
    pub keep: Option<PathBuf>,
    /// Begin nothing more after so many seconds; after twice as many everything is ended
    /// [default: 60 with --quick, 1200 without].
    #[arg(long, value_name = "SECONDS")]
    pub limit: Option<u64>,
    /// What the name of the testbed starts with; up to five letters and digits.
    #[arg(long, default_value = "bench")]
    pub name: String,
    /// Where the daemon and the vz programs are that are measured [default: beside this program].
    #[arg(long, value_name = "FOLDER")]
    pub programs: Option<PathBuf>,
}

impl Common {
    /// How often to repeat: as asked for, or as the program thinks fit.
    pub fn runs(&self, usual: usize, quick: usize) -> usize {
        self.runs.unwrap_or(if self.quick { quick } else { usual }).max(1)
    }

    /// One of two values.
    pub fn pick<T>(&self, usual: T, quick: T) -> T {
        if self.quick { quick } else { usual }
    }

    /// How long to go on beginning things.
    pub fn limit(&self) -> Duration {
        Duration::from_secs(self.limit.unwrap_or(if self.quick { 60 } else { 1200 }))
    }
}

/// Runs a benchmark from its options to its exit status: the outcome is shown and kept, also if
/// it stopped half way.
pub fn run(
    program: &str,
    common: &Common,
    play: impl FnOnce(&Guard, &mut Outcome) -> Result<(), StageError>,
) -> ExitCode {
    let mut outcome = Outcome::new(program, common.quick);
    let guard = match Guard::start(common) {
        Ok(guard) => guard,
        Err(error) => {
            eprintln!("{program}: {}", chaos_tests::chain(&error));
            return ExitCode::from(2);
        }
    };
    let played = play(&guard, &mut outcome);
    if let Err(error) = &played {
        let cause = guard.reason().map_or_else(|| chaos_tests::chain(error), str::to_owned);
        outcome.notes.push(format!("it stopped half way: {cause}"));
        eprintln!("{program}: {cause}");
    }
    outcome.print(common.json);
    if let Some(folder) = &common.keep
        && played.is_ok()
    {
        match outcome.keep(folder) {
            Ok(written) => {
                written.iter().for_each(|path| eprintln!("wrote {}", path.display()));
            }
            Err(error) => {
                eprintln!("{program}: cannot write below {}: {error}", folder.display());
                return ExitCode::from(2);
            }
        }
    }
    if played.is_ok() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
