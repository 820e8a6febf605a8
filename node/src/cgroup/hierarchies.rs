//! Which cgroup hierarchies this host has.

use std::{
    fs,
    path::{Path, PathBuf},
};

use super::{CgroupError, Controller};

/// The cgroup hierarchies of this host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hierarchies {
    /// Where cgroup v2 is mounted.
    pub unified: PathBuf,
    /// The controllers that it has.
    pub controllers: Vec<Controller>,
    /// Where the controllers that it lacks can be used: the daemon's own place in the v1
    /// hierarchies, so that what limits the daemon limits its VEs.
    pub legacy: Vec<(Controller, PathBuf)>,
}

impl Hierarchies {
    /// How much more memory the VEs below `parent` may use, in bytes, where that or a cgroup
    /// above it has a limit. Cached files that would give way at once count as free.
    pub fn memory_room(&self, parent: &str) -> Option<u64> {
        let unified = self.controllers.contains(&Controller::Memory);
        let mut legacy = self.legacy.iter();
        let top = match legacy.find(|(controller, _)| *controller == Controller::Memory) {
            Some((_, top)) => top,
            None if unified => &self.unified,
            None => return None,
        };
        let [limit, usage, cache] = match unified {
            true => ["memory.max", "memory.current", "inactive_file"],
            false => ["memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"],
        };
        // The host's own directories above the mount have no such files.
        let below = top.join(parent);
        let rooms = below.ancestors().filter_map(|directory| {
            let number = |name: &str| fs::read_to_string(directory.join(name)).ok();
            let limit: u64 = number(limit)?.trim().parse().ok()?;
            let usage: u64 = number(usage)?.trim().parse().ok()?;
            let cached = number("memory.stat").and_then(|text| statistic(&text, cache));
            Some(limit.saturating_sub(usage.saturating_sub(cached.unwrap_or(0))))
        });
        rooms.min()
    }

    /// Looks at the mounts of this host.
    pub fn find() -> Result<Self, CgroupError> {
        let read =
            |path: &str| fs::read_to_string(path).map_err(super::failed("read", Path::new(path)));
        let mounts = read("/proc/self/mountinfo")?;
        let own = read("/proc/self/cgroup")?;
        let unified = mount(&mounts, "cgroup2", None).ok_or(CgroupError::NoUnified)?;
        let listed = fs::read_to_string(unified.join("cgroup.controllers")).unwrap_or_default();
        let has = |it: &Controller| listed.split_whitespace().any(|name| name == it.name());
        let (controllers, missing): (Vec<_>, Vec<_>) = Controller::ALL.into_iter().partition(has);
        let legacy = missing.into_iter().filter_map(|controller| {
            let top = mount(&mounts, "cgroup", Some(controller.name()))?;
            Some((controller, top.join(own_place(&own, controller.name()))))
        });
        Ok(Self { unified, controllers, legacy: legacy.collect() })
    }
}

/// Where a file system is mounted as a whole, with an option among those of its superblock.
fn mount(mounts: &str, kind: &str, option: Option<&str>) -> Option<PathBuf> {
    mounts.lines().find_map(|line| {
        let (left, right) = line.split_once(" - ")?;
        let mut right = right.split(' ');
        let kind_fits = right.next() == Some(kind);
        let options = right.nth(1)?;
        let option_fits = option.is_none_or(|it| options.split(',').any(|found| found == it));
        let point = left.split(' ').nth(4)?;
        (kind_fits && option_fits).then(|| point.into())
    })
}

/// A number in `memory.stat`.
fn statistic(text: &str, name: &str) -> Option<u64> {
    text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' ')?.parse().ok())
}

/// The daemon's own path in a v1 hierarchy. A unit of the service manager is left for its
/// parent: the manager may remove the unit's cgroup while VEs go on.
fn own_place(own: &str, controller: &str) -> PathBuf {
    let path = own.lines().find_map(|line| {
        let mut parts = line.splitn(3, ':');
        let names = parts.nth(1)?;
        names.split(',').any(|name| name == controller).then(|| parts.next())?
    });
    let path = Path::new(path.unwrap_or("/").trim_start_matches('/'));
    let unit = path.extension().is_some_and(|it| it == "service" || it == "scope");
    if unit { PathBuf::new() } else { path.to_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hierarchies_are_found_by_their_options() {
        let mounts = "30 20 0:26 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct\n\
                      31 20 0:27 / /sys/fs/cgroup/unified rw shared:3 - cgroup2 cgroup2 rw";
        assert_eq!(
            mount(mounts, "cgroup", Some("cpu")).unwrap(),
            Path::new("/sys/fs/cgroup/cpu,cpuacct")
        );
        assert_eq!(mount(mounts, "cgroup", Some("memory")), None);
        assert_eq!(mount(mounts, "cgroup2", None).unwrap(), Path::new("/sys/fs/cgroup/unified"));
    }

    #[test]
    fn the_tightest_limit_above_the_ves_counts() {
        let top = tempfile::tempdir().unwrap();
        let write = |path: &str, text: &str| {
            let path = top.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        };
        write("a/memory.max", "1000\n");
        write("a/memory.current", "700\n");
        write("a/memory.stat", "anon 500\ninactive_file 200\n");
        write("a/vz/memory.max", "max\n");
        write("a/vz/memory.current", "700\n");
        let mut hierarchies = Hierarchies {
            unified: top.path().to_owned(),
            controllers: vec![Controller::Memory],
            legacy: Vec::new(),
        };
        assert_eq!(hierarchies.memory_room("a/vz"), Some(500));
        assert_eq!(hierarchies.memory_room("b/vz"), None);
        hierarchies.controllers.clear();
        assert_eq!(hierarchies.memory_room("a/vz"), None);
    }

    #[test]
    fn a_unit_of_the_service_manager_is_no_place_for_ves() {
        let own = "5:memory:/a/b\n4:cpu,cpuacct:/system.slice/vzd.service\n0::/";
        assert_eq!(own_place(own, "memory"), Path::new("a/b"));
        assert_eq!(own_place(own, "cpu"), Path::new(""));
        assert_eq!(own_place(own, "pids"), Path::new(""));
    }
}
