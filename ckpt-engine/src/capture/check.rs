//! Finds what cannot be captured, without disturbing a running VE.

use std::path::Path;

use ckpt_format::blocker::Blocker;

use super::{IdMap, common, kernel::Fields};
use crate::{
    aio,
    areas::{AddressSpace, VDSO},
    keys,
    procfs::{self, ProcError, Stat, Status},
};

/// Lists everything about the processes in `cgroup` (cgroup v2) that cannot be moved now.
///
/// Descriptors are not looked at here. A process that ends meanwhile is left out.
pub fn check(cgroup: &Path, ids: IdMap) -> std::io::Result<Vec<Blocker>> {
    let mut blockers = Vec::new();
    let hosts = procfs::cgroup_members(cgroup)?;
    for &host in &hosts {
        if let Ok(found) = check_process(host) {
            blockers.extend(found);
        }
    }
    let in_common = common::check(&hosts);
    blockers.extend(in_common.into_iter().filter_map(|(host, why)| shared(host, why).ok()));
    if !Fields::known().is_some_and(Fields::tell_keys) {
        blockers.extend(keys::unseen(ids)?);
    }
    Ok(blockers)
}

fn shared(host: i32, why: &str) -> Result<Blocker, ProcError> {
    let status = Status::read(host)?;
    Ok(Blocker {
        pid: status.in_ve("NStgid")?,
        command: status.text("Name")?.to_owned(),
        fd: None,
        object: why.to_owned(),
        hint: "end the program".to_owned(),
    })
}

fn check_process(host: i32) -> Result<Vec<Blocker>, ProcError> {
    let status = Status::read(host)?;
    let stat = Stat::read(host)?;
    // Of a thread that stands for its process it is the process's.
    let pid = status.in_ve("NStgid")?;
    let command = status.text("Name")?.to_owned();
    let mut blockers = Vec::new();
    let mut add = |object: String, hint: &str| {
        blockers.push(Blocker {
            pid,
            command: command.clone(),
            fd: None,
            object,
            hint: hint.to_owned(),
        });
    };
    let tracer = status.number("TracerPid", 10)?;
    if tracer != 0 {
        add("process under ptrace".to_owned(), "end the debugger or strace that traces it");
    }
    if stat.state == 'Z' {
        return Ok(blockers);
    }
    let stands_in = status.number("Tgid", 10)? != u64::from(host.unsigned_abs());
    if stands_in && (pid == 1 || !status.below_ve("NStgid")?.is_empty()) {
        let object = "ended main thread with live threads, in a pid namespace or as init";
        add(object.to_owned(), "wait until the process ends");
    }
    if common::has_table_apart(host) {
        add("a thread with a descriptor table of its own".to_owned(), "end the program");
    }
    let space = AddressSpace::read(host)?;
    if aio::any(&space.areas)
        && let Err(why) = aio::check(host)
    {
        let (object, hint) = why.describe();
        add(object, hint);
    }
    // One that is ending has no memory any more.
    let has_memory = !space.areas.is_empty();
    if has_memory
        && space.vdso().is_none()
        && space.unsupported.iter().all(|(name, _)| name != VDSO)
    {
        add("a program without the kernel's code (vdso)".to_owned(), "restart the program");
    }
    for (name, why) in space.unsupported {
        if name == VDSO {
            add(why.to_owned(), "use one of another interface, or stop it");
            continue;
        }
        let shown = if name.is_empty() { String::new() } else { format!(" ({name})") };
        add(format!("{why}{shown}"), "restart the program without it");
    }
    Ok(blockers)
}
