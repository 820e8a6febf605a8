//! The vz programs: one executable that is the program it is called as.
//!
//! `vzctl`, `vzlist`, `vzpkg` and so on are links to it; `vz PROGRAM …` works without links.
//! They all talk to the daemon of this host and to nothing else. Data goes to standard output,
//! talk to standard error.
#![forbid(unsafe_code)]
#![expect(clippy::print_stderr, reason = "printing is what they are for")]

mod checkpoint;
mod talk;
mod terminal;
mod vzckpt;
mod vzcluster;
mod vzctl;
mod vzlist;
mod vzmigrate;
mod vznode;
mod vzpkg;

use std::{ffi::OsString, path::Path, process::ExitCode};

/// A program: its name, and what runs it with its own name as the first argument.
type Program = (&'static str, fn(Vec<OsString>) -> ExitCode);

const PROGRAMS: &[Program] = &[
    ("vzckpt", vzckpt::run),
    ("vzcluster", vzcluster::run),
    ("vzctl", vzctl::run),
    ("vzlist", vzlist::run),
    ("vzmigrate", vzmigrate::run),
    ("vznode", vznode::run),
    ("vzpkg", vzpkg::run),
];

fn main() -> ExitCode {
    let mut arguments: Vec<OsString> = std::env::args_os().collect();
    if let Some(program) = arguments.first().and_then(find) {
        return program(arguments);
    }
    if !arguments.is_empty() {
        arguments.remove(0);
    }
    if let Some(program) = arguments.first().and_then(find) {
        return program(arguments);
    }
    let names: Vec<_> = PROGRAMS.iter().map(|(name, _)| *name).collect();
    eprintln!("usage: vz PROGRAM …, where PROGRAM is one of {}", names.join(", "));
    ExitCode::from(talk::BAD_OPTION)
}

fn find(name: &OsString) -> Option<fn(Vec<OsString>) -> ExitCode> {
    let name = Path::new(name).file_name()?;
    PROGRAMS.iter().find(|(program, _)| name == *program).map(|(_, run)| *run)
}
