//! cgroup v2.

use std::{
    fs::File,
    io::{Read, Seek},
    os::fd::AsFd,
    path::Path,
    time::{Duration, Instant},
};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::{CgroupError, Controller, Limits, failed, write};

/// The length of a CPU limit's period, in microseconds.
pub(super) const PERIOD_US: u64 = 100_000;

/// Lets the cgroups below every directory of `relative` use controllers.
pub(super) fn enable(
    top: &Path,
    relative: &Path,
    controllers: &[Controller],
) -> Result<(), CgroupError> {
    let mut directory = top.to_owned();
    enable_here(&directory, controllers)?;
    for part in relative {
        directory.push(part);
        enable_here(&directory, controllers)?;
    }
    Ok(())
}

/// Lets the cgroups right below a directory use controllers.
pub(super) fn enable_here(directory: &Path, controllers: &[Controller]) -> Result<(), CgroupError> {
    for controller in controllers {
        write(&directory.join("cgroup.subtree_control"), &format!("+{}", controller.name()))?;
    }
    Ok(())
}

pub(super) fn apply(
    directory: &Path,
    controller: Controller,
    limits: &Limits,
) -> Result<(), CgroupError> {
    let set = |name: &str, value: String| write(&directory.join(name), &value);
    let number = |value: Option<u64>| value.map_or("max".to_owned(), |value| value.to_string());
    match controller {
        Controller::Memory => {
            set("memory.max", number(limits.memory_bytes))?;
            // A kernel without swap accounting has no such file.
            if directory.join("memory.swap.max").exists() {
                set("memory.swap.max", number(limits.swap_bytes))?;
            }
            Ok(())
        }
        Controller::Pids => set("pids.max", number(limits.processes)),
        Controller::Cpu => {
            set("cpu.weight", weight(limits.cpu_units).to_string())?;
            let quota = limits.cpu_percent.map(|percent| percent * PERIOD_US / 100);
            set("cpu.max", format!("{} {PERIOD_US}", number(quota)))
        }
    }
}

/// OpenVZ's 1000 is the kernel's 100.
fn weight(units: Option<u64>) -> u64 {
    units.map_or(100, |units| (units / 10).clamp(1, 10_000))
}

/// Waits until `cgroup.events` has a line. A cgroup that is gone has no processes.
pub(super) fn wait(
    directory: &Path,
    line: &str,
    state: &'static str,
    longest: Duration,
) -> Result<(), CgroupError> {
    let path = directory.join("cgroup.events");
    let mut file = File::open(&path).map_err(failed("open", &path))?;
    let deadline = Instant::now() + longest;
    loop {
        let mut text = String::new();
        file.rewind()
            .and_then(|()| file.read_to_string(&mut text))
            .map_err(failed("read", &path))?;
        if text.lines().any(|found| found == line) {
            return Ok(());
        }
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            let waited_s = longest.as_secs();
            return Err(CgroupError::Unsettled { path: directory.into(), state, waited_s });
        }
        // The kernel tells of a change up to 10 ms late, and of a removed cgroup not at all.
        let left = left.min(Duration::from_millis(20));
        let mut set = [PollFd::new(file.as_fd(), PollFlags::POLLPRI)];
        let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::ZERO);
        match poll(&mut set, timeout) {
            Ok(_) | Err(nix::errno::Errno::EINTR) => (),
            Err(source) => return Err(failed("poll", &path)(source.into())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn weights_stay_in_the_kernels_range() {
        assert_eq!([None, Some(8), Some(1000), Some(500_000)].map(weight), [100, 1, 100, 10_000]);
    }
}
