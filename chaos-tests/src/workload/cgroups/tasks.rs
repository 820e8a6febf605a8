//! Cgroups with processes and threads in them.

use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use nix::sys::wait::{WaitStatus, waitpid};

use super::tree::Ground;
use crate::workload::context::Context;
use crate::workload::outcome::{Failure, ensure, same};
use crate::workload::process::{Child, proc_text};

const PAUSE: Duration = Duration::from_millis(15);

/// The end of the caller's path in the tree.
fn place(path: &str) -> Result<String, Failure> {
    let text = proc_text(path)?;
    let own = text.lines().find_map(|line| line.strip_prefix("0::")).unwrap_or_default();
    let from = own.find("selfcheck-").unwrap_or(own.len());
    Ok(own[from..].split_once('/').map_or("", |(_, rest)| rest).to_owned())
}

fn numbers(path: &Path) -> Result<Vec<i32>, Failure> {
    let mut all: Vec<i32> = proc_text(path)?.lines().filter_map(|it| it.parse().ok()).collect();
    all.sort_unstable();
    Ok(all)
}

pub(super) fn members(context: &mut Context) -> Result<(), Failure> {
    let ground = Ground::new()?;
    let mut children = Vec::new();
    for name in ["a", "a/b", "c"] {
        let path = ground.make(name)?;
        let child = Child::start(context, "member", |stop| {
            fs::write(path.join("cgroup.procs"), "0")?;
            while !stop.wait(PAUSE)? {
                same("its cgroup", place("/proc/self/cgroup")?, name.to_owned())?;
            }
            Ok(())
        })?;
        while numbers(&path.join("cgroup.procs"))?.is_empty() {
            child.check()?;
        }
        children.push((path, child));
    }
    while context.step(PAUSE)? {
        if context.progress.plant() {
            fs::write(ground.0.join("a/cgroup.procs"), children[2].1.pid.to_string())?;
        }
        for (path, child) in &children {
            child.check()?;
            same("members", numbers(&path.join("cgroup.procs"))?, vec![child.pid.as_raw()])?;
        }
    }
    children.into_iter().try_for_each(|(_, child)| child.finish())
}

pub(super) fn threaded(context: &mut Context) -> Result<(), Failure> {
    let ground = Ground::new()?;
    let (one, two) = (ground.make("whole/one")?, ground.make("whole/two")?);
    for path in [&one, &two] {
        fs::write(path.join("cgroup.type"), "threaded")?;
    }
    let whole = ground.0.join("whole");
    let word = context.path("word");
    fs::write(&word, "stay")?;
    let child = Child::start(context, "threads", |stop| {
        fs::write(whole.join("cgroup.procs"), "0")?;
        let end = Arc::new(AtomicBool::new(false));
        let run = |path: &Path, name: &'static str| {
            let (path, end) = (path.to_owned(), end.clone());
            std::thread::spawn(move || {
                fs::write(path.join("cgroup.threads"), "0")?;
                while !end.load(Ordering::Relaxed) {
                    same("its cgroup", place("/proc/thread-self/cgroup")?, name.to_owned())?;
                    std::thread::sleep(PAUSE);
                }
                Ok::<(), Failure>(())
            })
        };
        let threads = [run(&one, "whole/one"), run(&two, "whole/two")];
        while !stop.wait(PAUSE)? && !threads.iter().any(|it| it.is_finished()) {
            same("its cgroup", place("/proc/thread-self/cgroup")?, "whole".to_owned())?;
            if fs::read_to_string(&word)? == "damage" {
                fs::write(
                    two.join("cgroup.threads"),
                    numbers(&one.join("cgroup.threads"))?[0].to_string(),
                )?;
            }
        }
        end.store(true, Ordering::Relaxed);
        threads
            .into_iter()
            .try_for_each(|thread| thread.join().map_err(|_| Failure::new("a thread panicked"))?)
    })?;
    while context.step(PAUSE)? {
        if context.progress.plant() {
            fs::write(&word, "damage")?;
        }
        child.check()?;
    }
    child.finish()
}

pub(super) fn kill(context: &mut Context) -> Result<(), Failure> {
    let ground = Ground::new()?;
    let path = ground.make("doomed")?;
    let procs = path.join("cgroup.procs");
    let child = Child::start(context, "doomed", |stop| {
        fs::write(procs, "0")?;
        while !stop.wait(PAUSE)? {}
        Ok(())
    })?;
    while context.step(PAUSE)? {
        if context.progress.plant() {
            fs::write(path.join("cgroup.kill"), "1")?;
            while !proc_text(path.join("cgroup.events"))?.contains("populated 0") {}
        }
        child.check()?;
    }
    fs::write(path.join("cgroup.kill"), "1")?;
    let status = waitpid(child.pid, None)?;
    let killed = matches!(status, WaitStatus::Signaled(_, nix::sys::signal::Signal::SIGKILL, _));
    ensure(killed, || format!("the end of the process: {status:?}"))
}
