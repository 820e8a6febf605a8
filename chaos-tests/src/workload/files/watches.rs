//! inotify(7) and fanotify(7): watches with their numbers, marks, and the events that they tell.

use std::collections::BTreeSet;
use std::fs::{self, File, Permissions};
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use ckpt_engine::sys::program::watch::{Group, Watches};
use libc::{FAN_CREATE, FAN_DELETE, FAN_EVENT_ON_CHILD, FAN_MARK_ADD, FAN_MARK_FILESYSTEM};
use libc::{FAN_MARK_IGNORED_MASK, FAN_MARK_IGNORED_SURV_MODIFY, FAN_MARK_REMOVE, FAN_MODIFY};
use libc::{FAN_MOVED_TO, FAN_ONDIR};
use libc::{IN_ATTRIB, IN_CREATE, IN_DELETE, IN_ISDIR, IN_MODIFY, IN_MOVED_TO, IN_OPEN};

use crate::workload::context::Context;
use crate::workload::mounts::table::{Ground, new};
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

/// Watches a file and a folder that have lost their names, and are open.
pub(super) fn gone(context: &mut Context) -> Result<(), Failure> {
    let inotify = Watches::new()?;
    let (file, folder) = (context.path("log"), context.path("folder"));
    let mut opened = File::create(&file)?;
    fs::create_dir(&folder)?;
    let open_folder = File::open(&folder)?;
    let of_file = inotify.add(&file, IN_MODIFY)?;
    let of_folder = inotify.add(&folder, IN_ATTRIB)?;
    fs::remove_file(&file)?;
    fs::remove_dir(&folder)?;
    inotify.read()?;
    while context.step(Duration::from_millis(8))? {
        same("events of nothing", inotify.read()?, Vec::new())?;
        if context.progress.plant() {
            inotify.remove(of_file)?;
        }
        opened.write_all(b"x")?;
        let modified = (of_file, IN_MODIFY, String::new());
        same("events of a file without a name", inotify.read()?, vec![modified])?;
        open_folder.set_permissions(Permissions::from_mode(0o755))?;
        let told = (of_folder, IN_ATTRIB | IN_ISDIR, String::new());
        same("events of a folder without a name", inotify.read()?, vec![told])?;
    }
    Ok(())
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

/// What a group should tell. What waits to be read when a VE is stopped is lost: so each of several
/// things may be missed once, but not again the next time.
struct Expected {
    group: Group,
    missed: BTreeSet<&'static str>,
}

impl Expected {
    fn new() -> Result<Self, Failure> {
        Ok(Self { group: Group::new()?, missed: BTreeSet::new() })
    }

    fn check(
        &mut self,
        what: &'static str,
        events: u64,
        name: Option<&str>,
    ) -> Result<(), Failure> {
        let mut found = self.group.read()?;
        if found.is_empty() && self.missed.insert(what) {
            return Ok(());
        }
        if name.is_none() {
            found.iter_mut().for_each(|(_, name)| name.clear());
        }
        self.missed.remove(what);
        same(what, found, vec![(events, name.unwrap_or_default().to_owned())])
    }
}

/// Marks a folder and two files in it.
fn mark(context: &mut Context, folder: &Path) -> Result<(), Failure> {
    let mut expected = Expected::new()?;
    let (file, quiet) = (folder.join("marked"), folder.join("quiet"));
    fs::write(&file, b"")?;
    fs::write(&quiet, b"")?;
    let group = &expected.group;
    let whole = FAN_CREATE | FAN_DELETE | FAN_MOVED_TO | FAN_ONDIR | FAN_EVENT_ON_CHILD;
    group.mark(FAN_MARK_ADD, whole, folder)?;
    group.mark(FAN_MARK_ADD, FAN_MODIFY, &file)?;
    group.mark(FAN_MARK_ADD, FAN_MODIFY, &quiet)?;
    // Nothing is told of this one.
    let ignore = FAN_MARK_ADD | FAN_MARK_IGNORED_MASK | FAN_MARK_IGNORED_SURV_MODIFY;
    group.mark(ignore, FAN_MODIFY, &quiet)?;
    let mut opened = File::options().write(true).open(&file)?;
    let mut silent = File::options().write(true).open(&quiet)?;
    let (new, renamed) = (folder.join("new"), folder.join("renamed"));
    while context.step(Duration::from_millis(8))? {
        same("events of nothing", expected.group.read()?, Vec::new())?;
        if context.progress.plant() {
            expected.group.mark(FAN_MARK_REMOVE, FAN_MODIFY, &file)?;
        }
        opened.write_all(b"x")?;
        expected.check("events of a file", FAN_MODIFY, None)?;
        silent.write_all(b"x")?;
        same("events of a file that is ignored", expected.group.read()?, Vec::new())?;
        // Events of one name are told at once if nobody reads in between.
        fs::create_dir(&new)?;
        expected.check("a new folder", FAN_CREATE | FAN_ONDIR, Some("new"))?;
        fs::rename(&new, &renamed)?;
        expected.check("a new name", FAN_MOVED_TO | FAN_ONDIR, Some("renamed"))?;
        fs::remove_dir(&renamed)?;
        expected.check("a folder that goes", FAN_DELETE | FAN_ONDIR, Some("renamed"))?;
    }
    Ok(())
}

pub(super) fn marks_on_disk(context: &mut Context) -> Result<(), Failure> {
    let folder = context.path("folder");
    fs::create_dir(&folder)?;
    mark(context, &folder)
}

pub(super) fn marks_in_memory(context: &mut Context) -> Result<(), Failure> {
    let path = format!("/dev/shm/selfcheck-mark-{}", nix::unistd::getpid());
    let folder = Folder(PathBuf::from(path));
    fs::create_dir(&folder.0)?;
    mark(context, &folder.0)
}

/// A mark on a whole file system, where the kernel gives it to root of a user namespace (6.16).
pub(super) fn marks_on_all(context: &mut Context) -> Result<(), Failure> {
    let ground = Ground::new(context)?;
    let place = ground.directory("place")?;
    new(&place, "tmpfs", "")?;
    fs::create_dir_all(place.join("deep/deeper"))?;
    let mut expected = Expected::new()?;
    let events = FAN_CREATE | FAN_DELETE;
    let whole = match expected.group.mark(FAN_MARK_ADD | FAN_MARK_FILESYSTEM, events, &place) {
        Err(error) if error.raw_os_error() == Some(libc::EPERM) => false,
        marked => marked.map(|()| true)?,
    };
    if !whole {
        expected.group.mark(FAN_MARK_ADD, events, &place.join("deep/deeper"))?;
    }
    let file = place.join("deep/deeper/file");
    let mut planted = false;
    while context.step(Duration::from_millis(8))? {
        same("events of nothing", expected.group.read()?, Vec::new())?;
        planted |= context.progress.plant();
        File::create(&file)?;
        if planted {
            expected.group.read()?;
        }
        expected.check("a new file", FAN_CREATE, Some("file"))?;
        fs::remove_file(&file)?;
        expected.check("a file that goes", FAN_DELETE, Some("file"))?;
    }
    Ok(())
}
