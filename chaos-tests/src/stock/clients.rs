//! The clients of a stock VE. All of them are on the client host of the testbed, and each keeps
//! its connections from the beginning to the end.
//!
//! The programs among them that are not ours are those of the VE's own template: they run in its
//! files, in a mount namespace of their own, so nothing has to be installed on the machine.

use std::io::Read;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde::Deserialize;

use super::session::{Session, Talk};
use super::{ADDRESS, Row, StockError, template};
use crate::client::remote::RemoteLoad;
use crate::scene::Scene;
use crate::testbed::Host;

/// Enters the files of the template, with a layer above them that is gone with the command: `$1`
/// are they, `$2` is a directory of ours that is seen in `/mnt`, the rest is the command.
const ENTER: &str = "set -e
files=$1 own=$2 space=$2/space
shift 2
mkdir -p $space
mount -t tmpfs space $space
cd $space
mkdir upper work root
mount -t overlay root -o lowerdir=$files,upperdir=$space/upper,workdir=$space/work root
mkdir -p root/dev root/mnt
mount --rbind /dev root/dev
mount --bind $own root/mnt
exec chroot root \"$@\"";

/// Where the template is unpacked, and a directory for what clients need.
#[derive(Debug)]
pub(super) struct Jail {
    pub(super) root: PathBuf,
    pub(super) own: tempfile::TempDir,
}

impl Jail {
    /// A command of the template; the process becomes it.
    pub(super) fn command(&self, words: &[&str]) -> Command {
        let mut command = Command::new("unshare");
        command.args(["--mount", "--propagation", "private", "sh", "-c", ENTER, "enter"]);
        command.arg(&self.root).arg(self.own.path()).args(words);
        command
    }

    /// Makes a key for ssh and returns its public half.
    pub(super) fn make_key(&self, scene: &Scene) -> Result<String, StockError> {
        let words = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", "/mnt/key"];
        let mut command = self.command(&words);
        command.stdin(Stdio::null()).stdout(Stdio::null());
        let status = scene.testbed.spawn(&Host::Client, &mut command)?.wait();
        if !status.map_err(StockError::call("make a key"))?.success() {
            return Err(StockError::NoClient { what: "ssh-keygen" });
        }
        let key = self.own.path().join("key.pub");
        std::fs::read_to_string(key).map_err(StockError::call("read a key"))
    }
}

/// A child that is killed with its owner.
#[derive(Debug)]
struct Guarded(Child);

impl Drop for Guarded {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// All clients.
#[derive(Debug)]
pub(super) struct Clients {
    web: Guarded,
    shells: Vec<(&'static str, Session, Guarded)>,
    mail: Session,
    pgbench: Guarded,
    redis: RemoteLoad,
}

impl Clients {
    /// Starts them all.
    pub(super) fn start(scene: &Scene, jail: &Jail, languages: bool) -> Result<Self, StockError> {
        let shells = vec![shell(scene, jail, false)?, shell(scene, jail, true)?];
        Ok(Self {
            web: web(scene, languages)?,
            shells,
            mail: mail(scene),
            pgbench: pgbench(scene, jail)?,
            redis: scene.load(ADDRESS, 16, 4)?,
        })
    }

