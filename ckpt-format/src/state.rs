//! Everything about a frozen VE that is not memory or files.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::{
    container::{Cgroup, Clocks},
    files::Files,
    network::Network,
    process::{Descriptor, Processes},
};

/// What is captured of a VE once it stands still, beside its memory and its files.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct State {
    /// The processes.
    pub processes: Processes,
    /// What is open.
    pub files: Files,
    /// The descriptor table of each process.
    pub tables: BTreeMap<i32, Vec<Descriptor>>,
    /// The cgroups that the VE manages itself, parents first.
    #[serde(default)]
    pub cgroups: Vec<Cgroup>,
    /// Links, addresses, routes and neighbours at the freeze.
    pub network: Network,
    /// The same for the networks that programs have made.
    #[serde(default)]
    pub nested_networks: Vec<Network>,
    /// What the VE's clocks showed at the freeze: they never show less afterwards.
    pub clocks: Clocks,
    /// How far the VE's clocks are ahead of those of the host that it was captured on.
    pub clock_offsets: Clocks,
}
