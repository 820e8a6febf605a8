//! The namespaces that programs inside a VE have made, below those of the VE itself.

use serde::{Deserialize, Serialize};

use super::{Clocks, Mount};
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
    /// User namespaces, each after its parent.
    #[serde(default)]
    pub users: Vec<Users>,
    /// Which user namespaces the others belong to.
    #[serde(default)]
    pub owners: Owners,
    /// Time namespaces: how far their clocks are ahead of those of the VE.
    #[serde(default)]
    pub times: Vec<Clocks>,
}

/// A user namespace: who is who in it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Users {
    /// The number of the namespace that it is in; 0 is the VE's own.
    pub parent: u32,
    /// The user who made it, as numbered in its parent.
    pub owner: u32,
    /// Its users.
    pub users: Vec<IdRange>,
    /// Its groups.
    pub groups: Vec<IdRange>,
    /// Whether its processes may not change their supplementary groups.
    pub groups_fixed: bool,
}

/// Ids in a row, and what they stand for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct IdRange {
    /// The first one inside.
    pub inside: u32,
    /// What it stands for in the parent.
    pub outside: u32,
    /// How many there are.
    pub count: u32,
}

/// The numbers of the user namespaces that others belong to, in the order of [`Nested`]. Those
/// that are not told belong to the VE's own.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Owners {
    /// Of the mount namespaces.
    pub mounts: Vec<u32>,
    /// Of the UTS namespaces.
    pub names: Vec<u32>,
    /// Of the IPC namespaces.
    pub ipcs: Vec<u32>,
    /// Of the network namespaces.
    pub networks: Vec<u32>,
    /// Of the pid namespaces. There are as many as there are numbers here.
    #[serde(default)]
    pub pids: Vec<u32>,
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
    /// Users and groups.
    #[serde(default)]
    pub user: u32,
    /// Process numbers.
    #[serde(default)]
    pub pid: u32,
    /// Process numbers of its children.
    #[serde(default)]
    pub children: Children,
    /// Clocks.
    #[serde(default)]
    pub time: u32,
    /// Clocks of its children.
    #[serde(default)]
    pub time_of_children: u32,
}

impl Namespaces {
    /// Those that the next child of the process begins with.
    #[must_use]
    pub fn of_child(self) -> Self {
        Self { time: self.time_of_children, ..self }
    }
}

/// The pid namespace that the next children of a process are born into.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Children {
    /// Its own.
    #[default]
    Own,
    /// The one that has this number, which it has joined.
    Joined(u32),
    /// One that it has made, and that nobody is in yet.
    New,
}
