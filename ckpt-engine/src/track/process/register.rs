//! Starts the tracking of areas that are new.

use ckpt_format::memory::{Area, Backing, PAGE};

use super::{Life, has_private_pages};
use crate::{
    inject::Vdso,
    ranges::Ranges,
    sys::pagemap::{self, Query},
};

impl Life {
    /// Finds the areas without tracking and registers them; whatever is in them is due.
    ///
    /// They are found before anything is registered: an area can lose its registration and keep
    /// its protection marks (mremap(2) of untouched memory to a place beside it joins the two),
    /// and registered again it would pass for clean. So the marks of all that is new go, too: a
    /// scan never renews one that is there, and would not see later writes either.
    pub(super) fn register_new(&mut self) {
        let Some(tracking) = &self.tracking else { return };
        let probe = Query { mask: 0, inverted: 0, any_of: 0, protect: false, tracked: true };
        let private = self.space.areas.iter().filter(|area| has_private_pages(area));
        let new: Vec<&Area> = private
            .filter(|area| {
                pagemap::scan(&self.pagemap, area.start, area.start + PAGE, probe, |_, _| ())
                    .is_err_and(|error| error.raw_os_error() == Some(libc::EPERM))
            })
            .collect();
        let others: Vec<&Area> =
            self.space.areas.iter().filter(|area| !has_private_pages(area)).collect();
        let top = self.top();
        let around: Ranges = new.iter().map(|area| around(&others, area.start, top)).collect();
        for area in &new {
            self.anew.insert(area.start, area.end);
        }
        for (start, end) in around.iter() {
            if tracking.register(start, end).is_err() {
                // Something in between that cannot be tracked has come up meanwhile.
                for area in new.iter().filter(|area| start <= area.start && area.end <= end) {
                    if let Err(error) = tracking.register(area.start, area.end) {
                        tracing::debug!(%error, "an area is not tracked yet");
                    }
                }
            }
        }
        let cleared = new.iter().map(|area| tracking.clear(area.start, area.end));
        let failed = cleared.filter_map(Result::err).find(|error| {
            // Gone again, or not registered: a scan tells.
            error.raw_os_error() != Some(libc::ENOENT)
        });
        if let Some(error) = failed {
            tracing::warn!(%error, "the tracking of a process starts anew");
            // Whether its marks are right nobody knows. Without tracking all counts as written.
            self.tracking = None;
        }
    }

    /// The end of all that is registered. A process of 32 bits has none that can be told: its stack
    /// is the highest that it has.
    fn top(&self) -> u64 {
        const TASK_SIZE: u64 = 0x7fff_ffff_f000;
        match self.space.vdso() {
            Some(Vdso { is_32_bit: true, .. }) => {
                let mut all = self.space.areas.iter().rev();
                let highest = all.find(|area| area.backing != Backing::Vsyscall);
                highest.map_or(TASK_SIZE, |area| area.end)
            }
            _ => TASK_SIZE,
        }
    }
}

/// Everything around an address up to the next area, on each side, that is not tracked, and to
/// `top`. `others` are those areas in ascending order.
///
/// Areas are registered with all around them. What is registered exactly as it was read can be
/// part of a larger area by now, which that would split in two; and to a program that moves or
/// resizes it (mremap(2)), what is not one area is an error.
fn around(others: &[&Area], address: u64, top: u64) -> (u64, u64) {
    // Where the kernel lets nobody map anything (`vm.mmap_min_addr`).
    const LOWEST: u64 = 0x1_0000;
    let next = others.partition_point(|area| area.end <= address);
    let low = next.checked_sub(1).map_or(LOWEST, |before| others[before].end);
    let high = others.get(next).map_or(top, |area| area.start);
    (low, high.min(top))
}
