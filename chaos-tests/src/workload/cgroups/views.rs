//! Cgroup namespaces: programs that see a cgroup of theirs as the top.

use std::fs;
use std::time::Duration;

use nix::sched::{CloneFlags, unshare};

use super::tree::Ground;
use crate::workload::context::Context;
use crate::workload::outcome::{Failure, same};
use crate::workload::process::{Child, proc_text};

const PAUSE: Duration = Duration::from_millis(15);

/// The caller's path in the tree that it sees.
fn place() -> Result<String, Failure> {
    let text = proc_text("/proc/thread-self/cgroup")?;
    let own = text.lines().find_map(|line| line.strip_prefix("0::"));
    Ok(own.unwrap_or_default().to_owned())
}

/// A child that sees `top` as its top and is in a cgroup below that, with a thread.
pub(super) fn own(context: &mut Context) -> Result<(), Failure> {
    let ground = Ground::new()?;
    let (top, below) = (ground.make("top")?, ground.make("top/below")?);
    let aside = ground.make("aside")?;
    let child = Child::start(context, "view", |stop| {
        fs::write(top.join("cgroup.procs"), "0")?;
        unshare(CloneFlags::CLONE_NEWCGROUP)?;
        fs::write(below.join("cgroup.procs"), "0")?;
        same("its cgroup", place()?, "/below".to_owned())?;
        fs::write(top.join("cgroup.max.depth"), "3")?;
        let end = std::sync::atomic::AtomicBool::new(false);
        std::thread::scope(|scope| {
            let thread = scope.spawn(|| {
                while !end.load(std::sync::atomic::Ordering::Relaxed) {
                    same("the cgroup of a thread", place()?, "/below".to_owned())?;
                    std::thread::sleep(PAUSE);
                }
                Ok::<(), Failure>(())
            });
            let watch = || {
                while !stop.wait(PAUSE)? && !thread.is_finished() {
                    same("its cgroup", place()?, "/below".to_owned())?;
                }
                Ok(())
            };
            let watched = watch();
            end.store(true, std::sync::atomic::Ordering::Relaxed);
            let joined = thread.join();
            watched.and(joined.unwrap_or_else(|_| Err(Failure::new("a thread panicked"))))
        })
    })?;
    while context.step(PAUSE)? {
        if context.progress.plant() {
            fs::write(aside.join("cgroup.procs"), child.pid.to_string())?;
        }
        child.check()?;
    }
    child.finish()
}
