//! What a node of a testbed holds: to prove that a VE that has left, left nothing.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use super::Scene;
use crate::testbed::Host;

/// Everything on a node that a VE could have left there.
#[derive(Clone, Debug, Default)]
pub struct Traces {
    /// Cgroups of VEs, in every hierarchy.
    pub cgroups: BTreeSet<PathBuf>,
    /// Processes in them, by command.
    pub processes: BTreeSet<String>,
    /// Network links of the host.
    pub links: BTreeSet<String>,
    /// Mounts that the daemon sees.
    pub mounts: BTreeSet<String>,
    /// Files of the daemon's state, without the cluster's own.
    pub files: BTreeSet<PathBuf>,
    /// Descriptors that the daemon holds.
    pub descriptors: usize,
    /// Memory that the daemon uses.
    pub resident_kib: u64,
}

impl Traces {
    /// Looks at a node.
    pub fn of(scene: &Scene, node: Host) -> Self {
        let daemon = scene
            .testbed
            .status()
            .into_iter()
            .find(|status| status.host == node.to_string())
            .and_then(|status| status.daemon);
        let mut traces = Self::default();
        let below = format!("ferry-testbed-{}/{node}/ve", scene.name());
        for mount in cgroup_mounts() {
            walk(&mount, &mut |path| {
                let text = path.to_string_lossy();
                if path.is_dir() && text.contains(&below) && !text.ends_with(&below) {
                    traces.cgroups.insert(path.to_path_buf());
                }
            });
        }
        traces.processes = processes_below(&below);
        walk(&scene.testbed.node_directory(&node), &mut |path| {
            let text = path.to_string_lossy();
            if !text.contains("/cluster") && !text.contains("/run/") {
                traces.files.insert(path.to_path_buf());
            }
        });
        let Some(pid) = daemon else { return traces };
        let read =
            |name: &str| fs::read_to_string(format!("/proc/{pid}/{name}")).unwrap_or_default();
        traces.links = read("net/dev")
            .lines()
            .filter_map(|line| Some(line.split_once(':')?.0.trim().to_owned()))
            .collect();
        traces.mounts = read("mountinfo")
            .lines()
            .filter_map(|line| line.split(' ').nth(4).map(str::to_owned))
            .collect();
        traces.descriptors = fs::read_dir(format!("/proc/{pid}/fd")).map_or(0, Iterator::count);
        traces.resident_kib = read("status")
            .lines()
            .find_map(|line| line.strip_prefix("VmRSS:")?.trim().strip_suffix(" kB")?.parse().ok())
            .unwrap_or(0);
        traces
    }

    /// What is here and was not there before.
    pub fn beyond(&self, before: &Self) -> Vec<String> {
        let mut more = Vec::new();
        let mut add = |what: &str, things: Vec<String>| {
            more.extend(things.into_iter().map(|thing| format!("{what} {thing}")));
        };
        add("cgroup", new_paths(&self.cgroups, &before.cgroups));
        add("process", self.processes.difference(&before.processes).cloned().collect());
        add("link", self.links.difference(&before.links).cloned().collect());
        add("mount", self.mounts.difference(&before.mounts).cloned().collect());
        add("file", new_paths(&self.files, &before.files));
        more
    }
}

fn new_paths(now: &BTreeSet<PathBuf>, before: &BTreeSet<PathBuf>) -> Vec<String> {
    now.difference(before).map(|path| path.display().to_string()).collect()
}

pub(super) fn cgroup_mounts() -> Vec<PathBuf> {
    let text = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    text.lines()
        .filter(|line| line.contains(" - cgroup ") || line.contains(" - cgroup2 "))
        .filter_map(|line| line.split(' ').nth(4).map(PathBuf::from))
        .collect()
}

fn processes_below(cgroup: &str) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let path = entry.path();
        // It may end while we look.
        let cgroups = fs::read_to_string(path.join("cgroup")).unwrap_or_default();
        if cgroups.contains(cgroup) {
            let command = fs::read_to_string(path.join("comm")).unwrap_or_default();
            found.insert(format!("{} {}", entry.file_name().to_string_lossy(), command.trim()));
        }
    }
    found
}

/// Visits every folder and file below a place, without following links or entering mounted VEs.
fn walk(place: &Path, visit: &mut impl FnMut(&Path)) {
    for entry in fs::read_dir(place).into_iter().flatten().flatten() {
        let path = entry.path();
        visit(&path);
        let is_folder = entry.file_type().is_ok_and(|kind| kind.is_dir());
        if is_folder && path.components().count() < 40 {
            walk(&path, visit);
        }
    }
}
