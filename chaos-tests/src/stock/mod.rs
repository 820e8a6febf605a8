//! A stock Debian in a VE: what an ordinary server runs, with clients that are connected all the
//! time, moved and checkpointed again and again. Nobody may notice, and the VE itself least of all.

mod clients;
mod inside;
mod session;
mod template;

use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::Value;

use self::clients::{Clients, Jail};
use self::inside::State;
use crate::client::remote::RemoteError;
use crate::scene::{Scene, SceneError};
use crate::testbed::{DEFAULT_TEMPLATES, Host, TestbedError};

const VE: &str = "101";
const ADDRESS: &str = "10.77.1.1";

/// What is to be done.
#[derive(Clone, Debug)]
pub struct Plan {
    /// The release: a template that comes with Ferry.
    pub release: String,
    /// Moves to the other node and back.
    pub moves: u32,
    /// Checkpoints, each restored on the same node.
    pub checkpoints: u32,
    /// Programs in Java, Go and Node.js, too. Their compilers take long to install.
    pub languages: bool,
    /// The name of the testbed.
    pub name: String,
}

/// Why the plan could not be carried out to its end.
#[derive(Debug, thiserror::Error)]
pub enum StockError {
    /// The scene failed.
    #[error(transparent)]
    Scene(#[from] SceneError),
    /// The testbed failed.
    #[error("the testbed failed")]
    Testbed(#[from] TestbedError),
    /// The load on redis failed.
    #[error("the client of redis failed")]
    Client(#[from] RemoteError),
    /// A client could not be started.
    #[error("the client {what} cannot be used")]
    NoClient {
        /// Its program.
        what: &'static str,
    },
    /// A program said something else than expected.
    #[error("{who} said {said:?}")]
    Answer {
        /// The program.
        who: &'static str,
        /// Its words.
        said: String,
        /// Why they are no answer.
        source: serde_json::Error,
    },
    /// A call of our own failed.
    #[error("cannot {what}")]
    Call {
        /// What was to be done.
        what: &'static str,
        /// Why it failed.
        source: std::io::Error,
    },
}

impl StockError {
    fn call(what: &'static str) -> impl FnOnce(std::io::Error) -> Self {
        move |source| Self::Call { what, source }
    }
}

/// One line of what came of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Row {
    /// Who says it.
    pub name: String,
    /// What.
    pub said: String,
    /// Whether it is as it should be.
    pub good: bool,
    /// What is wrong, if something is.
    pub complaints: Vec<String>,
}

impl Row {
    fn new(name: &str, said: impl Into<String>, good: bool) -> Self {
        Self { name: name.to_owned(), said: said.into(), good, complaints: Vec::new() }
    }

    fn with(mut self, complaints: Vec<String>) -> Self {
        self.complaints = complaints;
        self
    }

    /// What is good if there are none of these.
    fn none_of(name: &str, what: &str, found: Vec<String>) -> Self {
        Self::new(name, format!("{} {what}", found.len()), found.is_empty()).with(found)
    }
}

/// A stock VE on a testbed of two nodes.
#[derive(Debug)]
struct Stock<'a> {
    plan: &'a Plan,
    scene: Scene,
    node: Host,
    dump: PathBuf,
}

/// Builds the template of the plan, unless there is one: that takes minutes.
pub fn make_template(plan: &Plan) -> Result<(), StockError> {
    let template = template::describe(Path::new(DEFAULT_TEMPLATES), &plan.release, plan.languages)
        .map_err(StockError::call("describe the template"))?;
    let scene = Scene::up(&plan.name, 1)?;
    scene.good(Host::Node(1), &["vzpkg", "create", "cache", &template])?;
    Ok(())
}

/// Carries the plan out. `tell` is told what goes on; what came of it is returned.
pub fn play(plan: &Plan, tell: &mut dyn FnMut(&str)) -> Result<Vec<Row>, StockError> {
    let templates = Path::new(DEFAULT_TEMPLATES);
    let template = template::describe(templates, &plan.release, plan.languages)
        .map_err(StockError::call("describe the template"))?;
    let scene = Scene::up(&plan.name, 2)?;
    tell(&format!("a VE from {template}"));
    let node = Host::Node(1);
    let dump = scene.testbed.node_directory(&node).join("stock.dump");
    let mut stock = Stock { plan, scene, node, dump };
    stock.create(&template)?;
    let root = template::unpacked(templates, &template)
        .map_err(StockError::call("find the files of the template"))?;
    let own = tempfile::tempdir().map_err(StockError::call("make a directory"))?;
    let jail = Jail { root, own };
    stock.prepare(&jail.make_key(&stock.scene)?)?;
    let clients = Clients::start(&stock.scene, &jail, plan.languages)?;
    // What clients bring about by connecting is no effect of a move.
    stock.pause(Duration::from_secs(3));
    let before = stock.state()?;
    let mut rows = vec![stock.act(tell)?];
    stock.pause(Duration::from_secs(2));
    let after = stock.state()?;
    rows.push(Row::none_of("systemd", "units failed", after.failed_since(&before)));
    rows.push(Row::none_of("services", "not the same", after.restarted_since(&before)));
    // Nor is what they bring about by leaving.
    rows.push(Row::none_of("journal", "new complaints", after.complaints_since(&before)));
    let (said, letters) = clients.stop()?;
    rows.extend(said);
    rows.extend(stock.contents(letters)?);
    Ok(rows)
}

impl Stock<'_> {
    fn create(&self, template: &str) -> Result<(), StockError> {
        let address = format!("{ADDRESS}/16");
        let words = ["--ipadd", &address, "--hostname", "stock", "--ram", "2G"];
        let create = [&["vzctl", "create", VE, "--ostemplate", template][..], &words].concat();
        self.scene.good(self.node, &create)?;
        self.scene.good(self.node, &["vzctl", "start", VE, "--wait"])?;
        Ok(())
    }

