//! `vznode`: about the daemon of this host.

use std::{ffi::OsString, process::ExitCode};

use clap::{Parser, Subcommand};
use node::api::{NodeRequest, NodeStatus, Request};

use crate::talk::{self, Common};

/// Asks about the daemon of this host.
#[derive(Debug, Parser)]
#[command(name = "vznode", version)]
struct Arguments {
    #[command(flatten)]
    common: Common,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Tells whether the daemon answers, and its version.
    Status,
}

pub(crate) fn run(arguments: Vec<OsString>) -> ExitCode {
    let Arguments { common, command: Command::Status } = match talk::parse(arguments) {
        Ok(arguments) => arguments,
        Err(code) => return code,
    };
    talk::end(common.call::<NodeStatus>(&Request::Node(NodeRequest::Status)).map(|status| {
        talk::print(&format!("vzd {} running as pid {}", status.version, status.pid));
        0
    }))
}
