//! How threads are scheduled.

use std::fs;

use ckpt_engine::sys::task::{self, SchedulingAttributes};
use nix::unistd::gettid;

use crate::workload::context::Context;
use crate::workload::keep::keep;
use crate::workload::outcome::Failure;

const OTHER: u32 = 0;
const BATCH: u32 = 3;
const IDLE: u32 = 5;
const RESET_ON_FORK: u64 = 1;

fn look() -> Result<(u32, u64, i32, u32), Failure> {
    let now = task::scheduling(0)?;
    Ok((now.policy, now.flags, now.nice, now.priority))
}

fn schedule(policy: u32, flags: u64, nice: i32) -> Result<(), Failure> {
    let wanted = SchedulingAttributes { policy, flags, nice, ..SchedulingAttributes::default() };
    Ok(task::set_scheduling(0, &wanted)?)
}

pub(super) fn batch(context: &mut Context) -> Result<(), Failure> {
    schedule(BATCH, 0, 3)?;
    keep(context, "scheduling", look, || schedule(BATCH, 0, 4))
}

pub(super) fn idle(context: &mut Context) -> Result<(), Failure> {
    schedule(IDLE, 0, 0)?;
    // From there on only with a privilege: what is planted is another flag.
    keep(context, "scheduling", look, || schedule(IDLE, RESET_ON_FORK, 0))
}

pub(super) fn nice(context: &mut Context) -> Result<(), Failure> {
    schedule(OTHER, RESET_ON_FORK, 7)?;
    keep(context, "scheduling", look, || schedule(OTHER, RESET_ON_FORK, 8))
}

/// The class and level with which it uses disks.
pub(super) fn disk(context: &mut Context) -> Result<(), Failure> {
    const BEST_EFFORT: i32 = 2 << 13;
    task::set_io_priority(0, BEST_EFFORT | 6)?;
    let look = || Ok(task::io_priority(0)?);
    keep(context, "priority at disks", look, || Ok(task::set_io_priority(0, BEST_EFFORT | 1)?))
}

/// Threads that each have another priority, name and set of processors.
pub(super) fn threads(context: &mut Context) -> Result<(), Failure> {
    use std::sync::mpsc::channel;

    let (stop, inbox) = channel::<()>();
    let inbox = std::sync::Arc::new(std::sync::Mutex::new(inbox));
    let mut tids = Vec::new();
    for number in 0..4 {
        let (told, tid) = channel();
        let inbox = std::sync::Arc::clone(&inbox);
        let thread = std::thread::Builder::new().name(format!("worker {number}"));
        thread.spawn(move || -> Result<(), Failure> {
            schedule(if number % 2 == 0 { OTHER } else { BATCH }, 0, number + 2)?;
            task::set_io_priority(0, 2 << 13 | number)?;
            told.send(gettid()).map_err(|_| Failure::new("nobody listens"))?;
            // Until the other end is gone.
            let _ = inbox.lock().map(|inbox| inbox.recv());
            Ok(())
        })?;
        tids.push(tid.recv().map_err(|_| Failure::new("a thread could not be scheduled"))?);
    }
    let first = tids[0];
    let look = || -> Result<Vec<String>, Failure> {
        let mut lines = Vec::new();
        for tid in &tids {
            let now = task::scheduling(tid.as_raw())?;
            let disk = task::io_priority(tid.as_raw())?;
            let name = fs::read_to_string(format!("/proc/self/task/{tid}/comm"))?;
            lines.push(format!("{tid} {} {} {disk} {name}", now.policy, now.nice));
        }
        Ok(lines)
    };
    let kept = keep(context, "scheduling of threads", look, || {
        Ok(task::set_io_priority(first.as_raw(), 2 << 13 | 7)?)
    });
    drop(stop);
    kept
}
