//! `vzcluster`: make a cluster, join it, look at it.

use std::{ffi::OsString, process::ExitCode};

use clap::{Parser, Subcommand};
use node::api::{ClusterRequest, Failure, MemberView, Request};
use node::cluster::{ClusterStatus, Missing, NodeState, NodeView, VeView, obstacle};

use crate::talk::{self, Common};

/// Makes a cluster, joins it, and looks at it.
#[derive(Debug, Parser)]
#[command(name = "vzcluster", version)]
struct Arguments {
    #[command(flatten)]
    common: Common,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Make this node the first of a cluster that others can join.
    Init {
        #[command(flatten)]
        place: Place,
    },
    /// Print a token, good for one other node to join.
    Token {
        /// How long it is good for: seconds, or a number with s, m, h or d.
        #[arg(long, value_name = "TIME", default_value = "1h", value_parser = duration)]
        ttl: u64,
    },
    /// Enter a cluster, with the VEs of this node.
    Join {
        /// What `vzcluster token` printed on a member.
        token: String,
        #[command(flatten)]
        place: Place,
    },
    /// Show the nodes, the leader, who answers, and who owns which VE.
    Status {
        /// As one JSON object.
        #[arg(short, long)]
        json: bool,
    },
    /// Say of each host what it lacks, and between which of them VEs can move; exit 1 if anything
    /// that is needed is missing.
    Check {
        /// As one JSON object.
        #[arg(short, long)]
        json: bool,
    },
    /// Limit what the moves from each node may send together while their VEs run.
    Bandwidth {
        /// Bytes per second, with K, M or G as in vzctl, or `unlimited`.
        #[arg(value_name = "RATE", value_parser = talk::rate)]
        limit: talk::Rate,
    },
    /// Remove another node that owns no VE. It may be dead.
    Remove {
        /// Its name or number.
        node: String,
    },
}

/// What this node is called, and where the others reach it.
#[derive(Debug, clap::Args)]
struct Place {
    /// What this node is called. Its host name by default.
    #[arg(long)]
    name: Option<String>,
    /// Where the others reach this node. By default the address towards other networks.
    #[arg(long, value_name = "IP[:PORT]")]
    address: Option<String>,
}

pub(crate) fn run(arguments: Vec<OsString>) -> ExitCode {
    let Arguments { common, command } = match talk::parse(arguments) {
        Ok(arguments) => arguments,
        Err(code) => return code,
    };
    talk::end(carry_out(&common, command))
}

fn carry_out(common: &Common, command: Command) -> Result<u8, Failure> {
    match command {
        Command::Init { place: Place { name, address } } => {
            let request = Request::Cluster(ClusterRequest::Init { name, address });
            let member: MemberView = common.call(&request)?;
            eprintln!("{} is the first node of a cluster, at {}", member.name, member.address);
        }
        Command::Token { ttl } => {
            let request = Request::Cluster(ClusterRequest::Token { lifetime_seconds: ttl });
            let token: String = common.call(&request)?;
            talk::print(&token);
        }
        Command::Join { token, place: Place { name, address } } => {
            let request = Request::Cluster(ClusterRequest::Join { token, name, address });
            let member: MemberView = common.call(&request)?;
            eprintln!("joined as {}, node {}, at {}", member.name, member.node, member.address);
            if !member.reached {
                eprintln!("warning: the other nodes have not reached this one yet");
                eprintln!("hint: is {} right, as the others see it?", member.address);
            }
        }
        Command::Status { json } => {
            let status: ClusterStatus = common.call(&Request::Cluster(ClusterRequest::Status))?;
            if json {
                let text = serde_json::to_string(&status).expect("a status is plain data");
                talk::print(&text);
            } else {
                show(&status);
            }
        }
        Command::Check { json } => return check(common, json),
        Command::Bandwidth { limit } => {
            let request = ClusterRequest::Bandwidth { limit: limit.0 };
            let () = common.call(&Request::Cluster(request))?;
        }
        Command::Remove { node } => {
            let request = Request::Cluster(ClusterRequest::Remove { node: node.clone() });
            let _: u64 = common.call(&request)?;
            eprintln!("{node} is removed");
        }
    }
    Ok(0)
}

/// Exit status of `check` when a host lacks something that is needed, or VEs cannot move.
const LACKING: u8 = 1;

