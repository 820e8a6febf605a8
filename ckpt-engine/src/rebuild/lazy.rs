//! Pages that are to come when the VE runs already.

use std::{
    collections::BTreeMap,
    fs::File,
    io,
    os::fd::{AsRawFd, OwnedFd},
};

use ckpt_format::memory::Run;

use super::{
    Bone, CHANNEL, Inconsistency, RebuildError, Skeleton,
    areas::{Message, send_descriptors},
};
use crate::{
    procfs,
    ranges::Ranges,
    sys::{
        missing::{self, Missing},
        pagemap::{self, Query, category},
        task,
    },
};

/// The most runs dropped in one stop.
const DROPS_MAX: usize = 1024;

/// The pages that are to come later, by the number of their process, in the order in which they
/// are to be fetched.
pub type Later = BTreeMap<i32, Vec<Run>>;

/// The userfaultfds of processes that will miss pages.
#[derive(Debug, Default)]
pub struct Faults(BTreeMap<i32, Missing>);

/// A process some of whose pages are missing.
#[derive(Debug)]
pub struct Incomplete {
    /// Its number in the VE.
    pub pid: i32,
    /// The pages, in the order in which they are to be fetched.
    pub runs: Vec<Run>,
    /// Its userfaultfd: when its last copy is closed, what is missing reads as zeros.
    pub faults: OwnedFd,
}

impl Skeleton {
    /// Makes the userfaultfds of the processes that will miss pages. To be called before their own
    /// descriptors are installed: only until then can something be passed to them.
    pub fn open_faults(&self, later: &Later) -> Result<Faults, RebuildError> {
        let mut faults = Faults::default();
        if later.is_empty() {
            return Ok(faults);
        }
        let device = missing::open_device().map_err(outside(1, "open the userfaultfd device"))?;
        for &pid in later.keys() {
            faults.0.insert(pid, self.open_fault(self.bone(pid)?, &device)?);
        }
        Ok(faults)
    }

    fn open_fault(&self, bone: &Bone, device: &File) -> Result<Missing, RebuildError> {
        let failed = bone.failed("make its userfaultfd");
        send_descriptors(&self.channel, &[device.as_raw_fd()])
            .map_err(outside(bone.pid, "pass the userfaultfd device to it"))?;
        let mut batch = self.gate.batch();
        // The device becomes descriptor 0, the lowest and free.
        let received = Message::add(&mut batch, 1).receive(&mut batch, CHANNEL);
        let flags = (libc::O_CLOEXEC | libc::O_NONBLOCK) as u64;
        let made = batch.call("ioctl", libc::SYS_ioctl, &[0, missing::NEW, flags]);
        batch.call("close", libc::SYS_close, &[0]);
        let done = batch.run(&bone.thread)?;
        done.value(received).map_err(&failed)?;
        let number = done.value(made).map_err(&failed)?;
        let fetched = task::pidfd_open(bone.thread.tid)
            .and_then(|pidfd| task::pidfd_getfd(&pidfd, number as i32));
        self.call(&bone.thread, bone.pid, "close", libc::SYS_close, &[number])?;
        fetched.and_then(Missing::new).map_err(outside(bone.pid, "set its userfaultfd up"))
    }

    /// Takes these pages away, whatever was written there before, and lets threads that touch them
    /// wait from now on. Nothing may touch them afterwards until somebody answers, so this comes
    /// last, just before the registers.
    pub fn leave_out(
        &self,
        later: Later,
        mut faults: Faults,
    ) -> Result<Vec<Incomplete>, RebuildError> {
        let mut all = Vec::with_capacity(later.len());
        for (pid, runs) in later {
            let bone = self.bone(pid)?;
            let Some(missing) = faults.0.remove(&pid) else {
                return Err(Inconsistency::UnknownProcess(pid).into());
            };
            let pages: Ranges = runs.iter().map(|run| (run.start, run.end())).collect();
            let areas = areas_with(bone, &pages)?;
            // First: afterwards the call would wait until somebody has heard of it.
            self.take_away(bone, &pages)?;
            for (start, end) in areas.iter() {
                missing.register(start, end).map_err(outside(pid, "watch its memory"))?;
            }
            check_absent(bone, &pages)?;
            all.push(Incomplete { pid, runs, faults: missing.into_descriptor() });
        }
        Ok(all)
    }

    fn take_away(&self, bone: &Bone, pages: &Ranges) -> Result<(), RebuildError> {
        let failed = bone.failed("take pages away that are to come later");
        let pages: Vec<(u64, u64)> = pages.iter().collect();
        for part in pages.chunks(DROPS_MAX) {
            let mut batch = self.gate.batch();
            for &(start, end) in part {
                let arguments = [start, end - start, libc::MADV_DONTNEED as u64];
                batch.call("madvise", libc::SYS_madvise, &arguments);
            }
            batch.run(&bone.thread)?.all().map_err(&failed)?;
        }
        Ok(())
    }
}

/// The areas that hold the pages.
fn areas_with(bone: &Bone, pages: &Ranges) -> Result<Ranges, RebuildError> {
    let areas = bone.areas.iter().filter(|area| crate::areas::can_come_later(area));
    let bounds = areas.map(|area| (area.start, area.end));
    let with_pages: Vec<(u64, u64)> =
        bounds.filter(|&(start, end)| pages.within(start, end).next().is_some()).collect();
    let whole: Ranges = with_pages.into_iter().collect();
    match pages.without(&whole).is_empty() {
        true => Ok(whole),
        false => Err(Inconsistency::AreaOutside(bone.pid).into()),
    }
}

/// What is there would never be fetched, so nothing may be there.
fn check_absent(bone: &Bone, pages: &Ranges) -> Result<(), RebuildError> {
    let failed = |source| outside(bone.pid, "see which of its pages are missing")(source);
    let pagemap = File::open(procfs::path(bone.thread.tid, "pagemap")).map_err(failed)?;
    let any_of = category::PRESENT | category::SWAPPED;
    let mut present = false;
    for (start, end) in pages.iter() {
        let query = Query { any_of, ..Query::default() };
        pagemap::scan(&pagemap, start, end, query, |_, _| present = true).map_err(failed)?;
    }
    match present {
        false => Ok(()),
        true => Err(failed(io::ErrorKind::AlreadyExists.into())),
    }
}

fn outside(pid: i32, what: &'static str) -> impl FnOnce(io::Error) -> RebuildError {
    move |source| RebuildError::Outside { pid, what, source }
}
