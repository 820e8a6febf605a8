//! What there is to tell about VEs.

use serde::{Deserialize, Serialize};

use super::{ARRIVE, Runtime, Ve, VeId};
use crate::cgroup::{Limits, Usage};

/// What `vzctl status` tells.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// The number, or what was asked for if there is no such VE.
    pub ctid: String,
    /// It exists here.
    pub exists: bool,
    /// It runs here.
    pub running: bool,
    /// It lies here in a checkpoint.
    #[serde(default)]
    pub suspended: bool,
}

/// What `vzlist` tells.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[expect(missing_docs, reason = "they are the fields of vzlist by name")]
pub struct Listed {
    pub ctid: VeId,
    pub name: Option<String>,
    pub hostname: Option<String>,
    pub description: Option<String>,
    pub ostemplate: Option<String>,
    pub ip: Vec<String>,
    pub nameserver: Vec<String>,
    pub searchdomain: Vec<String>,
    pub status: String,
    pub onboot: bool,
    pub disabled: bool,
    pub private: String,
    pub mac: Option<String>,
    pub limits: Limits,
    pub usage: Usage,
    pub init_pid: Option<i32>,
    pub uptime_s: u64,
    pub operation: Option<String>,
}

impl Runtime {
    /// Tells about one VE, which need not exist.
    pub fn status(&self, ve: &str) -> Status {
        match self.find(ve) {
            Ok(found) => Status {
                ctid: found.id.to_string(),
                exists: true,
                running: found.running().is_some() && !arrives(&found) && !found.is_leaving(),
                suspended: found.is_suspended(),
            },
            Err(_) => {
                Status { ctid: ve.to_owned(), exists: false, running: false, suspended: false }
            }
        }
    }

    /// How many VEs there are of each status.
    pub fn count_by_status(&self) -> [(&'static str, i64); STATUSES.len()] {
        let all = self.all();
        let count = |wanted| all.iter().filter(|ve| status(ve) == wanted).count() as i64;
        STATUSES.map(|status| (status, count(status)))
    }

    /// Tells about all VEs.
    pub fn list(&self) -> Vec<Listed> {
        self.all().iter().map(|ve| listed(ve)).collect()
    }
}

/// Its processes are being made here, while it runs on another node.
fn arrives(ve: &Ve) -> bool {
    ve.operation() == Some(ARRIVE)
}

const STATUSES: [&str; 5] = ["arriving", "leaving", "running", "suspended", "stopped"];

fn status(ve: &Ve) -> &'static str {
    let [arriving, leaving, running, suspended, stopped] = STATUSES;
    match ve.running() {
        Some(_) if arrives(ve) => arriving,
        Some(_) if ve.is_leaving() => leaving,
        Some(_) => running,
        None if ve.is_suspended() => suspended,
        None => stopped,
    }
}

/// What is under way.
fn operation(ve: &Ve) -> Option<String> {
    let post_copy =
        || ve.missing().map(|bytes| format!("post-copy, {} MiB left", bytes.div_ceil(1 << 20)));
    ve.operation().map(str::to_owned).or_else(post_copy)
}

fn listed(ve: &Ve) -> Listed {
    let settings = ve.settings();
    let running = ve.running();
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    let now_s = now.unwrap_or_default().as_secs();
    Listed {
        ctid: ve.id,
        name: settings.name,
        hostname: settings.hostname,
        description: settings.description,
        ostemplate: settings.ostemplate,
        ip: settings.addresses.iter().map(|it| it.address().to_string()).collect(),
        nameserver: settings.nameservers,
        searchdomain: settings.search_domains,
        status: status(ve).to_owned(),
        onboot: settings.on_boot,
        disabled: settings.disabled,
        private: ve.paths.directory.display().to_string(),
        mac: settings.mac.map(|mac| mac.to_string()),
        limits: settings.limits,
        usage: running.as_ref().map(|it| it.cgroups.usage()).unwrap_or_default(),
        init_pid: running.as_ref().map(|it| it.init),
        uptime_s: running.map_or(0, |it| now_s.saturating_sub(it.started_s)),
        operation: operation(ve),
    }
}
