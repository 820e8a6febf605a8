//! Every workload, unmoved, moved, moved there and back, and checkpointed and restored: a table of
//! what came of it.
//!
//! `workloads` brings up a cluster of two nodes, runs the workloads of each area together in a VE,
//! does to the VE what the column says, and lets the workloads say whether they have noticed. It
//! ends at the first area in which one has; with `--keep-going` at the end. The exit status is 0
//! only if none has.

use std::process::ExitCode;

use chaos_tests::scene::SceneError;
use chaos_tests::table::{Cell, Row, Table, Way};
use chaos_tests::workload::named;
use clap::Parser;

/// What becomes of each workload when its VE is moved, or checkpointed and restored.
#[derive(Debug, Parser)]
struct Arguments {
    /// Only these workloads or areas.
    #[arg(long, value_delimiter = ',')]
    only: Vec<String>,
    /// Go on after a failure.
    #[arg(long)]
    keep_going: bool,
    /// The OS template of the VEs.
    #[arg(long, default_value = "debian-12-minimal")]
    ostemplate: String,
    /// The name of the testbed.
    #[arg(long, default_value = "table")]
    name: String,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    if let Some(unknown) = arguments.only.iter().find(|name| named(name).is_empty()) {
        eprintln!("workloads: no workload or area is called {unknown}; see selfcheck list");
        return ExitCode::from(2);
    }
    match run(&arguments) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("workloads: {}", chaos_tests::chain(&error));
            ExitCode::from(2)
        }
    }
}

fn run(arguments: &Arguments) -> Result<bool, SceneError> {
    let mut table = Table::up(&arguments.name, &arguments.ostemplate)?;
    let (mut good, mut failed, mut notes) = (0, 0, Vec::new());
    println!("{}", heading());
    for area in table.areas(&arguments.only) {
        for row in table.area(&area)? {
            println!("{}", line(&row));
            for (way, cell) in &row.cells {
                match cell {
                    Cell::Good { .. } => good += 1,
                    Cell::Bad { what } => {
                        failed += 1;
                        notes.push(format!("{} {way}: {what}", row.name));
                    }
                    Cell::None { why } => notes.push(format!("{} is not {way}: {why}", row.name)),
                }
            }
        }
        if failed > 0 && !arguments.keep_going {
            break;
        }
    }
    println!();
    notes.iter().for_each(|note| println!("{note}"));
    println!("{good} ok, {failed} failed");
    Ok(failed == 0)
}

fn heading() -> String {
    let mut text = format!("{:<12} {:<22}", "area", "workload");
    for way in Way::ALL {
        text += &format!(" {:>12}", way.to_string());
    }
    text
}

fn line(row: &Row) -> String {
    let mut text = format!("{:<12} {:<22}", row.area, row.name);
    for (_, cell) in &row.cells {
        let shown = match cell {
            Cell::Good { checks } => checks.to_string(),
            Cell::Bad { .. } => "FAIL".to_owned(),
            Cell::None { .. } => "-".to_owned(),
        };
        text += &format!(" {shown:>12}");
    }
    text
}
