//! System V semaphores.

use std::time::Duration;

use ckpt_engine::sys::program::sysv::{self, Ask};

use super::key;
use crate::workload::context::Context;
use crate::workload::outcome::{Failure, ensure, same};
use crate::workload::process::Child;

/// A set that goes with the workload.
struct Set(i32);

impl Set {
    fn new(number: i32, count: i32) -> Result<Self, Failure> {
        Ok(Self(sysv::semaphores(key(number), count, Some(0o600))?))
    }

    fn value(&self, which: i32) -> Result<i32, Failure> {
        Ok(sysv::semaphore(self.0, which, Ask::Value)?)
    }
}

impl Drop for Set {
    fn drop(&mut self) {
        // It may be gone already.
        let _ = sysv::remove_semaphores(self.0);
    }
}

pub(super) fn values(context: &mut Context) -> Result<(), Failure> {
    const COUNT: i32 = 40;
    let set = Set::new(1, COUNT)?;
    for which in 0..COUNT {
        sysv::set_semaphore(set.0, which, which * 800)?;
    }
    let mut added = 0;
    while context.step(Duration::from_millis(8))? {
        same("the number of a set", sysv::semaphores(key(1), COUNT, None)?, set.0)?;
        for which in 0..COUNT {
            let more = i32::from(which == 7) * added;
            same("a semaphore", set.value(which)?, which * 800 + more)?;
        }
        let change = if added < 100 { 1 } else { -100 };
        sysv::operate(set.0, &[(7, change, 0)])?;
        added += i32::from(change);
        let stuck = sysv::operate(set.0, &[(0, -1, libc::IPC_NOWAIT)]);
        let stuck = stuck.map_err(|error| error.raw_os_error());
        same("taking from an empty one", stuck, Err(Some(libc::EAGAIN)))?;
        if context.progress.plant() {
            sysv::set_semaphore(set.0, 12, 3)?;
        }
    }
    Ok(())
}

pub(in crate::workload) fn undo(context: &mut Context) -> Result<(), Failure> {
    let set = Set::new(2, 3)?;
    let id = set.0;
    sysv::set_semaphore(id, 0, 20)?;
    sysv::set_semaphore(id, 2, 32_767)?;
    // What the workload itself would undo never shows while it runs.
    sysv::operate(id, &[(0, -5, libc::SEM_UNDO)])?;
    while context.step(Duration::from_millis(1))? {
        let child = Child::start(context, "borrower", |stop| {
            let undo = libc::SEM_UNDO;
            sysv::operate(id, &[(0, -3, undo), (1, 700, undo), (2, -32_000, undo)])?;
            while !stop.wait(Duration::from_millis(50))? {}
            Ok(())
        })?;
        let mut planted = false;
        for _ in 0..40 {
            if !context.step(Duration::from_millis(10))? {
                break;
            }
            child.check()?;
            if context.progress.plant() {
                planted = true;
            }
        }
        same("a semaphore that somebody borrows", set.value(0)?, 12)?;
        same("one that somebody lends", set.value(1)?, 700)?;
        same("one of which much is taken", set.value(2)?, 767)?;
        if planted {
            // What a forgotten undo would leave behind.
            sysv::operate(id, &[(0, -3, 0)])?;
        }
        child.finish()?;
        same("a semaphore after the borrower's end", set.value(0)?, 15)?;
        same("one after the lender's end", set.value(1)?, 0)?;
        same("one after it was given back", set.value(2)?, 32_767)?;
    }
    Ok(())
}

pub(super) fn turns(context: &mut Context) -> Result<(), Failure> {
    let set = Set::new(3, 3)?;
    let id = set.0;
    let child = Child::start(context, "partner", |_| {
        loop {
            // A wait for a semaphore is never begun again by itself.
            match sysv::operate(id, &[(0, -1, 0)]) {
                Err(error) if error.raw_os_error() == Some(libc::EINTR) => continue,
                taken => taken?,
            }
            if sysv::semaphore(id, 2, Ask::Value)? == 1 {
                return Ok(());
            }
            sysv::operate(id, &[(1, 1, 0)])?;
        }
    })?;
    let mut turn = 0;
    while context.step(Duration::from_millis(5))? {
        child.check()?;
        ensure(sysv::semaphore(id, 0, Ask::Waiting)? <= 1, || "two wait".to_owned())?;
        sysv::operate(id, &[(0, 1, 0)])?;
        turn += 1;
        loop {
            match sysv::operate(id, &[(1, -1, 0)]) {
                Err(error) if error.raw_os_error() == Some(libc::EINTR) => {}
                taken => break taken?,
            }
        }
        if context.progress.plant() {
            sysv::operate(id, &[(1, 1, 0)])?;
        }
        same("turns given and not taken", set.value(0)? + set.value(1)?, 0)?;
    }
    ensure(turn > 0, || "no turn was taken".to_owned())?;
    sysv::set_semaphore(id, 2, 1)?;
    sysv::operate(id, &[(0, 1, 0)])?;
    child.finish()
}
