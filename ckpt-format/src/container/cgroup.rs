//! The VE's own tree of cgroups (cgroup v2).

use serde::{Deserialize, Serialize};

/// One cgroup, with who is in it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cgroup {
    /// The path from the top of the tree that the VE sees; empty for the top itself.
    pub path: String,
    /// The owner of the directory inside the VE: user and group.
    pub owner: (u32, u32),
    /// The permissions of the directory.
    pub mode: u32,
    /// The files that belong to somebody else than root, or have other permissions than a new
    /// one: name, user, group, permissions.
    pub files: Vec<(String, u32, u32, u32)>,
    /// The extended attributes of the directory.
    pub attributes: Vec<(Vec<u8>, Vec<u8>)>,
    /// What is set in its files, in the order in which it can be set.
    pub settings: Vec<Setting>,
    /// True for a cgroup whose members are threads.
    pub threaded: bool,
    /// Set to be frozen by the VE itself.
    pub frozen: bool,
    /// The processes, or threads if it is `threaded`, as numbered in the VE. Nobody is told for
    /// the top: whoever is nowhere else is there.
    pub members: Vec<i32>,
}

/// What is set in one file of a cgroup.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Setting {
    /// The file.
    pub name: String,
    /// What was read, and can be written.
    pub value: String,
}
