//! `vzmigrate`: moves a running VE to another node.

use std::{ffi::OsString, process::ExitCode};

use clap::{Parser, ValueEnum};
use node::{
    api::{Failure, Request},
    migration::{MAX_DOWNTIME_DEFAULT_MS, MigrateRequest, Report},
};

use crate::talk::{self, Bar, Common};

/// Moves a running Virtual Environment to another node of the cluster, with its memory, its
/// processes and its open connections.
#[derive(Debug, Parser)]
#[command(name = "vzmigrate", version)]
struct Arguments {
    #[command(flatten)]
    common: Common,
    /// Move it while it runs. This is the default, and the only way.
    #[arg(long, visible_alias = "live")]
    online: bool,
    /// Only check whether it would work; change nothing.
    #[arg(short = 'c', long, visible_alias = "dry-run")]
    check_only: bool,
    /// Freeze it at once and copy everything while it stands still: the whole move is the
    /// blackout. For comparison, and for a VE that nobody waits for.
    #[arg(long, conflicts_with = "max_downtime")]
    no_precopy: bool,
    /// The blackout that is acceptable, in milliseconds.
    #[arg(long, value_name = "MS", default_value_t = MAX_DOWNTIME_DEFAULT_MS)]
    max_downtime: u64,
    /// Rather leave the VE where it is than stop it for longer than that.
    #[arg(long)]
    strict: bool,
    /// If nothing else meets --max-downtime, let the VE run on the target before all its memory is
    /// there. From then on until the last page has come it needs both hosts: if this one is lost
    /// meanwhile, the VE is lost with it.
    #[arg(long, conflicts_with = "no_precopy")]
    postcopy: bool,
    /// The most that is sent while the VE runs: bytes per second, with K, M or G.
    #[arg(long, value_name = "RATE", default_value = "unlimited", value_parser = talk::rate)]
    bwlimit: talk::Rate,
    /// Remove the VE's files from the source after the move.
    #[arg(short = 'r', long = "remove-area", value_name = "yes|no", default_value = "yes")]
    remove: Answer,
    /// Print one JSON object as the last line.
    #[arg(long)]
    json: bool,
    /// The node to move it to.
    node: String,
    /// The VE, by number or name.
    ve: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Answer {
    Yes,
    No,
}

/// Runs the program.
pub(crate) fn run(arguments: Vec<OsString>) -> ExitCode {
    match talk::parse::<Arguments>(arguments) {
        Ok(arguments) => {
            let json = arguments.json;
            talk::end(migrate(&arguments).inspect_err(|failure| {
                if json && let Ok(line) = serde_json::to_string(failure) {
                    talk::print(&line);
                }
            }))
        }
        // vzmigrate has always said 1 for a wrong command line.
        Err(code) if code == ExitCode::from(talk::BAD_OPTION) => ExitCode::from(1),
        Err(code) => code,
    }
}

fn migrate(arguments: &Arguments) -> Result<u8, Failure> {
    let request = Request::Migrate(MigrateRequest {
        ve: arguments.ve.clone(),
        node: arguments.node.clone(),
        check_only: arguments.check_only,
        max_downtime_ms: arguments.max_downtime,
        keep: arguments.remove == Answer::No,
        strict: arguments.strict,
        bandwidth: arguments.bwlimit.0,
        no_precopy: arguments.no_precopy,
        postcopy: arguments.postcopy,
    });
    let client = arguments.common.connect()?;
    talk::cancel_on_interrupt(&client)?;
    let mut bar = Bar::default();
    let report: Option<Report> = client.call(&request, &[], &mut |event, _| bar.show(event))?;
    drop(bar);
    match report {
        None if arguments.json => talk::print(
            &serde_json::json!({ "ve": arguments.ve, "target": arguments.node, "check": "ok" })
                .to_string(),
        ),
        None => talk::print(&format!("{} can be moved to {}", arguments.ve, arguments.node)),
        Some(report) if arguments.json => {
            talk::print(&serde_json::to_string(&report).expect("a report is plain data"));
        }
        Some(report) => talk::print(&report.to_string()),
    }
    Ok(0)
}