fn check(common: &Common, json: bool) -> Result<u8, Failure> {
    let status: ClusterStatus = common.call(&Request::Cluster(ClusterRequest::Check))?;
    let mut good = true;
    let hosts: Vec<_> =
        status.nodes.iter().filter_map(|node| Some((node, node.host.as_ref()?))).collect();
    let mut lines = Vec::new();
    for node in &status.nodes {
        let Some(host) = &node.host else {
            good = false;
            let problem = node.problem.as_deref().unwrap_or("it does not answer");
            lines.push(format!("{}: {problem}", node.name));
            continue;
        };
        let needed = host.missing.iter().any(|missing| missing.needed);
        good &= !needed;
        let verdict = if needed { "cannot run or move VEs" } else { "all that is needed is there" };
        lines.push(format!("{}: Linux {}: {verdict}", node.name, host.kernel));
        for missing in &host.missing {
            let Missing { name, purpose, cause, hint, needed } = missing;
            let kind = if *needed { "missing" } else { "wanted" };
            lines.push(format!("  {kind}: {name} ({cause}), for {purpose}; {hint}"));
        }
    }
    for (from, one) in &hosts {
        for (to, other) in hosts.iter().filter(|(to, _)| to.id != from.id) {
            if let Some(obstacle) = obstacle(one, other) {
                good = false;
                lines.push(format!("{} cannot move VEs to {}: {obstacle}", from.name, to.name));
            }
        }
    }
    talk::print(&match json {
        true => serde_json::json!({ "ok": good, "nodes": status.nodes }).to_string(),
        false => lines.join("\n"),
    });
    Ok(if good { 0 } else { LACKING })
}

fn show(status: &ClusterStatus) {
    let leader = status.leader.as_deref().unwrap_or("none");
    let state = match (status.clustered, status.confirmed) {
        _ if status.removed => "this node was removed from it; what follows may be old",
        (false, _) => "alone",
        (true, true) => "working",
        (true, false) => "no majority answers; what follows may be old",
    };
    talk::print(&format!("cluster {}: {state}, leader {leader}", status.cluster));
    if let Some(bandwidth) = status.bandwidth {
        talk::print(&format!("moves from each node send at most {bandwidth} bytes per second"));
    }
    let mut table =
        vec![["NODE", "STATE", "ADDRESS", "ROLE", "PROTOCOL", "VERSION", "VES"].map(str::to_owned)];
    table.extend(status.nodes.iter().map(node_row));
    print_table(&table);
    for node in &status.nodes {
        if let Some(problem) = &node.problem {
            eprintln!("{}: {problem}", node.name);
        }
    }
    if !status.ves.is_empty() {
        talk::print("");
        let mut table =
            vec![["CTID", "NAME", "OWNER", "EPOCH", "DESIRED", "MOVING TO"].map(str::to_owned)];
        table.extend(status.ves.iter().map(ve_row));
        print_table(&table);
    }
}

fn node_row(node: &NodeView) -> [String; 7] {
    let state = match (&node.state, node.answer_ms) {
        (NodeState::Here, _) => "here".to_owned(),
        (NodeState::Reachable, Some(ms)) => format!("answers in {ms:.1} ms"),
        (NodeState::Reachable, None) => "answers".to_owned(),
        (NodeState::Unreachable, _) => "unreachable".to_owned(),
        (NodeState::Incompatible, _) => "incompatible".to_owned(),
    };
    let role = match (node.leader, node.voter) {
        (true, _) => "leader",
        (false, true) => "voter",
        (false, false) => "listener",
    };
    [
        node.name.clone(),
        state,
        node.address.map_or_else(|| "-".to_owned(), |address| address.to_string()),
        role.to_owned(),
        node.protocol.to_string(),
        node.version.clone().unwrap_or_else(|| "-".to_owned()),
        node.ves.to_string(),
    ]
}

fn ve_row(ve: &VeView) -> [String; 6] {
    let desired = match ve.desired {
        node::cluster::Desired::Running => "running",
        node::cluster::Desired::Stopped => "stopped",
    };
    [
        ve.ctid.to_string(),
        ve.name.clone().unwrap_or_else(|| "-".to_owned()),
        ve.owner.clone(),
        ve.epoch.to_string(),
        desired.to_owned(),
        ve.moving_to.clone().unwrap_or_else(|| "-".to_owned()),
    ]
}

/// Prints rows in columns as wide as they need to be.
fn print_table<const COLUMNS: usize>(rows: &[[String; COLUMNS]]) {
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max();
    let widths: [usize; COLUMNS] = std::array::from_fn(|column| width(column).unwrap_or(0));
    for row in rows {
        let cells = row.iter().zip(widths).map(|(cell, width)| format!("{cell:<width$}"));
        talk::print(cells.collect::<Vec<_>>().join("  ").trim_end());
    }
}

/// A length of time in seconds.
fn duration(text: &str) -> Result<u64, String> {
    let bad = || format!("{text} is no length of time; try 3600, 90s, 30m, 2h or 1d");
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let number: u64 = digits.parse().map_err(|_| bad())?;
    let factor = match &text[digits.len()..] {
        "" | "s" => 1,
        "m" => 60,
        "h" => 3600,
        "d" => 86400,
        _ => return Err(bad()),
    };
    number.checked_mul(factor).filter(|&seconds| seconds > 0).ok_or_else(bad)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lengths_of_time_are_read_with_their_unit() {
        let read = |text| duration(text).ok();
        assert_eq!(read("90"), Some(90));
        assert_eq!(read("30m"), Some(1800));
        assert_eq!(read("2h"), Some(7200));
        assert_eq!(read("1d"), Some(86400));
        for bad in
            ["", "h", "0", "-1", "1w", "1hh", "99999999999999999999", "18446744073709551615d"]
        {
            assert_eq!(read(bad), None, "{bad}");
        }
    }
}
