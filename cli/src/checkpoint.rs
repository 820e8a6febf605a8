//! `vzctl chkpnt` and `vzctl restore`: VEs into files and back.

use std::path::PathBuf;

use clap::Args;
use node::{
    api::{Failure, Request},
    image::{COMPRESSION_DEFAULT, COMPRESSION_MAX},
    migration::{CheckpointReport, CheckpointRequest, DumpRequest, RestoreReport},
};
use serde::{Serialize, de::DeserializeOwned};

use crate::talk::{self, Bar, Common};

/// How to write a VE into a file.
#[derive(Debug, Args)]
pub(crate) struct Dump {
    /// The VE.
    ctid: String,
    /// The file; without it the VE is suspended, and the host keeps the file.
    #[arg(long, value_name = "FILE")]
    dumpfile: Option<PathBuf>,
    /// Let the VE go on afterwards. The checkpoint has all of the VE's own files then.
    #[arg(long, requires = "dumpfile")]
    leave_running: bool,
    /// Put all of the VE's own files into the checkpoint, so that it can be restored whatever
    /// becomes of them.
    #[arg(long, requires = "dumpfile")]
    with_files: bool,
    /// How hard to compress: 0 is not at all.
    #[arg(long, value_name = "LEVEL", default_value_t = COMPRESSION_DEFAULT,
        value_parser = clap::value_parser!(u8).range(0..=i64::from(COMPRESSION_MAX)))]
    compress: u8,
    /// Print one JSON object as the last line.
    #[arg(long)]
    json: bool,
}

/// How to bring a VE back from a file.
#[derive(Debug, Args)]
pub(crate) struct Restore {
    /// The VE.
    ctid: String,
    /// The file; without it the one that the host has kept.
    #[arg(long, value_name = "FILE")]
    dumpfile: Option<PathBuf>,
    /// Print one JSON object as the last line.
    #[arg(long)]
    json: bool,
}

/// Writes a VE into a file.
pub(crate) fn dump(common: &Common, dump: &Dump, say: &dyn Fn(&str)) -> Result<(), Failure> {
    let request = CheckpointRequest::Dump(DumpRequest {
        ve: dump.ctid.clone(),
        file: dump.dumpfile.as_ref().map(whole).transpose()?,
        leave_running: dump.leave_running,
        with_files: dump.with_files,
        compress: dump.compress,
    });
    let report: CheckpointReport = ask(common, request, dump.json)?;
    if dump.json {
        return print(&report);
    }
    let CheckpointReport { ve, file, bytes, processes, standstill_ms, total_ms, .. } = &report;
    let what = match (&dump.dumpfile, report.left_running) {
        (None, _) => format!("Container {ve} was suspended"),
        (Some(_), true) => format!("Container {ve} was written to {} and runs on", file.display()),
        (Some(_), false) => format!("Container {ve} was written to {}", file.display()),
    };
    say(&format!(
        "{what}: {processes} processes, {} in {:.1} s, standing still for {standstill_ms:.0} ms",
        size(*bytes),
        total_ms / 1000.0
    ));
    Ok(())
}

/// Brings a VE back from a file.
pub(crate) fn restore(
    common: &Common,
    restore: &Restore,
    say: &dyn Fn(&str),
) -> Result<(), Failure> {
    let file = restore.dumpfile.as_ref().map(whole).transpose()?;
    let request = CheckpointRequest::Restore { ve: restore.ctid.clone(), file };
    let report: RestoreReport = ask(common, request, restore.json)?;
    if restore.json {
        return print(&report);
    }
    let RestoreReport { ve, processes, total_ms, .. } = report;
    let what = if restore.dumpfile.is_some() { "restored" } else { "resumed" };
    let seconds = total_ms / 1000.0;
    say(&format!("Container {ve} was {what}: {processes} processes in {seconds:.1} s"));
    Ok(())
}

/// A size as people read it.
pub(crate) fn size(bytes: u64) -> String {
    indicatif::BinaryBytes(bytes).to_string()
}

/// The daemon has another working directory.
fn whole(path: &PathBuf) -> Result<PathBuf, Failure> {
    std::path::absolute(path)
        .map_err(|_| Failure::new("bad-value", 21, "--dumpfile takes the path of a file"))
}

fn ask<T: DeserializeOwned>(
    common: &Common,
    request: CheckpointRequest,
    json: bool,
) -> Result<T, Failure> {
    let client = common.connect()?;
    talk::cancel_on_interrupt(&client)?;
    let mut bar = Bar::default();
    let answer = client.call(&Request::Checkpoint(request), &[], &mut |event, _| bar.show(event));
    answer.inspect_err(|failure| {
        if json && let Ok(line) = serde_json::to_string(failure) {
            talk::print(&line);
        }
    })
}

fn print(report: &impl Serialize) -> Result<(), Failure> {
    talk::print(&serde_json::to_string(report).expect("a report is plain data"));
    Ok(())
}