    /// Ends them and says what each has seen; also how many letters were taken.
    pub(super) fn stop(mut self) -> Result<(Vec<Row>, u64), StockError> {
        let mut rows = Vec::new();
        for (name, session, child) in self.shells {
            // Closing its input ends the session.
            let talk = session.stop();
            drop(child);
            rows.push(talk_row(name, "answers", &talk));
        }
        rows.extend(web_rows(&mut self.web.0)?);
        rows.push(pgbench_row(&mut self.pgbench.0)?);
        let verified = self.redis.verify()?;
        let (report, status) = self.redis.stop()?;
        let wrong = verified.wrong + report.wrong_answers;
        let said = format!(
            "{} requests, longest {:.0} ms; {} keys read back, {wrong} wrong",
            report.requests, report.longest_stall_ms, verified.verified_keys
        );
        let row = Row::new("redis", said, status.success() && wrong == 0 && report.is_clean());
        rows.push(row.with(report.complaints.clone()));
        let talk = self.mail.stop();
        rows.push(talk_row("exim4", "letters", &talk));
        Ok((rows, talk.answers))
    }
}

fn talk_row(name: &str, unit: &str, talk: &Talk) -> Row {
    let longest = talk.longest.as_millis();
    let said = format!("{} {unit}, longest {longest} ms", talk.answers);
    let good = talk.error.is_none() && talk.answers > 0;
    Row::new(name, said, good).with(talk.error.clone().into_iter().collect())
}

fn web(scene: &Scene, languages: bool) -> Result<Guarded, StockError> {
    let mut command = Command::new(scene.program("webclient"));
    command.args(["--pause", "20"]);
    command.arg(format!("http://{ADDRESS}:80/")).arg(format!("https://{ADDRESS}:443/"));
    let all = [template::PYTHON, template::JAVA, template::GO, template::NODE];
    for port in all.iter().take(if languages { all.len() } else { 1 }) {
        command.arg(format!("http://{ADDRESS}:{port}/"));
    }
    command.stdin(Stdio::piped()).stdout(Stdio::piped());
    Ok(Guarded(scene.testbed.spawn(&Host::Client, &mut command)?))
}

/// What `webclient` says of one connection.
#[derive(Debug, Deserialize)]
struct Visits {
    target: String,
    requests: u64,
    longest_ms: f64,
    error: Option<String>,
}

#[derive(Debug, Deserialize)]
struct AllVisits {
    visits: Vec<Visits>,
}

fn web_rows(child: &mut Child) -> Result<Vec<Row>, StockError> {
    drop(child.stdin.take());
    let text = rest_of(child)?;
    let all: AllVisits = serde_json::from_str(&text).map_err(|source| StockError::Answer {
        who: "webclient",
        said: text,
        source,
    })?;
    let row = |visits: &Visits| {
        let port = visits.target.trim_start_matches(ADDRESS);
        let name = match port.trim_matches([':', '/']) {
            "80" => "nginx".to_owned(),
            "443" => "nginx TLS".to_owned(),
            "7001" => "Python".to_owned(),
            "7002" => "Java".to_owned(),
            "7003" => "Go".to_owned(),
            "7004" => "Node.js".to_owned(),
            other => other.to_owned(),
        };
        let said = format!("{} requests, longest {:.0} ms", visits.requests, visits.longest_ms);
        Row::new(&name, said, visits.error.is_none() && visits.requests > 0)
            .with(visits.error.clone().into_iter().collect())
    };
    Ok(all.visits.iter().map(row).collect())
}

/// A session of ssh, with a terminal or without, in which a shell works and writes.
fn shell(
    scene: &Scene,
    jail: &Jail,
    terminal: bool,
) -> Result<(&'static str, Session, Guarded), StockError> {
    let at = format!("root@{ADDRESS}");
    let name = if terminal { "ssh terminal" } else { "ssh" };
    let quiet = if terminal { "stty -echo; " } else { "" };
    let line = format!(
        "{quiet}echo ready; while read -r n; do echo $n >> work-{terminal}; echo $((n * 2)); done"
    );
    let mut words = vec!["ssh", "-q", "-i", "/mnt/key", if terminal { "-tt" } else { "-T" }];
    for option in [
        "BatchMode=yes",
        "StrictHostKeyChecking=no",
        "UserKnownHostsFile=/mnt/hosts",
        "ServerAliveInterval=5",
        "ServerAliveCountMax=6",
    ] {
        words.extend(["-o", option]);
    }
    words.extend([at.as_str(), line.as_str()]);
    let mut command = jail.command(&words);
    command.stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut child = Guarded(scene.testbed.spawn(&Host::Client, &mut command)?);
    let (Some(input), Some(output)) = (child.0.stdin.take(), child.0.stdout.take()) else {
        return Err(StockError::NoClient { what: "ssh" });
    };
    Ok((name, Session::doubling(output, input), child))
}

fn mail(scene: &Scene) -> Session {
    let connect = scene.testbed.connector(&Host::Client);
    let address = format!("{ADDRESS}:25").parse::<SocketAddr>();
    let address = address.expect("our own constant is an address");
    Session::letters(move || connect.connect(address), "stock")
}

fn pgbench(scene: &Scene, jail: &Jail) -> Result<Guarded, StockError> {
    let program = find(&jail.root.join("usr/lib/postgresql"), "bin/pgbench")
        .ok_or(StockError::NoClient { what: "pgbench" })?;
    let program = format!("/usr/lib/postgresql/{program}");
    let mut words = vec![program.as_str(), "--host", ADDRESS, "--username", "postgres"];
    // It is told when to end. The rate leaves the machine time for the other clients.
    words.extend(["--client", "4", "--time", "1000000", "--rate", "50", "--no-vacuum", "bench"]);
    let mut command = jail.command(&words);
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    Ok(Guarded(scene.testbed.spawn(&Host::Client, &mut command)?))
}

fn find(directory: &Path, program: &str) -> Option<String> {
    let entries = std::fs::read_dir(directory).ok()?.flatten();
    let mut names = entries.map(|entry| entry.file_name().to_string_lossy().into_owned());
    let name = names.find(|name| directory.join(name).join(program).exists())?;
    Some(format!("{name}/{program}"))
}

fn pgbench_row(child: &mut Child) -> Result<Row, StockError> {
    // What its own timer would send at the end of its time: it lets each client finish.
    let pid = Pid::from_raw(child.id().cast_signed());
    kill(pid, Signal::SIGALRM).map_err(|errno| StockError::call("end pgbench")(errno.into()))?;
    let said = rest_of(child)?;
    let mut errors = String::new();
    if let Some(mut stderr) = child.stderr.take() {
        stderr.read_to_string(&mut errors).map_err(StockError::call("hear pgbench"))?;
    }
    let status = child.wait().map_err(StockError::call("wait for pgbench"))?;
    let line = |start: &str| {
        let mut lines = said.lines();
        lines.find_map(|line| line.strip_prefix(start)).unwrap_or("").trim().to_owned()
    };
    let done = line("number of transactions actually processed:");
    let failed = line("number of failed transactions:");
    let good = status.success() && failed.starts_with("0 ") && !done.is_empty() && done != "0";
    let said = format!("{done} transactions, {failed} failed");
    let complaints = errors.lines().filter(|line| line.contains("error:")).map(str::to_owned);
    Ok(Row::new("PostgreSQL", said, good).with(complaints.collect()))
}

fn rest_of(child: &mut Child) -> Result<String, StockError> {
    let mut text = String::new();
    if let Some(mut stdout) = child.stdout.take() {
        stdout.read_to_string(&mut text).map_err(StockError::call("hear a client"))?;
    }
    Ok(text)
}
