//! Signals: counted by handlers, held back by masks, queued with their values, and on an
//! alternate stack.

use std::sync::OnceLock;
use std::time::Duration;

use ckpt_engine::sys::program::map::{Backing, Map};
use ckpt_engine::sys::program::signal;
use nix::sys::signal::{SigSet, Signal, raise};
use nix::unistd::getpid;

use crate::workload::context::Context;
use crate::workload::outcome::{Failure, ensure, same};
use crate::workload::process::Child;

static STACK: OnceLock<Map> = OnceLock::new();

/// Real-time signals that stay pending for a while.
const QUEUED: i32 = 40;
const VALUES: usize = 5;

/// Handlers that ask for an alternate stack where there is none, as those of Python do.
pub(super) fn without_stack(context: &mut Context) -> Result<(), Failure> {
    const NEAR: usize = 1 << 20;
    context.has_handlers = true;
    signal::use_no_alternate_stack()?;
    let usr2 = Signal::SIGUSR2 as i32;
    signal::count(usr2, libc::SA_ONSTACK | libc::SA_RESTART)?;
    while context.step(Duration::from_millis(10))? {
        if context.progress.plant() {
            let stack = Map::new(16, Backing::Private)?;
            signal::use_alternate_stack(STACK.get_or_init(|| stack))?;
        }
        let before = signal::counted(usr2);
        raise(Signal::SIGUSR2)?;
        same("handlers run", signal::counted(usr2), before + 1)?;
        let own = 0_u8;
        let (at, own) = (signal::last_stack(usr2), (&raw const own).addr());
        ensure(at.abs_diff(own) < NEAR, || format!("the handler ran at {at:#x}, not {own:#x}"))?;
    }
    Ok(())
}

pub(super) fn run(context: &mut Context) -> Result<(), Failure> {
    context.has_handlers = true;
    let (usr1, usr2) = (Signal::SIGUSR1 as i32, Signal::SIGUSR2 as i32);
    let stack = Map::new(16, Backing::Private)?;
    let stack = STACK.get_or_init(|| stack);
    signal::use_alternate_stack(stack)?;
    signal::count(usr2, libc::SA_ONSTACK | libc::SA_RESTART)?;
    signal::count(Signal::SIGURG as i32, libc::SA_RESTART)?;
    // One that stays pending for ever.
    // The traps of debuggers are signals as all others.
    signal::ignore(libc::SIGTRAP)?;
    let mut blocked = SigSet::empty();
    blocked.add(Signal::SIGUSR1);
    blocked.add(Signal::SIGWINCH);
    blocked.thread_block()?;
    block_queued()?;
    raise(Signal::SIGUSR1)?;
    let own = getpid().as_raw();
    let sender = Child::start(context, "sender", |stop| {
        while !stop.wait(Duration::from_millis(5))? {
            signal::queue(own, Signal::SIGURG as i32, 0)?;
        }
        Ok(())
    })?;
    let mut turn = 0;
    queue_all(turn)?;
    while context.step(Duration::from_millis(20))? {
        let before = signal::counted(usr2);
        raise(Signal::SIGUSR2)?;
        same("handlers run", signal::counted(usr2), before + 1)?;
        let at = signal::last_stack(usr2);
        let area = stack.address()..stack.address() + stack.words() * 8;
        ensure(area.contains(&at), || format!("the handler ran at {at:#x}, not on {area:x?}"))?;
        same("mask", SigSet::thread_get_mask()?.contains(Signal::SIGUSR1), true)?;
        same("mask", SigSet::thread_get_mask()?.contains(Signal::SIGHUP), false)?;
        sender.check()?;
        if context.progress.plant() {
            signal::take(&[usr1], Duration::ZERO)?;
        }
        let ignored = status_mask("SigIgn")? >> (libc::SIGTRAP - 1) & 1;
        same("whether traps are ignored", ignored, 1)?;
        ensure(is_pending(usr1)?, || "a pending signal is gone".to_owned())?;
        if context.progress.checks().is_multiple_of(50) {
            take_all(turn)?;
            turn += 1;
            queue_all(turn)?;
        }
    }
    take_all(turn)?;
    let urgent = signal::counted(Signal::SIGURG as i32);
    ensure(urgent > 0, || "no signal came from the child".to_owned())?;
    sender.finish()
}

fn block_queued() -> Result<(), Failure> {
    signal::block(QUEUED)?;
    let blocked = status_mask("SigBlk")? >> (QUEUED - 1) & 1 == 1;
    ensure(blocked, || format!("signal {QUEUED} is not blocked"))
}

fn queue_all(turn: usize) -> Result<(), Failure> {
    for value in 0..VALUES {
        signal::queue(getpid().as_raw(), QUEUED, turn * 1000 + value)?;
    }
    Ok(())
}

fn take_all(turn: usize) -> Result<(), Failure> {
    for value in 0..VALUES {
        let taken = signal::take(&[QUEUED], Duration::ZERO)?;
        same("value of a queued signal", taken.value, turn * 1000 + value)?;
        same("sender of a queued signal", taken.pid, getpid().as_raw())?;
    }
    let more = signal::take(&[QUEUED], Duration::ZERO).err().and_then(|e| e.raw_os_error());
    same("after the last queued signal", more, Some(libc::EAGAIN))
}

fn is_pending(number: i32) -> Result<bool, Failure> {
    let pending = status_mask("SigPnd")? | status_mask("ShdPnd")?;
    Ok(pending >> (number - 1) & 1 == 1)
}

fn status_mask(name: &str) -> Result<u64, Failure> {
    let status = crate::workload::process::proc_text("/proc/self/status")?;
    let line = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
    let mask = line.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok());
    mask.ok_or_else(|| Failure::new(format!("no {name} in the status")))
}
