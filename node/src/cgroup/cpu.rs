//! Slowing a VE down for a while, and giving it back exactly the CPU time that it had.

use std::{
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

use serde::{Deserialize, Serialize};

use super::{CgroupError, Cgroups, Controller, failed, write};

/// The period of a limit that is set for a while, in microseconds: short, so that a VE which has
/// used up its share does not stand still for as long as its clients would notice.
const SHORT_PERIOD_US: u64 = 10_000;
/// The longest period and the smallest quota that the kernel takes, in microseconds.
const LONGEST_PERIOD_US: u64 = 1_000_000;
const SMALLEST_QUOTA_US: u64 = 1_000;
/// More than all CPUs of any host, in any period.
const WIDE_QUOTA_US: u64 = 10_000_000_000;

/// The limit of a VE's CPU time as it was at one moment, as data: whoever has it can put it back.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CpuLimit {
    /// What to write where, in this order.
    writes: Vec<(PathBuf, String)>,
}

impl CpuLimit {
    /// True if it limits nothing.
    pub fn is_unlimited(&self) -> bool {
        let quota = self.writes.last().and_then(|(_, value)| value.split(' ').next());
        matches!(quota, Some("max" | "-1"))
    }

    /// Puts it back.
    pub fn restore(&self) -> Result<(), CgroupError> {
        self.writes.iter().try_for_each(|(path, value)| write(path, value))
    }
}

impl Cgroups {
    /// The limit in force. None if this host cannot limit CPU time.
    pub fn cpu_limit(&self) -> Result<Option<CpuLimit>, CgroupError> {
        let Some(files) = self.cpu_files() else { return Ok(None) };
        let writes = match files {
            Files::Unified(max) => vec![(max.clone(), read(&max)?)],
            Files::Legacy { quota, period } => {
                let values = (read(&quota)?, read(&period)?);
                legacy_writes(quota, period, values)
            }
        };
        Ok(Some(CpuLimit { writes }))
    }

    /// Limits the VE to so many CPUs.
    pub fn limit_cpus(&self, cpus: f64) -> Result<(), CgroupError> {
        let files = self.cpu_files().ok_or(CgroupError::NoController { what: "CPU time" })?;
        let (quota_us, period_us) = quota_and_period(cpus);
        let writes = match files {
            Files::Unified(max) => vec![(max, format!("{quota_us} {period_us}"))],
            Files::Legacy { quota, period } => {
                legacy_writes(quota, period, (quota_us.to_string(), period_us.to_string()))
            }
        };
        CpuLimit { writes }.restore()
    }

    /// Makes a limit in force so large that it limits nothing, which is quick. To take the last
    /// limit of a host away is not: the kernel rewrites its own code then, for milliseconds.
    pub fn widen_cpu_limit(&self) -> Result<(), CgroupError> {
        match self.cpu_files() {
            None => Ok(()),
            Some(Files::Unified(max)) => {
                let text = read(&max)?;
                let period = text.split(' ').nth(1).unwrap_or("100000");
                write(&max, &format!("{WIDE_QUOTA_US} {period}"))
            }
            // Refused if the cgroup above is limited; then the slow way is the only one.
            Some(Files::Legacy { quota, .. }) => {
                write(&quota, &WIDE_QUOTA_US.to_string()).or_else(|_| write(&quota, "-1"))
            }
        }
    }

    /// The CPU time that the VE has used since it was started here.
    pub fn cpu_time(&self) -> Result<Duration, CgroupError> {
        // Every v2 cgroup counts it, also without the controller.
        let path = self.unified.join("cpu.stat");
        let text = read(&path)?;
        let used = text.lines().find_map(|line| line.strip_prefix("usage_usec ")?.parse().ok());
        Ok(Duration::from_micros(used.unwrap_or(0)))
    }

