//! Settings of a process that nothing but the process changes.

use std::fs;

use ckpt_engine::sys::program::control::{
    Switch, can_write_code, drop_bounding, membarrier, personality, raise_ambient, set_capabilities,
};
use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::unistd::{Pid, Uid, setresuid};

use crate::workload::context::Context;
use crate::workload::keep::keep;
use crate::workload::outcome::{Failure, ensure};
use crate::workload::process::proc_text;

/// A switch that is set to one value and must not turn to another.
fn switch(context: &mut Context, switch: Switch, value: u64, other: u64) -> Result<(), Failure> {
    switch.set(value)?;
    keep(context, "a switch", || Ok(switch.get()?), || Ok(switch.set(other)?))
}

pub(super) fn huge_pages_disabled(context: &mut Context) -> Result<(), Failure> {
    switch(context, Switch::HugePagesDisabled, 1, 0)
}

pub(super) fn memory_merge(context: &mut Context) -> Result<(), Failure> {
    switch(context, Switch::MemoryMerge, 1, 0)
}

pub(super) fn machine_check(context: &mut Context) -> Result<(), Failure> {
    switch(context, Switch::MachineCheck, 1, 0)
}

pub(super) fn timer_slack(context: &mut Context) -> Result<(), Failure> {
    switch(context, Switch::TimerSlack, 1_234_567, 50_000)
}

pub(super) fn parent_death(context: &mut Context) -> Result<(), Failure> {
    switch(context, Switch::ParentDeathSignal, 12, 0)
}

pub(super) fn not_dumpable(context: &mut Context) -> Result<(), Failure> {
    switch(context, Switch::Dumpable, 0, 1)
}

pub(super) fn subreaper(context: &mut Context) -> Result<(), Failure> {
    switch(context, Switch::ChildSubreaper, 1, 0)
}

/// Memory that is writable and executable is refused, and the refusal cannot be taken back.
pub(super) fn deny_write_execute(context: &mut Context) -> Result<(), Failure> {
    Switch::DenyWriteExecute.set(1)?;
    let planted = std::cell::Cell::new(false);
    let look = || Ok((Switch::DenyWriteExecute.get()?, can_write_code() || planted.get()));
    keep(context, "the denial, and whether code can be written", look, || {
        planted.set(true);
        Ok(())
    })
}

/// The secure bits with their locks.
pub(super) fn secure_bits(context: &mut Context) -> Result<(), Failure> {
    // No set-user-id fix-up, locked; no capabilities of root by execve(2).
    switch(context, Switch::SecureBits, 0x4 | 0x8 | 0x1, 0x4 | 0x8)
}

/// What /proc says about this thread's capabilities.
fn capabilities() -> Result<Vec<String>, Failure> {
    let status = proc_text("/proc/thread-self/status")?;
    Ok(status.lines().filter(|line| line.starts_with("Cap")).map(str::to_owned).collect())
}

pub(super) fn bounding(context: &mut Context) -> Result<(), Failure> {
    for capability in [1, 5, 21, 27] {
        drop_bounding(capability)?;
    }
    keep(context, "the bounding set", capabilities, || Ok(drop_bounding(7)?))
}

const NET_BIND: u64 = 1 << 10;
const CHOWN: u64 = 1;

/// An ordinary user with ambient capabilities, as services have them.
pub(super) fn ambient(context: &mut Context) -> Result<(), Failure> {
    Switch::SecureBits.set(1 << 4)?;
    setresuid(Uid::from_raw(33), Uid::from_raw(33), Uid::from_raw(33))?;
    set_capabilities(NET_BIND, NET_BIND | CHOWN, NET_BIND)?;
    raise_ambient(10)?;
    Switch::Dumpable.set(1)?;
    keep(context, "capabilities of a service", capabilities, || {
        Ok(set_capabilities(0, NET_BIND, NET_BIND)?)
    })
}

