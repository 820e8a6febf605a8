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
    fn a_unit_of_the_service_manager_is_no_place_for_ves() {
        let own = "5:memory:/a/b\n4:cpu,cpuacct:/system.slice/vzd.service\n0::/";
        assert_eq!(own_place(own, "memory"), Path::new("a/b"));
        assert_eq!(own_place(own, "cpu"), Path::new(""));
        assert_eq!(own_place(own, "pids"), Path::new(""));
    }
}
