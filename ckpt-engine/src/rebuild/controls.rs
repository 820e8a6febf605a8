//! Switches of prctl(2) and its like.

use ckpt_format::{
    controls::{ProcessControls, ThreadControls},
    process::Thread,
};

use crate::inject::{Batch, Gate, InjectError, Stopped};

const PR_SET_TSC: u64 = 26;
const PR_TSC_SIGSEGV: u64 = 2;
const PR_MCE_KILL: u64 = 33;
const PR_MCE_KILL_SET: u64 = 1;
const PR_SET_THP_DISABLE: u64 = 41;
const PR_GET_SPECULATION_CTRL: u64 = 52;
const PR_SET_SPECULATION_CTRL: u64 = 53;
const PR_SET_MDWE: u64 = 65;
const PR_SET_MEMORY_MERGE: u64 = 67;
const ARCH_SET_CPUID: u64 = 0x1012;

/// Adds the calls for a whole process; runs in the leader.
pub(super) fn whole_process(batch: &mut Batch, controls: &ProcessControls) {
    let mut set = |what, value: u32, flags: u32| {
        let arguments = [what, u64::from(value), u64::from(flags), 0, 0];
        batch.call("prctl", libc::SYS_prctl, &arguments);
    };
    if controls.huge_pages_disabled != 0 {
        set(PR_SET_THP_DISABLE, 1, controls.huge_pages_disabled & !1);
    }
    if controls.memory_merge {
        set(PR_SET_MEMORY_MERGE, 1, 0);
    }
    if controls.deny_write_execute != 0 {
        set(PR_SET_MDWE, controls.deny_write_execute, 0);
    }
    if controls.lock_future != 0 {
        batch.call("mlockall", libc::SYS_mlockall, &[u64::from(controls.lock_future)]);
    }
}

/// Adds the calls for one thread.
pub(super) fn one_thread(batch: &mut Batch, controls: &ThreadControls) {
    const DEFAULT_POLICY: u32 = 2;
    let prctl = libc::SYS_prctl;
    if controls.machine_check != DEFAULT_POLICY {
        let arguments = [PR_MCE_KILL, PR_MCE_KILL_SET, controls.machine_check.into(), 0, 0];
        batch.call("prctl", prctl, &arguments);
    }
    if controls.no_cpuid {
        batch.call("arch_prctl", libc::SYS_arch_prctl, &[ARCH_SET_CPUID, 0]);
    }
    if controls.no_time_stamp {
        batch.call("prctl", prctl, &[PR_SET_TSC, PR_TSC_SIGSEGV]);
    }
}

const SPEC_PRCTL: u32 = 1;
const SPEC_ENABLE: u32 = 2;
const SPEC_DISABLE: u32 = 4 | 8 | 16;
/// The flush of the level 1 data cache is off unless asked for; the others are the reverse.
const L1D_FLUSH: usize = 2;

/// Controls speculation as on the source. A processor that has nothing to control needs nothing.
pub(super) fn set_speculation(
    thread: &Stopped,
    gate: Gate,
    wanted: &Thread,
) -> Result<(), InjectError> {
    for (which, &state) in wanted.controls.speculation.iter().enumerate() {
        let chosen = if which == L1D_FLUSH { SPEC_ENABLE } else { SPEC_DISABLE };
        if state & SPEC_PRCTL == 0 || state & chosen == 0 {
            continue;
        }
        let mut batch = gate.batch();
        let arguments = [PR_GET_SPECULATION_CTRL, which as u64, 0, 0, 0];
        let now = batch.call("prctl", libc::SYS_prctl, &arguments);
        let now = batch.run(thread)?.result(now).unwrap_or(0) as u32;
        if now & SPEC_PRCTL == 0 || now == state {
            continue;
        }
        let mut batch = gate.batch();
        let value = u64::from(state & !SPEC_PRCTL);
        let arguments = [PR_SET_SPECULATION_CTRL, which as u64, value, 0, 0];
        batch.call("prctl", libc::SYS_prctl, &arguments);
        batch.run(thread)?.all()?;
    }
    Ok(())
}
