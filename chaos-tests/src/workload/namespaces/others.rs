//! Namespaces of other kinds.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::mount::MsFlags;
use nix::sched::{CloneFlags, unshare};
use nix::sys::utsname::uname;
use nix::unistd::sethostname;

use crate::workload::context::Context;
use crate::workload::mounts::table::{Ground, new, set};
use crate::workload::outcome::{Failure, ensure, same};
use crate::workload::process::{Child, proc_text};

const PAUSE: Duration = Duration::from_millis(15);

fn host_name() -> Result<String, Failure> {
    Ok(uname()?.nodename().to_string_lossy().into_owned())
}

fn namespace(kind: &str) -> Result<PathBuf, Failure> {
    Ok(fs::read_link(format!("/proc/self/ns/{kind}"))?)
}

/// Watches a child that ends when the word in the file is another one.
fn watch(context: &mut Context, child: Child, word: &Path) -> Result<(), Failure> {
    fs::write(word, "stay")?;
    while context.step(PAUSE)? {
        if context.progress.plant() {
            fs::write(word, "damage")?;
        }
        child.check()?;
    }
    child.finish()
}

pub(super) fn names(context: &mut Context) -> Result<(), Failure> {
    let (outside, word) = (host_name()?, context.path("word"));
    fs::write(&word, "stay")?;
    let child = Child::start(context, "names", |stop| {
        unshare(CloneFlags::CLONE_NEWUTS)?;
        sethostname("of-its-own")?;
        while !stop.wait(PAUSE)? {
            if fs::read_to_string(&word)? == "damage" {
                sethostname("damage")?;
            }
            same("host name", host_name()?, "of-its-own".to_owned())?;
        }
        Ok(())
    })?;
    watch(context, child, &word)?;
    same("host name outside", host_name()?, outside)
}

pub(super) fn ipc(context: &mut Context) -> Result<(), Failure> {
    let (outside, word) = (namespace("ipc")?, context.path("word"));
    fs::write(&word, "stay")?;
    let child = Child::start(context, "ipc", |stop| {
        unshare(CloneFlags::CLONE_NEWIPC)?;
        // Another one after a move, but never that of the others.
        let parent = || fs::read_link(format!("/proc/{}/ns/ipc", nix::unistd::getppid()));
        while !stop.wait(PAUSE)? {
            let damaged = fs::read_to_string(&word)? == "damage";
            let others = if damaged { namespace("ipc")? } else { parent()? };
            ensure(namespace("ipc")? != others, || "in the IPC namespace of all".to_owned())?;
        }
        Ok(())
    })?;
    ensure(outside == namespace("ipc")?, || "the child took its parent along".to_owned())?;
    watch(context, child, &word)
}

/// The interfaces that a process sees.
fn interfaces() -> Result<Vec<String>, Failure> {
    let text = proc_text("/proc/self/net/dev")?;
    let names = text.lines().skip(2).filter_map(|line| line.split_once(':'));
    Ok(names.map(|(name, _)| name.trim().to_owned()).filter(|name| !is_tunnel(name)).collect())
}

/// Some kernels put the ends of tunnels into every namespace.
fn is_tunnel(name: &str) -> bool {
    ["tunl", "gre", "gretap", "erspan", "ip_vti", "ip6", "sit"]
        .iter()
        .any(|it| name.starts_with(it))
}

pub(super) fn network(context: &mut Context) -> Result<(), Failure> {
    let word = context.path("word");
    fs::write(&word, "stay")?;
    let child = Child::start(context, "network", |stop| {
        unshare(CloneFlags::CLONE_NEWNET)?;
        fs::write("/proc/sys/net/ipv4/ip_default_ttl", "33")?;
        while !stop.wait(PAUSE)? {
            let path = "/proc/sys/net/ipv4/ip_default_ttl";
            if fs::read_to_string(&word)? == "damage" {
                fs::write(path, "34")?;
            }
            same("interfaces", interfaces()?, vec!["lo".to_owned()])?;
            same("a setting", proc_text(path)?.trim(), "33")?;
        }
        Ok(())
    })?;
    watch(context, child, &word)
}

pub(super) fn all(context: &mut Context) -> Result<(), Failure> {
    let ground = Ground::new(context)?;
    let (place, word) = (ground.directory("place")?, context.path("word"));
    fs::write(&word, "stay")?;
    let child = Child::start(context, "all", |stop| {
        let kinds = CloneFlags::CLONE_NEWNS
            | CloneFlags::CLONE_NEWUTS
            | CloneFlags::CLONE_NEWIPC
            | CloneFlags::CLONE_NEWNET;
        unshare(kinds)?;
        set(Path::new("/"), MsFlags::MS_PRIVATE | MsFlags::MS_REC)?;
        sethostname("apart")?;
        new(&place, "tmpfs", "")?;
        fs::write(place.join("file"), "mine")?;
        while !stop.wait(PAUSE)? {
            if fs::read_to_string(&word)? == "damage" {
                fs::write(place.join("file"), "damage")?;
            }
            same("host name", host_name()?, "apart".to_owned())?;
            same("interfaces", interfaces()?, vec!["lo".to_owned()])?;
            same("its file", fs::read_to_string(place.join("file"))?, "mine".to_owned())?;
        }
        Ok(())
    })?;
    watch(context, child, &word)?;
    same("what others see", fs::read_dir(&place)?.count(), 0)
}
