//! The cgroups of a VE, as the host sees them.

use std::fs;
use std::path::PathBuf;

use super::{Scene, SceneError, call};
use crate::testbed::Host;

/// The cgroups of one start of a VE on one node.
#[derive(Clone, Debug)]
pub struct VeCgroups {
    places: Vec<PathBuf>,
}

impl VeCgroups {
    /// Finds those of a VE that is on a node.
    pub fn of(scene: &Scene, node: Host, ve: &str) -> Result<Self, SceneError> {
        let above = format!("ferry-testbed-{}/{node}/ve", scene.name());
        let mut places = Vec::new();
        for mount in super::traces::cgroup_mounts() {
            let children = fs::read_dir(mount.join(&above)).into_iter().flatten().flatten();
            let ours = |path: &PathBuf| {
                let name = path.file_name().map(|name| name.to_string_lossy().into_owned());
                name.is_some_and(|name| name.split_once('.').is_some_and(|(it, _)| it == ve))
            };
            places.extend(children.map(|entry| entry.path()).filter(ours));
        }
        if places.is_empty() {
            let missing = std::io::ErrorKind::NotFound.into();
            return Err(call("find the cgroups of a VE")(missing));
        }
        Ok(Self { places })
    }

    /// True while every process of the VE stands still.
    pub fn is_frozen(&self) -> bool {
        self.read("cgroup.events").is_some_and(|text| text.lines().any(|line| line == "frozen 1"))
    }

    /// The limit of CPU time in percent of one CPU; none without a limit.
    pub fn cpu_percent(&self) -> Option<u64> {
        let both = self.read("cpu.max").or_else(|| {
            let quota = self.read("cpu.cfs_quota_us")?;
            Some(format!("{} {}", quota.trim(), self.read("cpu.cfs_period_us")?))
        })?;
        let mut words = both.split_whitespace().map(str::parse::<u64>);
        let (quota, period) = (words.next()?.ok()?, words.next()?.ok()?);
        Some(quota * 100 / period.max(1))
    }

    /// Ends every process of the VE, also a frozen one.
    pub fn kill(&self) -> Result<(), SceneError> {
        let switches = self.places.iter().map(|place| place.join("cgroup.kill"));
        for switch in switches.filter(|switch| switch.exists()) {
            fs::write(switch, "1").map_err(call("end the processes of a VE"))?;
        }
        Ok(())
    }

    fn read(&self, file: &str) -> Option<String> {
        self.places.iter().find_map(|place| fs::read_to_string(place.join(file)).ok())
    }
}
