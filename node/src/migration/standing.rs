//! Lets a VE go on that somebody left standing.
//!
//! Done by the watchdog when the daemon has died, and by the daemon that comes back. Everything
//! in it may be done twice, and to a VE that runs.

use std::path::{Path, PathBuf};

use ckpt_engine::{
    capture::{self, CaptureError},
    files,
    freeze::Frozen,
};
use serde::{Deserialize, Serialize};

use super::{blackout::CopyError, holders::Holders};
use crate::{
    cgroup::CpuLimit,
    network::{Gate, Interface, Netlink, NetworkError},
};

/// What must be known of a VE to let it go on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Standing {
    /// The cgroup that freezes it.
    pub(super) freezer: PathBuf,
    /// Its pid 1, as the host numbers it.
    pub(super) init: i32,
    /// The host id that root inside stands for.
    pub(super) id_base: u32,
    /// Its interface, if it has one.
    pub(super) interface: Option<Interface>,
    /// Its own limit of CPU time, if there can be one.
    pub(super) cpu: Option<CpuLimit>,
}

impl Standing {
    /// Connections first, then the way out, then processes. What cannot be put right does not keep
    /// the rest from it; the first thing that failed is told.
    pub(super) fn put_right(&self) -> Result<(), CopyError> {
        let mended = self.mend();
        if is_frozen(&self.freezer) {
            // Else waits in the VE would end early.
            if let Err(error) = capture::hide_interruption(&Frozen::adopt(&self.freezer)) {
                tracing::warn!(%error, "programs in the VE may notice that they stood still");
            }
        }
        // What it sends when it wakes must get through.
        let opened = self.open();
        let thawed = Frozen::adopt(&self.freezer).thaw().map_err(CopyError::Freeze);
        mended.and(opened).and(thawed).and(self.restore_cpu())
    }

    /// Gives the VE its own limit of CPU time back.
    pub(super) fn restore_cpu(&self) -> Result<(), CopyError> {
        self.cpu.as_ref().map_or(Ok(()), |cpu| cpu.restore().map_err(CopyError::Cpu))
    }

    fn mend(&self) -> Result<(), CopyError> {
        let holders = Holders::of(&self.freezer)?;
        match files::mend(&holders.source(self.init, self.id_base)) {
            Ok(0) => Ok(()),
            Ok(mended) => {
                tracing::info!(mended, "connections were left in repair");
                Ok(())
            }
            Err(blockers) => Err(CaptureError::Blocked(blockers).into()),
        }
    }

    fn open(&self) -> Result<(), CopyError> {
        let Some(interface) = &self.interface else { return Ok(()) };
        let mut netlink = Netlink::open().map_err(NetworkError::from)?;
        Ok(interface.set_gate(&mut netlink, Gate::Open)?)
    }
}

fn is_frozen(freezer: &Path) -> bool {
    std::fs::read_to_string(freezer.join("cgroup.freeze")).is_ok_and(|text| text.trim() == "1")
}
