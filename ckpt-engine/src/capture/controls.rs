//! Switches of prctl(2) and its like, which only the process itself can read.

use ckpt_format::controls::{Dispatch, ProcessControls, ThreadControls};

use crate::{
    inject::{Batch, Done},
    procfs::{self, Status},
};

const PR_GET_TSC: u64 = 25;
const PR_TSC_SIGSEGV: u32 = 2;
const PR_MCE_KILL_GET: u64 = 34;
const PR_GET_THP_DISABLE: u64 = 42;
const PR_GET_SPECULATION_CTRL: u64 = 52;
const PR_GET_MDWE: u64 = 66;
const PR_GET_MEMORY_MERGE: u64 = 68;
const ARCH_GET_CPUID: u64 = 0x1011;

/// Where the answers of a process will be.
pub(super) struct ProcessQuestions {
    huge_pages: usize,
    merge: usize,
    deny_write_execute: usize,
}

impl ProcessQuestions {
    pub(super) fn ask(batch: &mut Batch) -> Self {
        let mut get = |what| batch.call("prctl", libc::SYS_prctl, &[what, 0, 0, 0, 0]);
        Self {
            huge_pages: get(PR_GET_THP_DISABLE),
            merge: get(PR_GET_MEMORY_MERGE),
            deny_write_execute: get(PR_GET_MDWE),
        }
    }

    /// A kernel that does not know a switch has it off.
    pub(super) fn answers(&self, done: &Done, lock_future: u32) -> ProcessControls {
        ProcessControls {
            huge_pages_disabled: done.result(self.huge_pages).unwrap_or(0) as u32,
            memory_merge: done.result(self.merge).unwrap_or(0) != 0,
            deny_write_execute: done.result(self.deny_write_execute).unwrap_or(0) as u32,
            lock_future,
        }
    }
}

/// What mlockall(2) has asked for memory to come. Nobody tells, but the map at `recent`, which is
/// younger than any such wish, shows it.
pub(super) fn lock_future(host: i32, status: &Status, recent: u64) -> u32 {
    if status.text("VmLck").map_or(true, |locked| locked == "0 kB") {
        return 0;
    }
    let Ok(smaps) = procfs::read_text(host, "smaps") else { return 0 };
    let areas = procfs::parse_smaps(&smaps);
    // It may have been joined with the area before it.
    let joined = areas.iter().rfind(|(line, _)| line.start <= recent);
    let advice = joined.map(|(_, flags)| flags.advice).unwrap_or_default();
    match (advice.locked, advice.locked_on_fault) {
        (false, _) => 0,
        (true, false) => libc::MCL_FUTURE as u32,
        (true, true) => (libc::MCL_FUTURE | libc::MCL_ONFAULT) as u32,
    }
}

/// Where the answers of a thread will be.
pub(super) struct ThreadQuestions {
    machine_check: usize,
    time_stamp: u64,
    cpuid: usize,
    speculation: [usize; 3],
}

impl ThreadQuestions {
    pub(super) fn ask(batch: &mut Batch) -> Self {
        let time_stamp = batch.room(8);
        let prctl = libc::SYS_prctl;
        batch.call("prctl", prctl, &[PR_GET_TSC, time_stamp]);
        Self {
            machine_check: batch.call("prctl", prctl, &[PR_MCE_KILL_GET, 0, 0, 0, 0]),
            time_stamp,
            cpuid: batch.call("arch_prctl", libc::SYS_arch_prctl, &[ARCH_GET_CPUID, 0]),
            speculation: [0, 1, 2].map(|which| {
                batch.call("prctl", prctl, &[PR_GET_SPECULATION_CTRL, which, 0, 0, 0])
            }),
        }
    }

    pub(super) fn answers(&self, done: &Done, dispatch: Option<Dispatch>) -> ThreadControls {
        const DEFAULT_POLICY: u64 = 2;
        ThreadControls {
            machine_check: done.result(self.machine_check).unwrap_or(DEFAULT_POLICY) as u32,
            no_time_stamp: done.word(self.time_stamp) == PR_TSC_SIGSEGV,
            no_cpuid: done.result(self.cpuid).is_ok_and(|on| on == 0),
            speculation: self.speculation.map(|index| done.result(index).unwrap_or(0) as u32),
            dispatch,
        }
    }
}
