//! What is put on the memory of a process last, because it keeps everybody off: guards, locks and
//! seals.

use ckpt_format::memory::Backing;

use super::{Bone, RebuildError, Skeleton};

const MADV_GUARD_INSTALL: u64 = 102;
const SYS_MSEAL: i64 = 462;

impl Skeleton {
    /// All pages are there, and the limits of the VE are not set yet.
    pub(super) fn protect_memory(&self, bone: &Bone) -> Result<(), RebuildError> {
        let failed = bone.failed("protect its memory");
        let guards = bone.guards.iter().map(|run| {
            let arguments = [run.start, run.end() - run.start, MADV_GUARD_INSTALL];
            ("madvise", libc::SYS_madvise, arguments)
        });
        let areas = &bone.areas;
        // Up to here their pages came one by one; now all are there, zeros as well.
        let whole = areas.iter().filter(|area| area.advice.locked && !area.advice.locked_on_fault);
        let locks = whole.map(|area| ("mlock2", libc::SYS_mlock2, [area.start, area.len(), 0]));
        let sealed = areas.iter().filter(|area| area.advice.sealed);
        let seals = sealed.map(|area| ("mseal", SYS_MSEAL, [area.start, area.len(), 0]));
        // See `while_filled`.
        let huge = areas.iter().filter(|area| {
            let writable = i32::from(area.protection) & libc::PROT_WRITE != 0;
            matches!(area.backing, Backing::Huge { .. }) && !writable
        });
        let closed = huge.map(|area| {
            let arguments = [area.start, area.len(), area.protection.into()];
            ("mprotect", libc::SYS_mprotect, arguments)
        });
        let mut batch = self.gate.batch();
        for (name, number, arguments) in guards.chain(closed).chain(locks).chain(seals) {
            batch.call(name, number, &arguments);
            if batch.is_nearly_full() {
                let full = std::mem::replace(&mut batch, self.gate.batch());
                full.run(&bone.thread)?.all().map_err(&failed)?;
            }
        }
        if batch.is_empty() {
            return Ok(());
        }
        batch.run(&bone.thread)?.all().map_err(&failed)
    }
}
