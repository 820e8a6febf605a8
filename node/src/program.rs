//! The program `vzd`: what it is asked to be, its log, its threads.
//!
//! All of it is here and not beside `main`, which would compile the whole daemon once more.

use std::{num::NonZero, path::PathBuf, process::ExitCode};

use clap::Parser;
use tracing::error;
use tracing_subscriber::EnvFilter;

use crate::{
    api,
    config::Config,
    daemon,
    migration::{KEEPER_ARGUMENT, WATCHDOG_ARGUMENT, keeper_main, watchdog_main},
    ve::SEED_ARGUMENT,
};

/// Runs the Virtual Environments of this node, in the foreground.
#[derive(Debug, Parser)]
#[command(name = "vzd", version)]
struct Arguments {
    /// The configuration file. Without it every setting has its default.
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
}

/// Runs the program.
pub fn main() -> ExitCode {
    // Before anything else: a seed must stay what it is, a process with one thread.
    if std::env::args_os().nth(1).is_some_and(|argument| argument == SEED_ARGUMENT) {
        return ckpt_engine::container::seed_main();
    }
    if std::env::args_os().nth(1).is_some_and(|argument| argument == WATCHDOG_ARGUMENT) {
        log_to_stderr();
        return watchdog_main();
    }
    if std::env::args_os().nth(1).is_some_and(|argument| argument == KEEPER_ARGUMENT) {
        log_to_stderr();
        return keeper_main();
    }
    let arguments = Arguments::parse();
    log_to_stderr();
    let config = match arguments.config.as_deref().map_or(Ok(Config::default()), Config::load) {
        Ok(config) => config,
        Err(problem) => return fail(&problem),
    };
    let workers =
        tokio::runtime::Builder::new_multi_thread().worker_threads(workers()).enable_all().build();
    match workers {
        Ok(workers) => match workers.block_on(daemon::run(config)) {
            Ok(()) => ExitCode::SUCCESS,
            Err(problem) => fail(&problem),
        },
        Err(problem) => fail(&problem),
    }
}

/// Threads that run tasks. More than there are processors only take turns on them, which cost a move
/// a tenth of its time.
fn workers() -> usize {
    const FEWEST: usize = 2;
    const MOST: usize = 4;
    std::thread::available_parallelism().map_or(FEWEST, NonZero::get).clamp(FEWEST, MOST)
}

fn log_to_stderr() {
    let filter = EnvFilter::try_from_env("VZD_LOG")
        .unwrap_or_else(|_| EnvFilter::new("info,openraft=error"));
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).init();
}

fn fail(problem: &dyn std::error::Error) -> ExitCode {
    error!("{}", api::chain(problem));
    ExitCode::FAILURE
}
