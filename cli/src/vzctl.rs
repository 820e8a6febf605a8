//! `vzctl`: creates, runs and changes VEs.

use std::{
    ffi::OsString,
    io::{self, IsTerminal},
    os::fd::AsFd,
    process::ExitCode,
};

use ckpt_format::blocker::{self, Blocker};
use clap::{Args, Parser, Subcommand};
use node::{
    api::{ExecRequest, Failure, Request, VeRequest},
    ve::{Changes, Created, Exec, Status, StopMode},
};

use crate::{
    checkpoint::{self, Dump, Restore},
    talk::{self, Common},
    terminal,
};

/// Creates, runs and changes Virtual Environments.
#[derive(Debug, Parser)]
#[command(name = "vzctl", version)]
struct Arguments {
    #[command(flatten)]
    common: Common,
    /// Say nothing that is not asked for.
    #[arg(long, global = true)]
    quiet: bool,
    /// Say more.
    #[arg(long, global = true)]
    verbose: bool,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Make a VE.
    Create {
        /// Its number, 101 or more.
        ctid: String,
        #[command(flatten)]
        options: Options,
    },
    /// Remove a VE with all its files.
    #[command(alias = "delete")]
    Destroy {
        /// The VE.
        ctid: String,
    },
    /// Start a VE.
    Start {
        /// The VE.
        ctid: String,
        /// Start it even if it is disabled.
        #[arg(long)]
        force: bool,
        /// Wait until its boot is complete.
        #[arg(long)]
        wait: bool,
    },
    /// Stop a VE.
    Stop {
        /// The VE.
        ctid: String,
        /// Kill it instead of letting it end in order.
        #[arg(long)]
        fast: bool,
    },
    /// Stop and start a VE.
    Restart {
        /// The VE.
        ctid: String,
        /// Kill it instead of letting it end in order.
        #[arg(long)]
        fast: bool,
        /// Wait until its boot is complete.
        #[arg(long)]
        wait: bool,
    },
    /// Tell whether a VE exists and runs.
    Status {
        /// The VE.
        ctid: String,
        /// Print JSON.
        #[arg(long)]
        json: bool,
    },
    /// List everything in a VE that would stop a move of it now; exit 8 if there is any.
    Check {
        /// The VE.
        ctid: String,
        /// Print JSON.
        #[arg(long)]
        json: bool,
    },
    /// Change settings of a VE.
    Set {
        /// The VE.
        ctid: String,
        #[command(flatten)]
        options: Options,
        /// Keep the change when the VE stops.
        #[arg(long)]
        save: bool,
    },
    /// Write a running VE into a file and end it; without --dumpfile the host keeps the file.
    #[command(visible_alias = "suspend")]
    Chkpnt(Dump),
    /// Bring a VE back from a file; without --dumpfile from the one that the host keeps.
    #[command(visible_alias = "resume")]
    Restore(Restore),
    /// Run a command line with the VE's shell; exit 8 if it fails.
    Exec(Run),
    /// Run a command line with the VE's shell, with its exit status.
    Exec2(Run),
    /// Open a shell in a VE.
    Enter {
        /// The VE.
        ctid: String,
        /// Run this instead of a login shell.
        #[arg(long, value_name = "COMMAND")]
        exec: Option<String>,
    },
}

/// A command line to run.
#[derive(Debug, Args)]
struct Run {
    /// The VE.
    ctid: String,
    /// The command; `-` reads a script from standard input.
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, required = true)]
    command: Vec<String>,
}

/// Settings.
#[derive(Debug, Args)]
struct Options {
    /// The OS template to make it from.
    #[arg(long)]
    ostemplate: Option<String>,
    /// A name to use beside the number.
    #[arg(long)]
    name: Option<String>,
    /// The host name.
    #[arg(long)]
    hostname: Option<String>,
    /// What it is for.
    #[arg(long)]
    description: Option<String>,
    /// Add an address.
    #[arg(long, value_name = "ADDRESS[/PREFIX]")]
    ipadd: Vec<String>,
    /// Remove an address, or `all`.
    #[arg(long, value_name = "ADDRESS|all")]
    ipdel: Vec<String>,
    /// The default gateway.
    #[arg(long = "gw", value_name = "ADDRESS")]
    gateway: Vec<String>,
    /// DNS servers.
    #[arg(long)]
    nameserver: Vec<String>,
    /// DNS search domains.
    #[arg(long)]
    searchdomain: Vec<String>,
    /// Memory, e.g. 512M.
    #[arg(long, alias = "physpages", value_name = "SIZE")]
    ram: Option<String>,
    /// Swap, e.g. 512M.
    #[arg(long, alias = "swappages", value_name = "SIZE")]
    swap: Option<String>,
    /// How many processes and threads.
    #[arg(long, value_name = "COUNT")]
    numproc: Option<String>,
    /// The share of CPU time, 8 to 500000; 1000 is usual.
    #[arg(long, value_name = "UNITS")]
    cpuunits: Option<String>,
    /// Percent of one CPU to use at most.
    #[arg(long, value_name = "PERCENT")]
    cpulimit: Option<String>,
    /// How many CPUs to use at most.
    #[arg(long, value_name = "COUNT")]
    cpus: Option<String>,
    /// Start it with the node: yes or no.
    #[arg(long, value_name = "yes|no")]
    onboot: Option<String>,
    /// Never start it: yes or no.
    #[arg(long, value_name = "yes|no")]
    disabled: Option<String>,
    /// How long an orderly stop may take, in seconds.
    #[arg(long, value_name = "SECONDS")]
    stop_timeout: Option<String>,
}

