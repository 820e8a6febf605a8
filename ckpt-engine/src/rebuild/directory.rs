//! The working directory of a process.

use std::{fs, os::fd::AsRawFd, path::Path};

use nix::{
    fcntl::{OFlag, open},
    sys::stat::Mode,
};

use super::{
    Bone, CHANNEL, RebuildError, Skeleton,
    areas::{Message, send_descriptors},
};
use crate::{
    inject::Stopped,
    momentary,
    sys::{identity, namespace},
    unnamed,
};

/// What the kernel appends to the path of a directory that was removed.
const REMOVED: &str = " (deleted)";

/// Whether the path is that of a directory that was removed, or may be.
pub(super) fn is_removed(path: &str) -> bool {
    path.ends_with(REMOVED)
}

impl Skeleton {
    /// Makes a thread enter its working directory. One that was removed is made for that moment.
    pub(super) fn enter_directory(
        &self,
        bone: &Bone,
        thread: &Stopped,
        path: &str,
    ) -> Result<(), RebuildError> {
        let mut batch = self.gate.batch();
        let address = batch.text(path);
        batch.call("chdir", libc::SYS_chdir, &[address]);
        let entered = batch.run(thread)?.all();
        let Some(lost) = path.strip_suffix(REMOVED).filter(|_| entered.is_err()) else {
            return entered.map_err(bone.failed("enter its working directory"));
        };
        let outside = |source| {
            let what = "make its removed working directory";
            RebuildError::Outside { pid: bone.pid, what, source }
        };
        let process = unnamed::process(bone.thread.tid).map_err(outside)?;
        let base = self.id_base;
        let made = namespace::in_mounts_of(&process, || {
            identity::own_new_files(base, base)?;
            momentary::near_old_name(Path::new(lost), |path| {
                fs::create_dir(path)?;
                Ok(open(path, OFlag::O_PATH | OFlag::O_CLOEXEC, Mode::empty())?)
            })
        });
        let made = made.map_err(outside)?;
        send_descriptors(&self.channel, &[made.as_raw_fd()]).map_err(outside)?;
        let mut batch = self.gate.batch();
        let message = Message::add(&mut batch, 1);
        message.receive(&mut batch, CHANNEL);
        batch.call("fchdir", libc::SYS_fchdir, &[0]);
        batch.call("close", libc::SYS_close, &[0]);
        batch.run(thread)?.all().map_err(bone.failed("enter its removed working directory"))
    }
}
