//! System calls made by processes of the skeleton on behalf of the files that are rebuilt.

use ckpt_format::memory::{Area, Backing};
use nix::errno::Errno;

use super::{Bone, RebuildError, Skeleton};
use crate::{
    files::{Argument, Remote},
    inject::InjectError,
    procfs::Status,
};

impl Remote for Skeleton {
    fn call(&mut self, pid: i32, number: i64, arguments: [Argument<'_>; 6]) -> Result<u64, Errno> {
        let bone = self.processes.get(&pid).ok_or(Errno::ESRCH)?;
        let mut batch = self.gate.batch();
        let mut outputs = Vec::new();
        let words = arguments.map(|argument| match argument {
            Argument::Value(value) => value,
            Argument::In(bytes) => batch.bytes(bytes),
            Argument::Out(bytes) => {
                let address = batch.bytes(bytes);
                outputs.push((address, bytes));
                address
            }
        });
        let call = batch.call("a call for its files", number, &words);
        let done = batch.run(&bone.thread).map_err(|error| errno(&error))?;
        for (address, bytes) in outputs {
            bytes.copy_from_slice(done.data(address, bytes.len()));
        }
        done.result(call)
            .map_err(|error| Errno::from_raw(error.raw_os_error().unwrap_or(libc::EIO)))
    }

    fn has_frames(&self, pid: i32, start: u64, length: u64) -> bool {
        let areas = self.processes.get(&pid).map(|bone| bone.areas.as_slice()).unwrap_or_default();
        let is = |area: &Area| {
            (area.start, area.len(), &area.backing) == (start, length, &Backing::Frames)
        };
        areas.iter().any(is)
    }

    fn number(&self, seen_by: i32, pid: i32) -> Option<i32> {
        let depth = self.processes.get(&seen_by)?.below.len();
        if depth == 0 {
            return Some(pid);
        }
        let bones = self.processes.values();
        let mut tasks = bones.flat_map(|bone| std::iter::once(&bone.thread).chain(&bone.others));
        let below = tasks.find_map(|task| {
            let status = Status::read(task.tid).ok()?;
            ["NSpid", "NSpgid", "NSsid"].into_iter().find_map(|key| {
                (status.in_ve(key).ok()? == pid).then(|| status.below_ve(key).ok())?
            })
        })?;
        below.get(depth - 1).copied().filter(|&number| number != 0)
    }

    fn member(&self, mounts: u32) -> Option<(i32, i32)> {
        let is_there = |bone: &&Bone| bone.namespaces.is_some_and(|it| it.mounts == mounts);
        self.processes.values().find(is_there).map(|bone| (bone.pid, bone.thread.tid))
    }
}

impl Skeleton {
    /// The processes by their number in the VE, with their number on the host.
    pub fn hosts(&self) -> impl Iterator<Item = (i32, i32)> {
        self.processes.values().map(|bone| (bone.pid, bone.thread.tid))
    }

    /// The threads beside the first of each process, likewise.
    pub(super) fn threads(&self) -> Result<Vec<(i32, i32)>, RebuildError> {
        let all = self.processes.values().flat_map(|bone| &bone.others);
        all.map(|thread| Ok((Status::read(thread.tid)?.in_ve("NSpid")?, thread.tid))).collect()
    }

    /// The number of init on the host.
    pub fn init(&self) -> Result<i32, RebuildError> {
        self.bone(1).map(|bone| bone.thread.tid)
    }
}

fn errno(error: &InjectError) -> Errno {
    match error {
        InjectError::Ended { .. } => Errno::ESRCH,
        InjectError::Control { source, .. } | InjectError::Attach { source, .. } => {
            Errno::from_raw(source.raw_os_error().unwrap_or(libc::EIO))
        }
        _ => Errno::EIO,
    }
}
