//! The working directory of a process.

use super::{Bone, RebuildError, Skeleton};

/// What the kernel appends to the path of a directory that was removed.
const REMOVED: &str = " (deleted)";

/// Whether the path is that of a directory that was removed, or may be.
pub(super) fn is_removed(path: &str) -> bool {
    path.ends_with(REMOVED)
}

impl Skeleton {
    /// Makes a process enter its working directory. One that was removed is made for that moment.
    pub(super) fn enter_directory(&self, bone: &Bone, path: &str) -> Result<(), RebuildError> {
        let mut batch = self.gate.batch();
        let address = batch.text(path);
        batch.call("chdir", libc::SYS_chdir, &[address]);
        let entered = batch.run(&bone.thread)?.all();
        let Some(lost) = path.strip_suffix(REMOVED).filter(|_| entered.is_err()) else {
            return entered.map_err(bone.failed("enter its working directory"));
        };
        // Its name may be taken by now, and what was around it may have gone.
        for directory in std::path::Path::new(lost).ancestors() {
            for name in [directory.to_owned(), directory.join(".moved-aside")] {
                let mut batch = self.gate.batch();
                let address = batch.text(&name.to_string_lossy());
                let made = batch.call("mkdir", libc::SYS_mkdir, &[address, 0o755]);
                if batch.run(&bone.thread)?.result(made).is_err() {
                    continue;
                }
                let mut batch = self.gate.batch();
                let address = batch.text(&name.to_string_lossy());
                batch.call("chdir", libc::SYS_chdir, &[address]);
                batch.call("rmdir", libc::SYS_rmdir, &[address]);
                let done = batch.run(&bone.thread)?.all();
                return done.map_err(bone.failed("enter its removed working directory"));
            }
        }
        entered.map_err(bone.failed("enter its working directory"))
    }
}