impl From<Options> for Changes {
    fn from(options: Options) -> Self {
        Self {
            name: options.name,
            hostname: options.hostname,
            description: options.description,
            ostemplate: options.ostemplate,
            ipadd: options.ipadd,
            ipdel: options.ipdel,
            gateway: options.gateway,
            nameserver: options.nameserver,
            searchdomain: options.searchdomain,
            ram: options.ram,
            swap: options.swap,
            numproc: options.numproc,
            cpuunits: options.cpuunits,
            cpulimit: options.cpulimit,
            cpus: options.cpus,
            onboot: options.onboot,
            disabled: options.disabled,
            stop_timeout: options.stop_timeout,
        }
    }
}

pub(crate) fn run(arguments: Vec<OsString>) -> ExitCode {
    match talk::parse::<Arguments>(arguments) {
        Ok(arguments) => talk::end(execute(arguments)),
        Err(code) => code,
    }
}

fn execute(arguments: Arguments) -> Result<u8, Failure> {
    let Arguments { common, quiet, command, .. } = arguments;
    let say = |line: &str| {
        if !quiet {
            talk::print(line);
        }
    };
    let ask = |request: VeRequest| common.call::<()>(&Request::Ve(request));
    let mode = |fast: bool| if fast { StopMode::Fast } else { StopMode::Orderly };
    match command {
        Command::Create { ctid, options } => {
            let request = VeRequest::Create { ve: ctid, changes: options.into() };
            let created: Created = common.call(&Request::Ve(request))?;
            say(&format!("Container {} was created", created.id));
        }
        Command::Destroy { ctid } => {
            ask(VeRequest::Destroy { ve: ctid.clone() })?;
            say(&format!("Container {ctid} was destroyed"));
        }
        Command::Start { ctid, force, wait } => {
            ask(VeRequest::Start { ve: ctid.clone(), force, wait })?;
            say(&format!("Container {ctid} was started"));
        }
        Command::Stop { ctid, fast } => {
            ask(VeRequest::Stop { ve: ctid.clone(), mode: mode(fast) })?;
            say(&format!("Container {ctid} was stopped"));
        }
        Command::Restart { ctid, fast, wait } => {
            ask(VeRequest::Restart { ve: ctid.clone(), mode: mode(fast), wait })?;
            say(&format!("Container {ctid} was restarted"));
        }
        Command::Set { ctid, options, save } => {
            ask(VeRequest::Set { ve: ctid.clone(), changes: options.into(), save })?;
            say(match save {
                true => "The settings were saved",
                false => "The settings are for this run only; --save keeps them",
            });
        }
        Command::Status { ctid, json } => {
            let status: Status = common.call(&Request::Ve(VeRequest::Status { ve: ctid }))?;
            talk::print(&status_line(&status, json));
        }
        Command::Chkpnt(dump) => checkpoint::dump(&common, &dump, &say)?,
        Command::Restore(restore) => checkpoint::restore(&common, &restore, &say)?,
        Command::Check { ctid, json } => return check(&common, ctid, json),
        Command::Exec(run) => {
            return Ok(if exec(&common, run)? == 0 { 0 } else { 8 });
        }
        Command::Exec2(run) => return exec(&common, run),
        Command::Enter { ctid, exec } => return terminal::enter(&common, &ctid, exec),
    }
    Ok(0)
}

/// Exit status when something would stop a move.
const BLOCKED: u8 = 8;

fn check(common: &Common, ctid: String, json: bool) -> Result<u8, Failure> {
    let request = Request::Ve(VeRequest::Check { ve: ctid.clone() });
    let blockers: Vec<Blocker> = common.call(&request)?;
    if json {
        talk::print(&serde_json::json!(blockers).to_string());
    } else if blockers.is_empty() {
        talk::print(&format!("{ctid} can be moved"));
    } else {
        talk::print(&blocker::lines(&blockers).join("\n"));
    }
    Ok(if blockers.is_empty() { 0 } else { BLOCKED })
}

fn status_line(status: &Status, json: bool) -> String {
    if json {
        return serde_json::json!(status).to_string();
    }
    let word = |it: bool, yes: &'static str, no: &'static str| if it { yes } else { no };
    let mut line = format!(
        "CTID {} {} {} {}",
        status.ctid,
        word(status.exists, "exist", "deleted"),
        // The files of a VE are in sight of its own processes only, so for as long as it runs.
        word(status.running, "mounted", "unmounted"),
        word(status.running, "running", "down"),
    );
    if status.suspended {
        line.push_str(" suspended");
    }
    line
}

fn exec(common: &Common, run: Run) -> Result<u8, Failure> {
    let mut arguments = vec!["/bin/sh".to_owned()];
    if run.command != ["-"] {
        // One shell word list, as a user of ssh expects it.
        arguments.extend(["-c".to_owned(), run.command.join(" ")]);
    }
    let exec = Exec { arguments, terminal: None };
    let request = Request::Ve(VeRequest::Exec(ExecRequest { ve: run.ctid, exec }));
    let (input, output, errors) = (io::stdin(), io::stdout(), io::stderr());
    let streams = [input.as_fd(), output.as_fd(), errors.as_fd()];
    let code: i32 = common.connect()?.call(&request, &streams, &mut |_, _| ())?;
    Ok(u8::try_from(code & 0xff).unwrap_or(255))
}

/// True if a user sits before both ends.
pub(crate) fn interactive() -> bool {
    io::stdin().is_terminal() && io::stdout().is_terminal()
}
