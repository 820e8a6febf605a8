//! What is remembered about a testbed between commands, as JSON in its directory.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::PathBuf,
};

use serde::{Deserialize, Serialize};

use super::{
    Options, TestbedError,
    daemon::Daemon,
    names::{Host, Layout},
    rate::Rate,
    system,
};

/// The state of a testbed.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct State {
    /// It was brought up to the end.
    pub(super) complete: bool,
    /// How many nodes.
    pub(super) node_count: u8,
    /// Where the programs are.
    pub(super) programs: PathBuf,
    /// Where templates are kept.
    pub(super) templates: PathBuf,
    /// The daemons by node.
    pub(super) daemons: BTreeMap<String, Daemon>,
    /// The pairs of hosts between which nothing passes.
    pub(super) cuts: BTreeSet<(String, String)>,
    /// The limits by host.
    pub(super) rates: BTreeMap<String, Rate>,
}

/// How a node is.
#[derive(Clone, Debug, Serialize)]
pub struct NodeStatus {
    /// The host's name.
    pub host: String,
    /// Its address.
    pub address: std::net::Ipv4Addr,
    /// The number of its daemon when that runs; none for the client.
    pub daemon: Option<i32>,
    /// The hosts from which it is cut off.
    pub cut_from: Vec<String>,
    /// The limit of its link.
    pub rate: Option<Rate>,
    /// The log of its daemon.
    pub log: Option<PathBuf>,
}

impl State {
    pub(super) fn new(options: &Options) -> Self {
        Self {
            complete: false,
            node_count: u8::try_from(options.nodes).expect("checked: at most 64"),
            programs: options.programs.clone(),
            templates: options.templates.clone(),
            daemons: BTreeMap::new(),
            cuts: BTreeSet::new(),
            rates: BTreeMap::new(),
        }
    }

    /// Reads what was remembered; none when there is no testbed.
    pub(super) fn load(layout: &Layout) -> Result<Option<Self>, TestbedError> {
        let path = layout.directory().join("state.json");
        match std::fs::read(&path) {
            // What cannot be read was written half: the testbed is not up.
            Ok(bytes) => Ok(serde_json::from_slice(&bytes).ok()),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(system("read", path)(error)),
        }
    }

    pub(super) fn save(&self, layout: &Layout) -> Result<(), TestbedError> {
        let path = layout.directory().join("state.json");
        let new = path.with_extension("new");
        let text = serde_json::to_vec_pretty(self).expect("plain data");
        std::fs::write(&new, text).map_err(system("write", &new))?;
        std::fs::rename(&new, &path).map_err(system("write", &path))
    }

    pub(super) fn nodes(&self) -> Vec<Host> {
        (1..=self.node_count).map(Host::Node).collect()
    }

    pub(super) fn hosts(&self) -> Vec<Host> {
        let mut hosts = self.nodes();
        hosts.push(Host::Client);
        hosts
    }

    pub(super) fn add_cut(&mut self, one: &Host, other: &Host) {
        let mut pair = [one.to_string(), other.to_string()];
        pair.sort();
        let [one, other] = pair;
        self.cuts.insert((one, other));
    }

    pub(super) fn status(&self, layout: &Layout) -> Vec<NodeStatus> {
        let one = |host: &Host| {
            let name = host.to_string();
            let cut_from = self.cuts.iter().filter_map(|(one, other)| match &name {
                name if name == one => Some(other.clone()),
                name if name == other => Some(one.clone()),
                _ => None,
            });
            NodeStatus {
                address: host.address(),
                daemon: self.daemons.get(&name).filter(|d| d.is_running()).map(Daemon::pid),
                cut_from: cut_from.collect(),
                rate: self.rates.get(&name).copied(),
                log: matches!(host, Host::Node(_)).then(|| layout.log(host)),
                host: name,
            }
        };
        self.hosts().iter().map(one).collect()
    }
}
