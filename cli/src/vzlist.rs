//! `vzlist`: the VEs of this host.

use std::{ffi::OsString, process::ExitCode};

use clap::Parser;
use node::{
    api::{Failure, Request, VeRequest},
    ve::Listed,
};

use crate::talk::{self, Common};

/// Lists the Virtual Environments of this host; without options, those that run.
#[derive(Debug, Parser)]
#[command(name = "vzlist", version)]
struct Arguments {
    #[command(flatten)]
    common: Common,
    /// All, not only those that run.
    #[arg(short, long)]
    all: bool,
    /// Only those that do not run.
    #[arg(short = 'S', long)]
    stopped: bool,
    /// Show names instead of host names.
    #[arg(short = 'n', long)]
    name: bool,
    /// No header line.
    #[arg(short = 'H', long)]
    no_header: bool,
    /// Print JSON.
    #[arg(short = 'j', long)]
    json: bool,
    /// Numbers only.
    #[arg(short = '1')]
    numbers: bool,
    /// Which fields to show, separated by commas.
    #[arg(short = 'o', long, value_name = "FIELD,…")]
    output: Option<String>,
    /// List the fields.
    #[arg(short = 'L', long)]
    list: bool,
    /// Sort by a field; `-FIELD` the other way round.
    #[arg(short = 's', long, value_name = "[-]FIELD", allow_hyphen_values = true)]
    sort: Option<String>,
    /// Only these VEs.
    ctid: Vec<String>,
}

/// A field: its name, its header, its width, and how it is found.
struct Field {
    name: &'static str,
    header: &'static str,
    width: usize,
    right: bool,
    value: fn(&Listed) -> String,
}

const fn field(
    name: &'static str,
    header: &'static str,
    width: usize,
    right: bool,
    value: fn(&Listed) -> String,
) -> Field {
    Field { name, header, width, right, value }
}

const FIELDS: &[Field] = &[
    field("ctid", "CTID", 10, true, |ve| ve.ctid.to_string()),
    field("numproc", "NPROC", 10, true, |ve| count(ve, ve.usage.processes)),
    field("status", "STATUS", 9, false, |ve| ve.status.clone()),
    field("ip", "IP_ADDR", 15, false, |ve| words(&ve.ip)),
    field("hostname", "HOSTNAME", 32, false, |ve| text(ve.hostname.as_ref())),
    field("name", "NAME", 32, false, |ve| text(ve.name.as_ref())),
    field("description", "DESCRIPTION", 32, false, |ve| text(ve.description.as_ref())),
    field("ostemplate", "OSTEMPLATE", 24, false, |ve| text(ve.ostemplate.as_ref())),
    field("nameserver", "NAMESERVER", 15, false, |ve| words(&ve.nameserver)),
    field("searchdomain", "SEARCHDOMAIN", 15, false, |ve| words(&ve.searchdomain)),
    field("onboot", "ONBOOT", 6, true, |ve| yes(ve.onboot)),
    field("disabled", "DISABL", 6, true, |ve| yes(ve.disabled)),
    field("private", "PRIVATE", 32, false, |ve| ve.private.clone()),
    field("mac", "MAC", 17, false, |ve| text(ve.mac.as_ref())),
    field("uptime", "UPTIME", 12, true, |ve| ve.uptime_s.to_string()),
    field("physpages", "PHYSP", 10, true, |ve| count(ve, ve.usage.memory_bytes / 4096)),
    field("physpages.l", "PHYSP.L", 10, true, |ve| {
        limit(ve.limits.memory_bytes.map(|it| it / 4096))
    }),
    field("swappages.l", "SWAPP.L", 10, true, |ve| limit(ve.limits.swap_bytes.map(|it| it / 4096))),
    field("numproc.l", "NPROC.L", 10, true, |ve| limit(ve.limits.processes)),
    field("cpuunits", "CPUUNI", 8, true, |ve| ve.limits.cpu_units.unwrap_or(1000).to_string()),
    field("cpulimit", "CPUL", 6, true, |ve| ve.limits.cpu_percent.unwrap_or(0).to_string()),
];

