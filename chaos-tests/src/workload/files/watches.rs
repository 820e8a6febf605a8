//! inotify(7): watches with their numbers, and the events that they tell.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Duration;

use ckpt_engine::sys::program::watch::Watches;
use libc::{IN_CREATE, IN_DELETE, IN_MODIFY, IN_MOVED_TO, IN_OPEN};

use crate::workload::context::Context;
use crate::workload::outcome::{Failure, same};

/// Watches a folder and a file in it.
fn watch(context: &mut Context, folder: &Path) -> Result<(), Failure> {
    let inotify = Watches::new()?;
    let file = folder.join("watched");
    fs::write(&file, b"")?;
    // A number that was used before is not used again.
    let spent = inotify.add(&file, IN_OPEN)?;
    inotify.remove(spent)?;
    let whole = IN_CREATE | IN_DELETE | IN_MOVED_TO;
    let of_folder = inotify.add(folder, whole)?;
    let of_file = inotify.add(&file, IN_MODIFY)?;
    inotify.read()?;
    let mut opened = File::options().write(true).open(&file)?;
    let (new, renamed) = (folder.join("new"), folder.join("renamed"));
    while context.step(Duration::from_millis(8))? {
        same("events of nothing", inotify.read()?, Vec::new())?;
        if context.progress.plant() {
            inotify.remove(of_file)?;
        }
        opened.write_all(b"x")?;
        let modified = (of_file, IN_MODIFY, String::new());
        same("events of a file", inotify.read()?, vec![modified])?;
        File::create(&new)?;
        fs::rename(&new, &renamed)?;
        fs::remove_file(&renamed)?;
        let told = |mask, name: &str| (of_folder, mask, name.to_owned());
        let expected =
            vec![told(IN_CREATE, "new"), told(IN_MOVED_TO, "renamed"), told(IN_DELETE, "renamed")];
        same("events of a folder", inotify.read()?, expected)?;
    }
    Ok(())
}

pub(super) fn on_disk(context: &mut Context) -> Result<(), Failure> {
    let folder = context.path("folder");
    fs::create_dir(&folder)?;
    watch(context, &folder)
}

/// A folder that goes with the workload.
struct Folder(PathBuf);

impl Drop for Folder {
    fn drop(&mut self) {
        // It may be gone already.
        let _ = fs::remove_dir_all(&self.0);
    }
}

pub(super) fn in_memory(context: &mut Context) -> Result<(), Failure> {
    let path = format!("/dev/shm/selfcheck-watch-{}", nix::unistd::getpid());
    let folder = Folder(PathBuf::from(path));
    fs::create_dir(&folder.0)?;
    watch(context, &folder.0)
}
