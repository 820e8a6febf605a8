//! Switches that prctl(2), arch_prctl(2) and mlockall(2) set, beside those that are part of who a
//! process is.

use serde::{Deserialize, Serialize};

/// Switches of a whole process.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessControls {
    /// `PR_SET_THP_DISABLE`: 0 for off, else 1 with the flags.
    pub huge_pages_disabled: u32,
    /// `PR_SET_MEMORY_MERGE`.
    pub memory_merge: bool,
    /// `PR_SET_MDWE`.
    pub deny_write_execute: u32,
    /// mlockall(2): `MCL_FUTURE` and `MCL_ONFAULT`, or 0.
    pub lock_future: u32,
}

/// Switches of one thread.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ThreadControls {
    /// `PR_MCE_KILL`: late, early or default (2).
    pub machine_check: u32,
    /// `PR_SET_TSC`: reading the time stamp counter is an error.
    pub no_time_stamp: bool,
    /// `ARCH_SET_CPUID`: the cpuid instruction is an error.
    pub no_cpuid: bool,
    /// `PR_GET_SPECULATION_CTRL` of store bypass, indirect branches and the level 1 data cache;
    /// 0 where there is nothing to control.
    pub speculation: [u32; 3],
    /// `PR_SET_SYSCALL_USER_DISPATCH`, when on.
    pub dispatch: Option<Dispatch>,
}

/// `struct ptrace_sud_config`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[expect(missing_docs, reason = "the names are those of struct ptrace_sud_config")]
pub struct Dispatch {
    pub mode: u64,
    pub selector: u64,
    pub offset: u64,
    pub len: u64,
}
