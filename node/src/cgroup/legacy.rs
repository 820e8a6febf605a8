//! cgroup v1.

use std::{fs, path::Path};

use super::{CgroupError, Controller, Limits, unified::PERIOD_US, write};

pub(super) fn apply(
    directory: &Path,
    controller: Controller,
    limits: &Limits,
) -> Result<(), CgroupError> {
    let set = |name: &str, value: &str| write(&directory.join(name), value);
    match controller {
        Controller::Memory => memory(directory, limits),
        Controller::Pids => {
            set("pids.max", &limits.processes.map_or("max".to_owned(), |it| it.to_string()))
        }
        Controller::Cpu => {
            // OpenVZ's 1000 is the kernel's 1024; 2 is the smallest.
            let shares = limits.cpu_units.map_or(1024, |units| (units * 1024 / 1000).max(2));
            set("cpu.shares", &shares.to_string())?;
            let quota = limits.cpu_percent.map(|percent| percent * PERIOD_US / 100);
            if quota.is_none() && !directory.join("cpu.cfs_quota_us").exists() {
                return Ok(());
            }
            set("cpu.cfs_period_us", &PERIOD_US.to_string())?;
            set("cpu.cfs_quota_us", &quota.map_or("-1".to_owned(), |it| it.to_string()))
        }
    }
}

/// Memory, and memory plus swap. The sum may never be below the first, so the order of the two
/// depends on the direction.
fn memory(directory: &Path, limits: &Limits) -> Result<(), CgroupError> {
    const SUM: &str = "memory.memsw.limit_in_bytes";
    let text = |value: Option<u64>| value.map_or("-1".to_owned(), |value| value.to_string());
    let memory = text(limits.memory_bytes);
    let both = match (limits.memory_bytes, limits.swap_bytes) {
        (Some(memory), Some(swap)) => Some(memory.saturating_add(swap)),
        _ => None,
    };
    let sum = directory.join(SUM);
    if !sum.exists() {
        return write(&directory.join("memory.limit_in_bytes"), &memory);
    }
    let now: u64 = fs::read_to_string(&sum).ok().and_then(|it| it.trim().parse().ok()).unwrap_or(0);
    let grows = both.is_none_or(|both| both >= now);
    if grows {
        write(&sum, &text(both))?;
    }
    write(&directory.join("memory.limit_in_bytes"), &memory)?;
    if grows { Ok(()) } else { write(&sum, &text(both)) }
}