    fn cpu_files(&self) -> Option<Files> {
        if self.controllers.contains(&Controller::Cpu) {
            return Some(Files::Unified(self.unified.join("cpu.max")));
        }
        let directory = self.legacy(Controller::Cpu)?;
        let quota = directory.join("cpu.cfs_quota_us");
        // A kernel without bandwidth control has no such file.
        let period = directory.join("cpu.cfs_period_us");
        quota.exists().then_some(Files::Legacy { quota, period })
    }
}

/// Where the limit is.
enum Files {
    Unified(PathBuf),
    Legacy { quota: PathBuf, period: PathBuf },
}

/// v1 checks quota against period at every write; without a quota any period will do.
fn legacy_writes(
    quota: PathBuf,
    period: PathBuf,
    values: (String, String),
) -> Vec<(PathBuf, String)> {
    vec![(quota.clone(), "-1".to_owned()), (period, values.1), (quota, values.0)]
}

fn read(path: &Path) -> Result<String, CgroupError> {
    fs::read_to_string(path).map(|it| it.trim().to_owned()).map_err(failed("read", path))
}

/// A quota and a period, in microseconds, that the kernel takes.
fn quota_and_period(cpus: f64) -> (u64, u64) {
    let period = (SMALLEST_QUOTA_US as f64 / cpus.max(f64::EPSILON)) as u64;
    let period = period.clamp(SHORT_PERIOD_US, LONGEST_PERIOD_US);
    let quota = (cpus * period as f64) as u64;
    (quota.max(SMALLEST_QUOTA_US), period)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_share_becomes_what_the_kernel_takes() {
        assert_eq!(quota_and_period(1.5), (15_000, 10_000));
        assert_eq!(quota_and_period(0.1), (1_000, 10_000));
        assert_eq!(quota_and_period(0.05), (1_000, 20_000));
        assert_eq!(quota_and_period(0.0), (1_000, 1_000_000));
    }

    /// A directory with the files of one hierarchy in it.
    fn cgroups(directory: &Path, unified: bool) -> Cgroups {
        let files: &[(&str, &str)] = match unified {
            true => &[("cpu.max", "150000 100000\n"), ("cpu.stat", "usage_usec 2500\nuser 1\n")],
            false => &[("cpu.cfs_quota_us", "150000\n"), ("cpu.cfs_period_us", "100000\n")],
        };
        for (name, value) in files {
            fs::write(directory.join(name), value).unwrap();
        }
        let legacy = vec![(Controller::Cpu, directory.to_owned())];
        let controllers = if unified { vec![Controller::Cpu] } else { Vec::new() };
        Cgroups { unified: directory.to_owned(), controllers, legacy }
    }

    #[test]
    fn a_limit_comes_back_as_it_was() {
        for unified in [true, false] {
            let directory = tempfile::tempdir().unwrap();
            let cgroups = cgroups(directory.path(), unified);
            let read = |name: &str| fs::read_to_string(directory.path().join(name)).unwrap();
            let own = cgroups.cpu_limit().unwrap().unwrap();
            assert!(!own.is_unlimited());
            cgroups.limit_cpus(0.25).unwrap();
            match unified {
                true => assert_eq!(read("cpu.max"), "2500 10000"),
                false => assert_eq!(read("cpu.cfs_quota_us"), "2500"),
            }
            cgroups.widen_cpu_limit().unwrap();
            own.restore().unwrap();
            match unified {
                true => assert_eq!(read("cpu.max"), "150000 100000"),
                false => {
                    let both = (read("cpu.cfs_quota_us"), read("cpu.cfs_period_us"));
                    assert_eq!(both, ("150000".to_owned(), "100000".to_owned()));
                }
            }
        }
    }

    #[test]
    fn a_host_without_the_controller_says_so() {
        let directory = tempfile::tempdir().unwrap();
        let unified = directory.path().to_owned();
        let cgroups = Cgroups { unified, controllers: Vec::new(), legacy: Vec::new() };
        assert_eq!(cgroups.cpu_limit().unwrap(), None);
        assert!(matches!(cgroups.limit_cpus(1.0), Err(CgroupError::NoController { .. })));
        cgroups.widen_cpu_limit().unwrap();
    }
}
