//! Time namespaces. Root of a VE may make them, but not set their clocks (`CAP_SYS_TIME`): they show
//! what those of the VE show.

use std::fs;
use std::path::PathBuf;
use std::sync::atomic::Ordering::SeqCst;
use std::time::Duration;

use ckpt_engine::sys::program::map::{Backing, Map};
use nix::sched::{CloneFlags, unshare};
use nix::time::{ClockId, clock_gettime};

use crate::workload::context::Context;
use crate::workload::outcome::{Failure, ensure, same};
use crate::workload::process::{Child, proc_text};

const PAUSE: Duration = Duration::from_millis(10);
const NEW_TIME: CloneFlags = CloneFlags::from_bits_retain(0x80);
/// How far two readings of one clock by two processes may be apart.
const APART_NS: u64 = 5_000_000_000;

fn namespace(of: &str, kind: &str) -> Result<PathBuf, Failure> {
    Ok(fs::read_link(format!("/proc/{of}/ns/{kind}"))?)
}

fn now_ns(clock: ClockId) -> Result<u64, Failure> {
    let now = clock_gettime(clock)?;
    Ok(now.tv_sec().unsigned_abs() * 1_000_000_000 + now.tv_nsec().unsigned_abs())
}

/// Nobody but the children of the workload is in its time namespace.
pub(super) fn own(context: &mut Context) -> Result<(), Failure> {
    let map = Map::new(1, Backing::Shared)?;
    let outside = namespace("self", "time")?;
    unshare(NEW_TIME)?;
    let planted = || map.word(2).load(SeqCst) == 1;
    let child = Child::start(context, "inside", |stop| {
        let parent = nix::unistd::getppid().to_string();
        let mut before = [0; 2];
        while !stop.wait(PAUSE)? {
            let (own, others) = (namespace("self", "time")?, namespace(&parent, "time")?);
            let others = if planted() { own.clone() } else { others };
            ensure(own != others, || "a child is in the time namespace of its parent".to_owned())?;
            same("the namespace of its children", namespace("self", "time_for_children")?, own)?;
            for (place, clock) in
                [ClockId::CLOCK_MONOTONIC, ClockId::CLOCK_BOOTTIME].into_iter().enumerate()
            {
                let told = map.word(place).load(SeqCst);
                let now = now_ns(clock)?;
                ensure(now >= before[place], || format!("{clock:?} goes back to {now}"))?;
                ensure(told == 0 || now.abs_diff(told) < APART_NS, || {
                    format!("{clock:?} shows {now} inside, {told} outside")
                })?;
                before[place] = now;
            }
        }
        Ok(())
    })?;
    while context.step(PAUSE)? {
        child.check()?;
        map.word(0).store(now_ns(ClockId::CLOCK_MONOTONIC)?, SeqCst);
        map.word(1).store(now_ns(ClockId::CLOCK_BOOTTIME)?, SeqCst);
        let born = namespace(&child.pid.to_string(), "time")?;
        same("where children are born", namespace("self", "time_for_children")?, born)?;
        let own = namespace("self", "time")?;
        ensure(own != namespace("self", "time_for_children")?, || "it has followed".to_owned())?;
        if context.progress.plant() {
            map.word(2).store(1, SeqCst);
        }
    }
    ensure(outside != namespace("self", "time_for_children")?, || "one namespace".to_owned())?;
    child.finish()
}

/// A time namespace whose first process is born at the end.
pub(super) fn unborn(context: &mut Context) -> Result<(), Failure> {
    unshare(NEW_TIME)?;
    let offsets = || proc_text("/proc/self/timens_offsets");
    let own = || proc_text(format!("/proc/{}/timens_offsets", nix::unistd::getppid()));
    while context.step(PAUSE)? {
        let (there, born) = (namespace("self", "time")?, namespace("self", "time_for_children")?);
        let born = if context.progress.plant() { there.clone() } else { born };
        ensure(there != born, || "its children are born where it is".to_owned())?;
        // The parent's children are born where the parent is.
        same("how far its clocks are ahead", offsets()?, own()?)?;
    }
    let born = namespace("self", "time_for_children")?;
    Child::start(context, "first", |_| {
        same("where the first child is", namespace("self", "time")?, born.clone())
    })?
    .finish()
}
