//! Slows a VE down that writes faster than it can be copied.
//!
//! Whatever becomes of the move, the VE gets back the limit that it had: here, by the watchdog
//! if the daemon dies, and by the daemon that comes back. On the target it starts with its own.

use std::time::{Duration, Instant};

use crate::cgroup::{CgroupError, Cgroups, CpuLimit};

/// What a VE is assumed to use at least, in CPUs: a share of nothing would stop it.
const USED_MIN: f64 = 0.05;

/// The hand on the CPU time of one VE. Dropped, it lets go.
#[derive(Debug)]
pub(super) struct Brake {
    cgroups: Cgroups,
    /// None where CPU time cannot be limited.
    own: Option<CpuLimit>,
    /// The share of its CPU time that it is left.
    percent: Option<u8>,
    /// True if something else than its own limit may be in force.
    changed: bool,
    /// When it was last looked at, and what it had used then.
    seen: (Instant, Duration),
    /// How many CPUs it used while it was not slowed down.
    used: f64,
}

impl Brake {
    /// For a VE with its limits as they are.
    pub(super) fn new(cgroups: Cgroups) -> Result<Self, CgroupError> {
        let own = cgroups.cpu_limit()?;
        let seen = (Instant::now(), cgroups.cpu_time()?);
        Ok(Self { cgroups, own, percent: None, changed: false, seen, used: USED_MIN })
    }

    /// What puts the VE's own limit back, for somebody else who may have to.
    pub(super) fn own(&self) -> Option<&CpuLimit> {
        self.own.as_ref()
    }

    /// The share of its CPU time that the VE is left, if it is slowed down.
    pub(super) fn percent(&self) -> Option<u8> {
        self.percent
    }

    /// Notes what the VE has used since the last time.
    pub(super) fn look(&mut self) -> Result<(), CgroupError> {
        let now = (Instant::now(), self.cgroups.cpu_time()?);
        if self.percent.is_none() {
            let wall = (now.0 - self.seen.0).as_secs_f64();
            let used = now.1.saturating_sub(self.seen.1).as_secs_f64();
            if wall > 0.0 {
                self.used = (used / wall).max(USED_MIN);
            }
        }
        self.seen = now;
        Ok(())
    }

    /// Leaves the VE this share of what it used.
    pub(super) fn press(&mut self, percent: u8) -> Result<(), CgroupError> {
        self.changed = true;
        self.cgroups.limit_cpus(self.used * f64::from(percent) / 100.0)?;
        self.percent = Some(percent);
        Ok(())
    }

    /// Just before the VE is stopped: its processes reach their stop, and run our calls, with
    /// CPU time of their own. One that had used up its share would first wait for the next.
    pub(super) fn lift(&mut self) -> Result<(), CgroupError> {
        if !self.changed && self.own.as_ref().is_none_or(CpuLimit::is_unlimited) {
            return Ok(());
        }
        self.changed = true;
        self.cgroups.widen_cpu_limit()
    }

    /// The VE goes on, as slowly as before it was stopped.
    pub(super) fn again(&mut self) -> Result<(), CgroupError> {
        match self.percent {
            Some(percent) => self.press(percent),
            None => self.let_go(),
        }
    }

    fn let_go(&mut self) -> Result<(), CgroupError> {
        if let Some(own) = self.own.as_ref().filter(|_| self.changed) {
            own.restore()?;
        }
        self.changed = false;
        Ok(())
    }
}

impl Drop for Brake {
    fn drop(&mut self) {
        if let Err(error) = self.let_go() {
            tracing::error!(%error, "a VE keeps a limit of CPU time that is not its own");
        }
    }
}
