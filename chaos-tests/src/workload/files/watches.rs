//! inotify(7): watches with their numbers, and the events that they tell.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify, WatchDescriptor};

use crate::workload::context::Context;
use crate::workload::outcome::{Failure, same};

/// The events that wait: which watch, what, and about which name.
fn events(inotify: &Inotify) -> Result<Vec<(WatchDescriptor, AddWatchFlags, String)>, Failure> {
    let events = match inotify.read_events() {
        Err(nix::Error::EAGAIN) => return Ok(Vec::new()),
        events => events?,
    };
    let name = |name: Option<std::ffi::OsString>| name.unwrap_or_default().to_string_lossy().into();
    Ok(events.into_iter().map(|event| (event.wd, event.mask, name(event.name))).collect())
}

fn new() -> Result<Inotify, Failure> {
    Ok(Inotify::init(InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK)?)
}

/// Watches a folder and a file in it.
fn watch(context: &mut Context, folder: &Path) -> Result<(), Failure> {
    let inotify = new()?;
    let file = folder.join("watched");
    fs::write(&file, b"")?;
    // A number that was used before is not used again.
    let spent = inotify.add_watch(&file, AddWatchFlags::IN_OPEN)?;
    inotify.rm_watch(spent)?;
    let whole = AddWatchFlags::IN_CREATE | AddWatchFlags::IN_DELETE | AddWatchFlags::IN_MOVED_TO;
    let of_folder = inotify.add_watch(folder, whole)?;
    let of_file = inotify.add_watch(&file, AddWatchFlags::IN_MODIFY)?;
    events(&inotify)?;
    let mut opened = File::options().write(true).open(&file)?;
    let (new, renamed) = (folder.join("new"), folder.join("renamed"));
    while context.step(Duration::from_millis(8))? {
        same("events of nothing", events(&inotify)?, Vec::new())?;
        if context.progress.plant() {
            inotify.rm_watch(of_file)?;
        }
        opened.write_all(b"x")?;
        let modified = (of_file, AddWatchFlags::IN_MODIFY, String::new());
        same("events of a file", events(&inotify)?, vec![modified])?;
        File::create(&new)?;
        fs::rename(&new, &renamed)?;
        fs::remove_file(&renamed)?;
        let told = |mask, name: &str| (of_folder, mask, name.to_owned());
        let expected = vec![
            told(AddWatchFlags::IN_CREATE, "new"),
            told(AddWatchFlags::IN_MOVED_TO, "renamed"),
            told(AddWatchFlags::IN_DELETE, "renamed"),
        ];
        same("events of a folder", events(&inotify)?, expected)?;
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

pub(super) fn unread(context: &mut Context) -> Result<(), Failure> {
    let inotify = new()?;
    let folder = context.path("folder");
    fs::create_dir(&folder)?;
    let flags = AddWatchFlags::IN_CREATE | AddWatchFlags::IN_DELETE;
    let watch = inotify.add_watch(&folder, flags)?;
    let mut turn = 0u64;
    let make = |turn: u64| -> Result<Vec<_>, Failure> {
        let name = format!("file-{turn}");
        File::create(folder.join(&name))?;
        fs::remove_file(folder.join(&name))?;
        Ok(vec![
            (watch, AddWatchFlags::IN_CREATE, name.clone()),
            (watch, AddWatchFlags::IN_DELETE, name),
        ])
    };
    // There are always some that nobody has read.
    let mut waiting = make(0)?;
    while context.step(Duration::from_millis(8))? {
        if context.progress.plant() {
            events(&inotify)?;
        }
        same("events that waited", events(&inotify)?, waiting)?;
        turn += 1;
        waiting = make(turn)?;
    }
    Ok(())
}