fn text(text: Option<&String>) -> String {
    text.cloned().unwrap_or_else(|| "-".to_owned())
}

fn words(words: &[String]) -> String {
    if words.is_empty() { "-".to_owned() } else { words.join(" ") }
}

fn yes(it: bool) -> String {
    if it { "yes" } else { "no" }.to_owned()
}

fn count(ve: &Listed, count: u64) -> String {
    if ve.init_pid.is_some() { count.to_string() } else { "-".to_owned() }
}

/// OpenVZ shows no limit as the largest long.
fn limit(limit: Option<u64>) -> String {
    limit.unwrap_or(i64::MAX.cast_unsigned()).to_string()
}

pub(crate) fn run(arguments: Vec<OsString>) -> ExitCode {
    match talk::parse::<Arguments>(arguments) {
        Ok(arguments) => talk::end(list(&arguments)),
        Err(code) => code,
    }
}

fn list(arguments: &Arguments) -> Result<u8, Failure> {
    if arguments.list {
        for field in FIELDS {
            talk::print(&format!("{:<15} {}", field.name, field.header));
        }
        return Ok(0);
    }
    let fields = fields(arguments)?;
    let mut ves: Vec<Listed> = arguments.common.call(&Request::Ve(VeRequest::List))?;
    if let Some(missing) = arguments.ctid.iter().find(|it| !ves.iter().any(|ve| is(ve, it))) {
        let message = format!("Container {missing} does not exist");
        return Err(Failure::new("ve-unknown", 1, message));
    }
    let named = !arguments.ctid.is_empty();
    ves.retain(|ve| match (named, arguments.stopped) {
        (true, _) => arguments.ctid.iter().any(|it| is(ve, it)),
        (false, true) => ve.init_pid.is_none(),
        (false, false) => arguments.all || ve.init_pid.is_some(),
    });
    if let Some(sort) = &arguments.sort {
        let (name, backwards) = match sort.strip_prefix('-') {
            Some(name) => (name, true),
            None => (sort.as_str(), false),
        };
        let value = find(name)?.value;
        // Numbers by size, the rest by letters.
        ves.sort_by_key(|ve| {
            let text = value(ve);
            (text.parse::<u64>().unwrap_or(0), text)
        });
        if backwards {
            ves.reverse();
        }
    }
    if arguments.json {
        talk::print(&serde_json::json!(ves).to_string());
        return Ok(0);
    }
    if !arguments.no_header && !arguments.numbers {
        talk::print(&line(&fields, |field| field.header.to_owned()));
    }
    for ve in &ves {
        talk::print(&match arguments.numbers {
            true => ve.ctid.to_string(),
            false => line(&fields, |field| (field.value)(ve)),
        });
    }
    Ok(0)
}

fn is(ve: &Listed, text: &str) -> bool {
    ve.ctid.to_string() == text || ve.name.as_deref() == Some(text)
}

fn fields(arguments: &Arguments) -> Result<Vec<&'static Field>, Failure> {
    let last = if arguments.name { "name" } else { "hostname" };
    let names =
        arguments.output.clone().unwrap_or_else(|| format!("ctid,numproc,status,ip,{last}"));
    names.split(',').map(find).collect()
}

fn find(name: &str) -> Result<&'static Field, Failure> {
    let bad = || {
        Failure::new("bad-field", talk::BAD_OPTION.into(), format!("unknown field: {name}"))
            .with_hint("vzlist -L lists the fields")
    };
    FIELDS.iter().find(|field| field.name == name).ok_or_else(bad)
}

fn line(fields: &[&Field], value: impl Fn(&Field) -> String) -> String {
    let cells = fields.iter().map(|field| {
        let (text, width) = (value(field), field.width);
        if field.right { format!("{text:>width$}") } else { format!("{text:<width$}") }
    });
    cells.collect::<Vec<_>>().join(" ").trim_end().to_owned()
}
