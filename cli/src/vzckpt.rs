//! `vzckpt`: what is in a checkpoint file. Needs no daemon.

use std::{ffi::OsString, path::PathBuf, process::ExitCode};

use clap::{Parser, Subcommand};
use node::{
    api::{Event, Failure, Progress},
    image::{InspectedProcess, Inspection},
};

use crate::{
    checkpoint::size,
    talk::{self, Bar},
};

/// Looks at checkpoints of Virtual Environments. Each command reads all of the file and refuses
/// one that is damaged anywhere.
#[derive(Debug, Parser)]
#[command(name = "vzckpt", version)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Show what a checkpoint holds.
    Inspect(File),
    /// Tell whether a checkpoint is whole.
    Verify(File),
}

#[derive(Debug, clap::Args)]
struct File {
    /// The checkpoint.
    file: PathBuf,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

/// Runs the program.
pub(crate) fn run(arguments: Vec<OsString>) -> ExitCode {
    match talk::parse::<Arguments>(arguments) {
        Ok(arguments) => talk::end(execute(&arguments.command)),
        Err(code) => code,
    }
}

fn execute(command: &Command) -> Result<u8, Failure> {
    let (Command::Inspect(file) | Command::Verify(file)) = command;
    let found = look(file).inspect_err(|failure| {
        if file.json
            && let Ok(line) = serde_json::to_string(failure)
        {
            talk::print(&line);
        }
    })?;
    match command {
        Command::Inspect(_) if file.json => {
            talk::print(&serde_json::to_string(&found).expect("plain data"));
        }
        Command::Inspect(_) => show(&found),
        Command::Verify(_) if file.json => talk::print(
            &serde_json::json!({ "file": file.file, "ve": found.ve, "verify": "ok" }).to_string(),
        ),
        Command::Verify(_) => talk::print(&format!(
            "{} is whole: container {}, {}, {} chunks",
            file.file.display(),
            found.ve,
            size(found.file_bytes),
            found.chunks
        )),
    }
    Ok(0)
}

fn look(file: &File) -> Result<Inspection, Failure> {
    let mut bar = Bar::default();
    let mut progress = |done, total| {
        let (step, unit) = ("reading the checkpoint".to_owned(), "bytes".to_owned());
        bar.show(Event::Progress(Progress { step, done, total: Some(total), unit }));
    };
    Ok(Inspection::of(&file.file, &mut progress)?)
}

fn show(found: &Inspection) {
    let line = |name: &str, value: String| talk::print(&format!("{name:<12} {value}"));
    let summary = &found.summary;
    line("container", format!("{} {}", found.ve, found.hostname));
    line("addresses", found.addresses.join(" "));
    line(
        "written",
        format!("by {} on kernel {}, {} s after 1970", found.writer, found.kernel, found.created_s),
    );
    line(
        "format",
        format!("version {}, {} chunks, {}", found.version, found.chunks, size(found.file_bytes)),
    );
    line("template", found.template.clone());
    line(
        "memory",
        format!(
            "{}, of that {} zeros and {} repeated",
            size(summary.memory_bytes),
            size(summary.zero_bytes),
            size(summary.repeated_bytes)
        ),
    );
    line(
        "own files",
        match found.with_files {
            true => format!("all, {}", size(summary.file_bytes)),
            false => format!("{} listed; a restore needs them as they were", found.listed_files),
        },
    );
    let kinds: Vec<_> =
        found.open_files.iter().map(|(kind, count)| format!("{count} {kind}")).collect();
    line("open files", format!("{}: {}", summary.open_files, kinds.join(", ")));
    talk::print("");
    talk::print("   PID  PARENT  THREADS    FDS  AREAS      MEMORY     UID  COMMAND");
    for process in &found.processes {
        let InspectedProcess { pid, parent, threads, descriptors, areas, uid, command, .. } =
            process;
        let memory = size(process.memory_bytes);
        talk::print(&format!(
            "{pid:>6}  {parent:>6}  {threads:>7}  {descriptors:>5}  {areas:>5}  {memory:>10}  {uid:>6}  {command}"
        ));
    }
}
