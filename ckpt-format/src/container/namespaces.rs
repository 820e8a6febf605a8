//! The namespaces that programs inside a VE have made, below those of the VE itself.

use serde::{Deserialize, Serialize};

use super::Mount;
use crate::network::Network;

/// The namespaces that programs have made, by kind. Number 0 of each kind is the VE's own and
/// not in here, so number `n` is at place `n - 1`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Nested {
    /// Mount namespaces: their mounts, as in [`super::Container::mounts`].
    pub mounts: Vec<Vec<Mount>>,
    /// UTS namespaces.
    pub names: Vec<Names>,
    /// How many IPC namespaces there are.
    pub ipcs: u32,
    /// Network namespaces.
    pub networks: Vec<Network>,
    /// Cgroup namespaces: their roots in the VE's tree.
    pub cgroups: Vec<String>,
}

/// What a UTS namespace holds.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Names {
    /// The host name.
    pub hostname: String,
    /// The NIS domain name.
    pub domainname: String,
}

/// The namespaces of a process by their numbers in [`Nested`]; 0 is the VE's own.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Namespaces {
    /// Mounts.
    pub mounts: u32,
    /// Host and domain name.
    pub names: u32,
    /// System V IPC and POSIX message queues.
    pub ipc: u32,
    /// Network.
    pub network: u32,
    /// Cgroups.
    pub cgroup: u32,
}
