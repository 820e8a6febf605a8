//! What the host sets of a process, and not the process itself.

use std::{fs, io};

use ckpt_format::process::Thread;

use crate::{
    procfs,
    sys::task::{self, SchedulingAttributes},
};

const ALL_CPUS: [u64; 16] = [u64::MAX; 16];
/// The number of limits of a process (`RLIM_NLIMITS`).
const LIMITS: u32 = 16;
const ADJUSTMENT: &str = "oom_score_adj";
const FILTER: &str = "coredump_filter";

/// What every process of a skeleton has from its init, and so need not be given. What cannot be
/// known is set for each.
#[derive(Debug, Default)]
pub(super) struct Inherited {
    limits: Vec<Option<(u64, u64)>>,
    adjustment: Option<i32>,
    filter: Option<u32>,
}

impl Inherited {
    /// Before init has children.
    pub(super) fn of(init: i32) -> Self {
        let limits = (0..LIMITS).map(|resource| task::limit(init, resource).ok()).collect();
        let text = |name| procfs::read_text(init, name).unwrap_or_default();
        Self {
            limits,
            adjustment: text(ADJUSTMENT).trim().parse().ok(),
            filter: u32::from_str_radix(text(FILTER).trim(), 16).ok(),
        }
    }

    /// Sets the limits whose time it is. Where the host itself may not do it (raising a hard limit
    /// without CAP_SYS_RESOURCE), the VE goes on with what it has, and the log says so.
    pub(super) fn limit(&self, host: i32, limits: &[(u64, u64)], when: When) {
        for (resource, &(soft, hard)) in (0..).zip(limits) {
            let inherited = self.limits.get(resource as usize).copied().flatten();
            if When::of(resource) != when || inherited == Some((soft, hard)) {
                continue;
            }
            if let Err(error) = task::set_limit(host, resource, soft, hard) {
                tracing::warn!(host, resource, soft, hard, %error, "cannot set a resource limit");
            }
        }
    }

    /// What the kernel does with it when memory is short, and when it dumps core.
    pub(super) fn describe(&self, host: i32, adjustment: i32, filter: u32) {
        let files = [
            (ADJUSTMENT, self.adjustment == Some(adjustment), adjustment.to_string()),
            (FILTER, self.filter == Some(filter), format!("{filter:#x}")),
        ];
        for (name, same, value) in files {
            if !same && let Err(error) = fs::write(procfs::path(host, name), &value) {
                tracing::warn!(host, name, value, %error, "cannot set a property of a process");
            }
        }
    }
}

/// When a limit is set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum When {
    /// Before what counts against it: timers and signals.
    First,
    /// After what would exceed it, which it may on the source: descriptors, locks and the heap.
    Last,
}

impl When {
    fn of(resource: u32) -> Self {
        match resource {
            libc::RLIMIT_DATA | libc::RLIMIT_NOFILE | libc::RLIMIT_MEMLOCK => Self::Last,
            _ => Self::First,
        }
    }
}

/// How a thread is scheduled. Until then it is on the CPU of its tracer, and stops at once.
pub(super) fn schedule(tid: i32, thread: &Thread) -> io::Result<()> {
    let wanted = &thread.scheduling;
    let mut processors = [0u64; 16];
    for (word, wanted) in processors.iter_mut().zip(&wanted.processors) {
        *word = *wanted;
    }
    match task::set_affinity(tid, &processors) {
        // None of these processors is here: another host, or none was told.
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
            task::set_affinity(tid, &ALL_CPUS)?;
        }
        other => other?,
    }
    let now = task::scheduling(tid)?;
    if (now.policy, now.nice, now.priority, now.flags)
        != (wanted.policy, wanted.nice, wanted.priority, wanted.flags)
    {
        let attributes = SchedulingAttributes {
            policy: wanted.policy,
            flags: wanted.flags,
            nice: wanted.nice,
            priority: wanted.priority,
            runtime: 0,
            ..now
        };
        task::set_scheduling(tid, &attributes)?;
    }
    if task::io_priority(tid)? != wanted.io_priority {
        task::set_io_priority(tid, wanted.io_priority)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use nix::{
        sys::{
            signal::{Signal, kill},
            wait::waitpid,
        },
        unistd::Pid,
    };

    use super::*;
    use crate::sys::testing::fork_holder;

    #[test]
    fn what_is_inherited_is_not_set_and_the_rest_is_in_its_time() {
        let host = fork_holder(&[]).unwrap();
        let inherited = Inherited::of(host);
        let now = |resource| task::limit(host, resource).unwrap();
        let (first, last) = (libc::RLIMIT_CORE, libc::RLIMIT_NOFILE);
        let mut limits: Vec<(u64, u64)> = (0..LIMITS).map(now).collect();
        // If it were set it would be undone by this.
        task::set_limit(host, libc::RLIMIT_STACK, 4096, now(libc::RLIMIT_STACK).1).unwrap();
        limits[first as usize].0 = 4096;
        limits[last as usize].0 = 77;
        inherited.limit(host, &limits, When::First);
        assert_eq!((now(first).0, now(last).0 == 77), (4096, false));
        inherited.limit(host, &limits, When::Last);
        assert_eq!((now(first).0, now(last).0), (4096, 77));
        assert_eq!(now(libc::RLIMIT_STACK).0, 4096);
        let text = |name| procfs::read_text(host, name).unwrap().trim().to_owned();
        let before = text(ADJUSTMENT).parse().unwrap();
        inherited.describe(host, before, 0x11);
        assert_eq!(u32::from_str_radix(&text(FILTER), 16), Ok(0x11));
        inherited.describe(host, 700, 0x11);
        assert_eq!(text(ADJUSTMENT), "700");
        kill(Pid::from_raw(host), Signal::SIGKILL).unwrap();
        waitpid(Pid::from_raw(host), None).unwrap();
    }
}
