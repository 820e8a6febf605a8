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
    /// Prints all figures for a monitoring system, in the OpenMetrics format.
    Metrics,
}

pub(crate) fn run(arguments: Vec<OsString>) -> ExitCode {
    let Arguments { common, command } = match talk::parse(arguments) {
        Ok(arguments) => arguments,
        Err(code) => return code,
    };
    let text = match command {
        Command::Status => common
            .call::<NodeStatus>(&Request::Node(NodeRequest::Status))
            .map(|status| format!("vzd {} running as pid {}", status.version, status.pid)),
        Command::Metrics => common
            .call::<String>(&Request::Node(NodeRequest::Metrics))
            .map(|text| text.trim_end().to_owned()),
    };
    talk::end(text.map(|text| {
        talk::print(&text);
        0
    }))
}
