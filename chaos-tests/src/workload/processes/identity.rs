//! Who a process is and what it may do, in children that each are somebody else.

use std::ffi::CString;
use std::fs;
use std::time::Duration;

use nix::sys::prctl;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::stat::{Mode, umask};
use nix::unistd::{Gid, Uid, getpgrp, getsid, setgroups, setpgid, setresgid, setresuid};
use nix::unistd::{Pid, chdir};

use crate::workload::context::Context;
use crate::workload::outcome::{Failure, same};
use crate::workload::process::Child;

/// Turns the calling process into somebody.
type Become = fn() -> Result<(), Failure>;

pub(super) fn run(context: &mut Context) -> Result<(), Failure> {
    let folder = context.path("home");
    fs::create_dir_all(&folder)?;
    let progress = context.progress.clone();
    let mut children = Vec::new();
    let kinds: [(&'static str, Become); 4] = [
        ("user", become_user),
        ("keeper", keep_capabilities),
        ("root", stay_root),
        ("mixed", mix_ids),
    ];
    for (name, become_somebody) in kinds {
        let (folder, progress) = (folder.clone(), progress.clone());
        children.push(Child::start(context, name, |stop| {
            chdir(&folder)?;
            umask(Mode::from_bits_truncate(0o027));
            limit(Resource::RLIMIT_NOFILE, 200, 300)?;
            limit(Resource::RLIMIT_CORE, 4096, 1 << 20)?;
            setpgid(Pid::from_raw(0), Pid::from_raw(0))?;
            prctl::set_name(&CString::new(format!("self {name}")).unwrap_or_default())?;
            become_somebody()?;
            let before = portrait()?;
            while !stop.wait(Duration::from_millis(20))? {
                let now = portrait()?;
                for (was, is) in before.iter().zip(&now) {
                    same(&format!("identity of {name}"), is, was)?;
                }
                same("lines of the identity", now.len(), before.len())?;
                progress.count();
                if progress.plant() {
                    umask(Mode::from_bits_truncate(0o022));
                }
            }
            Ok(())
        })?);
    }
    while context.step(Duration::from_millis(50))? {
        for child in &children {
            child.check()?;
        }
    }
    children.into_iter().try_for_each(Child::finish)
}

fn become_user() -> Result<(), Failure> {
    setgroups(&[Gid::from_raw(4), Gid::from_raw(27), Gid::from_raw(1000)])?;
    setresgid(Gid::from_raw(33), Gid::from_raw(33), Gid::from_raw(33))?;
    setresuid(Uid::from_raw(33), Uid::from_raw(33), Uid::from_raw(33))?;
    // Changing the user cleared it.
    prctl::set_dumpable(true)?;
    prctl::set_no_new_privs()?;
    Ok(())
}

/// An ordinary user with permitted capabilities.
fn keep_capabilities() -> Result<(), Failure> {
    prctl::set_keepcaps(true)?;
    setresuid(Uid::from_raw(7), Uid::from_raw(7), Uid::from_raw(7))?;
    Ok(())
}

fn stay_root() -> Result<(), Failure> {
    prctl::set_timerslack(123_456)?;
    prctl::set_child_subreaper(true)?;
    Ok(())
}

fn mix_ids() -> Result<(), Failure> {
    setresgid(Gid::from_raw(1), Gid::from_raw(2), Gid::from_raw(3))?;
    setresuid(Uid::from_raw(0), Uid::from_raw(2), Uid::from_raw(3))?;
    Ok(())
}

fn limit(resource: Resource, soft: u64, hard: u64) -> Result<(), Failure> {
    Ok(setrlimit(resource, soft, hard)?)
}

/// All that a process can ask about itself, as lines.
fn portrait() -> Result<Vec<String>, Failure> {
    const KEPT: [&str; 21] = [
        "Name",
        "Umask",
        "Tgid",
        "PPid",
        "Uid",
        "Gid",
        "Groups",
        "NStgid",
        "NSpgid",
        "NSsid",
        "CapInh",
        "CapPrm",
        "CapEff",
        "CapBnd",
        "CapAmb",
        "NoNewPrivs",
        "Seccomp",
        "Seccomp_filters",
        "SigIgn",
        "SigCgt",
        "Threads",
    ];
    let status = read("/proc/self/status")?;
    let kept = |line: &&str| KEPT.iter().any(|name| line.starts_with(&format!("{name}:")));
    let mut lines: Vec<String> = status.lines().filter(kept).map(str::to_owned).collect();
    lines.push(format!("cwd {:?}", std::env::current_dir()?));
    lines.push(format!("group {} session {:?}", getpgrp(), getsid(None)?));
    lines.push(format!("files {:?}", getrlimit(Resource::RLIMIT_NOFILE)?));
    lines.push(format!("slack {:?}", prctl::get_timerslack()?));
    lines.push(format!("reaper {:?}", prctl::get_child_subreaper()?));
    lines.push(format!("death {:?}", prctl::get_pdeathsig()?));
    lines.push(format!("keep {:?}", prctl::get_keepcaps()?));
    lines.extend(read("/proc/self/limits")?.lines().map(str::to_owned));
    Ok(lines)
}

/// A file of /proc about this process, also after it has become another user.
fn read(path: &str) -> Result<String, Failure> {
    crate::workload::process::proc_text(path)
        .map_err(|error| Failure::new(format!("{path} as {}: {error}", Uid::effective())))
}
