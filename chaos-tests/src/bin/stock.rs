//! A stock Debian with the services of an ordinary server goes to and fro between two nodes of a
//! cluster on this machine, with clients connected all the time.
//!
//! It makes a template that stands on the release, with what Debian packages and started by its
//! own units, and a VE from it. Between the moves the VE is checkpointed and restored. At the end
//! every client, systemd, the journal and the consistency checks of the databases are asked. The
//! exit status is 0 only if none has noticed anything.

use std::process::ExitCode;
use std::time::Instant;

use chaos_tests::stock::{Plan, Row, make_template, play};
use clap::Parser;

/// Moves and checkpoints a stock Debian under load, and asks everybody what they noticed.
#[derive(Debug, Parser)]
struct Arguments {
    /// The releases, one after the other: templates that come with Ferry.
    #[arg(long, value_delimiter = ',', default_value = "debian-12,debian-13")]
    ostemplate: Vec<String>,
    /// Moves of each.
    #[arg(long, default_value_t = 50)]
    moves: u32,
    /// Checkpoints of each.
    #[arg(long, default_value_t = 10)]
    checkpoints: u32,
    /// Leave out the programs in Java, Go and Node.js, which take long to install.
    #[arg(long)]
    without_languages: bool,
    /// Only build the templates that are missing.
    #[arg(long)]
    templates_only: bool,
    /// The name of the testbed.
    #[arg(long, default_value = "stock")]
    name: String,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let mut all_good = true;
    for release in &arguments.ostemplate {
        let plan = Plan {
            release: release.clone(),
            moves: arguments.moves,
            checkpoints: arguments.checkpoints,
            languages: !arguments.without_languages,
            name: arguments.name.clone(),
        };
        let started = Instant::now();
        if arguments.templates_only {
            eprintln!("the template of the stock {release}");
            if let Err(error) = make_template(&plan) {
                eprintln!("stock: {}", chaos_tests::chain(&error));
                return ExitCode::from(2);
            }
            continue;
        }
        let mut tell = |what: &str| eprintln!("{:>7.1} s  {what}", started.elapsed().as_secs_f64());
        match play(&plan, &mut tell) {
            Ok(rows) => {
                println!("{release}");
                rows.iter().for_each(print);
                all_good &= rows.iter().all(|row| row.good);
            }
            Err(error) => {
                eprintln!("stock: {}", chaos_tests::chain(&error));
                return ExitCode::from(2);
            }
        }
    }
    if all_good { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn print(row: &Row) {
    println!("  {:<16} {:<4} {}", row.name, if row.good { "ok" } else { "BAD" }, row.said);
    for what in &row.complaints {
        println!("  {:<16}      {what}", "");
    }
}