/// Effective, permitted and inheritable capabilities that all differ.
pub(super) fn uneven(context: &mut Context) -> Result<(), Failure> {
    let all = u64::from_str_radix(&status_word("CapPrm")?, 16)
        .map_err(|_| Failure::new("the permitted set is no number"))?;
    set_capabilities(all & !CHOWN & !NET_BIND, all & !CHOWN, NET_BIND)?;
    keep(context, "capabilities", capabilities, || {
        Ok(set_capabilities(NET_BIND, all & !CHOWN, NET_BIND)?)
    })
}

fn status_word(key: &str) -> Result<String, Failure> {
    let status = proc_text("/proc/thread-self/status")?;
    let line = status.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(':'));
    Ok(line.unwrap_or_default().trim().to_owned())
}

/// Files of /proc in which settings are read and written.
fn file(context: &mut Context, path: &str, value: &str, other: &str) -> Result<(), Failure> {
    fs::write(path, value)?;
    keep(context, path, || Ok(fs::read_to_string(path)?), || Ok(fs::write(path, other)?))
}

pub(super) fn out_of_memory(context: &mut Context) -> Result<(), Failure> {
    file(context, "/proc/self/oom_score_adj", "345", "346")
}

pub(super) fn core_filter(context: &mut Context) -> Result<(), Failure> {
    file(context, "/proc/self/coredump_filter", "0x17", "0x33")
}

/// A kernel without the audit system has no such file, and nothing to keep.
pub(super) fn login(context: &mut Context) -> Result<(), Failure> {
    const PATH: &str = "/proc/self/loginuid";
    const NONE: &str = "4294967295";
    let read = || Ok(fs::read_to_string(PATH).unwrap_or_default());
    if read()? == NONE {
        fs::write(PATH, "1234")?;
    }
    keep(context, PATH, read, || Ok(fs::write(PATH, "1235")?))
}

pub(super) fn old_personality(context: &mut Context) -> Result<(), Failure> {
    const ADDR_NO_RANDOMIZE: u32 = 0x004_0000;
    const STICKY_TIMEOUTS: u32 = 0x400_0000;
    const ASK: u32 = u32::MAX;
    personality(ADDR_NO_RANDOMIZE | STICKY_TIMEOUTS)?;
    keep(context, "the personality", || Ok(personality(ASK)?), || Ok(personality(0).map(drop)?))
}

/// Bound to one processor.
pub(super) fn one_processor(context: &mut Context) -> Result<(), Failure> {
    let this = Pid::from_raw(0);
    let all = sched_getaffinity(this)?;
    let first = (0..CpuSet::count()).find(|cpu| all.is_set(*cpu).unwrap_or(false));
    let first = first.ok_or_else(|| Failure::new("no processor is allowed"))?;
    let mut one = CpuSet::new();
    one.set(first)?;
    sched_setaffinity(this, &one)?;
    keep(
        context,
        "the processors",
        || Ok(sched_getaffinity(this)?),
        || {
            ensure(all != one, || "there is one processor only".to_owned())?;
            Ok(sched_setaffinity(this, &all)?)
        },
    )
}

/// Registered for barriers of each private kind, which fail for everybody else.
pub(super) fn barriers(context: &mut Context) -> Result<(), Failure> {
    const EXPEDITED: i32 = 1 << 3;
    const REGISTER_EXPEDITED: i32 = 1 << 4;
    const SYNC_CORE: i32 = 1 << 5;
    const REGISTER_SYNC_CORE: i32 = 1 << 6;
    const REGISTRATIONS: i32 = 1 << 9;
    membarrier(REGISTER_EXPEDITED)?;
    membarrier(REGISTER_SYNC_CORE)?;
    let planted = std::cell::Cell::new(false);
    let look = || {
        membarrier(EXPEDITED)?;
        membarrier(SYNC_CORE)?;
        let registered = membarrier(REGISTRATIONS)?;
        Ok(if planted.get() { 0 } else { registered })
    };
    keep(context, "the registrations", look, || {
        planted.set(true);
        Ok(())
    })
}
