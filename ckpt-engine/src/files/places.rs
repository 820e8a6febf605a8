//! Where processes are: their working directories and roots.

use std::os::fd::AsFd;

use ckpt_format::blocker::Blocker;
use nix::{
    fcntl::{OFlag, open},
    sys::stat::Mode,
};

use super::{Holder, Source};
use crate::{procfs, sys::descriptor};

/// Refuses those that are in no mount of the VE any more (`umount -l`, or a mount point that was
/// removed from another mount namespace): the path that the kernel shows leads elsewhere.
pub(super) fn check(source: &Source<'_>, is_mounted: impl Fn(u64) -> bool) -> Vec<Blocker> {
    let mut blockers = Vec::new();
    for holder in &source.processes {
        for (name, what) in [("cwd", "a working directory"), ("root", "a root directory")] {
            if mount(holder, name).is_some_and(|mount| !is_mounted(mount)) {
                blockers.push(Blocker {
                    pid: holder.pid,
                    command: holder.command.clone(),
                    fd: None,
                    object: format!("{what} in a file system that is not mounted any more"),
                    hint: "end the program".to_owned(),
                });
            }
        }
    }
    blockers
}

/// The mount in which a directory of a process is; none for one that has ended.
fn mount(holder: &Holder<'_>, name: &str) -> Option<u64> {
    let flags = OFlag::O_PATH | OFlag::O_CLOEXEC;
    let path = procfs::path(holder.host_pid, name);
    let directory = open(&path, flags, Mode::empty()).ok()?;
    Some(descriptor::status(directory.as_fd()).ok()?.mount)
}