    /// Lets the client in, and fills the database.
    fn prepare(&self, key: &str) -> Result<(), StockError> {
        let key = key.trim();
        self.inside(&format!("mkdir -p /root/.ssh && echo '{key}' > /root/.ssh/authorized_keys"))?;
        let ready = "su postgres -c 'psql -c \"select 1\"' && redis-cli ping";
        self.scene.wait("the databases", 60, || {
            Ok(self.scene.run(self.node, &["vzctl", "exec2", VE, ready])?.code == Some(0))
        })?;
        self.inside("su postgres -c 'createdb bench && pgbench --initialize --quiet bench'")?;
        Ok(())
    }

    fn inside(&self, line: &str) -> Result<String, StockError> {
        Ok(self.scene.inside(self.node, VE, line)?)
    }

    fn state(&self) -> Result<State, StockError> {
        let failed = self.inside(inside::FAILED)?;
        let services = self.inside(inside::SERVICES)?;
        let (journal, logs) = (self.inside(inside::JOURNAL)?, self.inside(inside::LOGS)?);
        Ok(State::new(&failed, &services, &journal, &logs))
    }

    /// Moves and checkpoints, spread evenly.
    fn act(&mut self, tell: &mut dyn FnMut(&str)) -> Result<Row, StockError> {
        let Plan { moves, checkpoints, .. } = *self.plan;
        let (all, mut downtimes, mut restored) = (moves + checkpoints, Vec::new(), 0);
        for turn in 0..all {
            let due = u64::from(turn + 1) * u64::from(checkpoints) / u64::from(all);
            if due > restored {
                restored += 1;
                self.checkpoint()?;
                tell(&format!("checkpoint {restored} of {checkpoints}, restored on {}", self.node));
            } else {
                let downtime = self.move_on()?;
                downtimes.push(downtime);
                let (number, node) = (downtimes.len(), self.node);
                tell(&format!("move {number} of {moves} to {node}, downtime {downtime:.0} ms"));
            }
            self.pause(Duration::from_millis(500));
        }
        downtimes.sort_by(f64::total_cmp);
        let median = downtimes.get(downtimes.len() / 2).copied().unwrap_or(0.0);
        let longest = downtimes.last().copied().unwrap_or(0.0);
        let said = format!(
            "{moves} moves, downtime median {median:.0} ms, longest {longest:.0} ms; \
             {checkpoints} checkpoints"
        );
        Ok(Row::new("Ferry", said, true))
    }

    fn move_on(&mut self) -> Result<f64, StockError> {
        let target = if self.node == Host::Node(1) { Host::Node(2) } else { Host::Node(1) };
        let name = target.to_string();
        let words = ["vzmigrate", "--online", "--json", &name, VE];
        let said = self.scene.good(self.node, &words)?;
        self.node = target;
        let last = said.lines().last().unwrap_or_default().to_owned();
        let report: Value = serde_json::from_str(&last).map_err(|source| StockError::Answer {
            who: "vzmigrate",
            said: last,
            source,
        })?;
        Ok(report["downtime_ms"]["total"].as_f64().unwrap_or(0.0))
    }

    fn checkpoint(&self) -> Result<(), StockError> {
        let dump = self.dump.to_string_lossy();
        for verb in ["chkpnt", "restore"] {
            self.scene.good(self.node, &["vzctl", verb, VE, "--dumpfile", &dump])?;
        }
        std::fs::remove_file(&self.dump).map_err(StockError::call("remove the checkpoint"))
    }

    /// What the services have kept, by their own means.
    fn contents(&self, letters: u64) -> Result<Vec<Row>, StockError> {
        let mut rows = Vec::new();
        for (name, said, line) in [
            ("pg_amcheck", "all tables and indexes whole", inside::AMCHECK),
            ("redis-check", "log and dump whole", inside::REDIS),
        ] {
            let ran = self.scene.run(self.node, &["vzctl", "exec2", VE, line])?;
            let wrong = format!("{}{}", ran.stdout, ran.stderr);
            rows.push(match ran.code {
                Some(0) => Row::new(name, said, true),
                _ => {
                    Row::new(name, "damage", false).with(wrong.lines().map(str::to_owned).collect())
                }
            });
        }
        let sums = self.inside(inside::SUMS)?;
        rows.push(Row::new(
            "sums of pgbench",
            format!("agree: {}", sums.trim()),
            sums.trim() == "t",
        ));
        let mut found = 0;
        // The last ones are on their way to the mailbox.
        let all_there = self.scene.wait("letters", 60, || {
            let text = self.scene.inside(self.node, VE, inside::LETTERS)?;
            found = text.trim().parse().unwrap_or(0);
            Ok(found >= letters)
        });
        let said = format!("{found} of {letters} letters in the mailbox");
        rows.push(Row::new("exim4", said, all_there.is_ok() && found == letters));
        let (ticks, gap) = inside::gap(&self.inside(inside::TICKS)?);
        let missing = gap.map(|(one, next)| format!("{next} comes after {one}"));
        rows.push(
            Row::new("rsyslog", format!("{ticks} lines"), missing.is_none() && ticks > 0)
                .with(missing.into_iter().collect()),
        );
        let (runs, minutes) = inside::minutes(&self.inside(inside::MINUTES)?);
        rows.push(Row::new("cron", format!("{runs} runs in {minutes} minutes"), runs == minutes));
        Ok(rows)
    }

    /// Lets the VE run for a while.
    fn pause(&self, time: Duration) {
        std::thread::sleep(time);
    }
}
