//! Takes a testbed down, whole or half built.
//!
//! Nothing here trusts what was remembered: all is found by name.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use nix::{
    errno::Errno,
    mount::{MntFlags, umount2},
};

use super::{TestbedError, cgroups, names::Layout, state::State, system};

/// Removes everything of the testbed. That there is nothing is no error.
pub(super) fn everything(layout: &Layout) -> Result<(), TestbedError> {
    // Processes first: they use all the rest.
    cgroups::remove(layout)?;
    if let Ok(Some(state)) = State::load(layout) {
        // Those that this process started are its to bury; asking does it.
        let _ = state.daemons.values().filter(|daemon| daemon.is_running()).count();
    }
    unmount_below(&layout.directory())?;
    remove_namespaces(layout)?;
    let directory = layout.directory();
    match fs::remove_dir_all(&directory) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            return Err(system("remove", directory)(error));
        }
        _ => {}
    }
    match fs::remove_file(layout.lock_file()) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            return Err(system("remove", layout.lock_file())(error));
        }
        _ => {}
    }
    // Only if this was the last one; and /run/netns only if nobody else uses it.
    let _ = fs::remove_dir(layout.base());
    let _ = fs::remove_dir(Layout::netns_directory());
    Ok(())
}

fn unmount_below(directory: &Path) -> Result<(), TestbedError> {
    // The last mounted first: it may be on top of or below an earlier one.
    for place in mount_points().iter().rev().filter(|place| place.starts_with(directory)) {
        unmount(place)?;
    }
    Ok(())
}

fn remove_namespaces(layout: &Layout) -> Result<(), TestbedError> {
    let directory = Layout::netns_directory();
    let entries = match fs::read_dir(directory) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(system("read", directory)(error)),
    };
    for entry in entries {
        let entry = entry.map_err(system("read", directory))?;
        if !entry.file_name().to_string_lossy().starts_with(&layout.netns_prefix()) {
            continue;
        }
        unmount(&entry.path())?;
        fs::remove_file(entry.path()).map_err(system("remove", entry.path()))?;
    }
    Ok(())
}

/// Unmounts all that is mounted at a place.
fn unmount(place: &Path) -> Result<(), TestbedError> {
    loop {
        match umount2(place, MntFlags::MNT_DETACH) {
            Ok(()) => {}
            Err(Errno::EINVAL | Errno::ENOENT) => return Ok(()),
            Err(errno) => return Err(system("unmount", place)(errno.into())),
        }
    }
}

fn mount_points() -> Vec<PathBuf> {
    let text = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    text.lines().filter_map(|line| line.split(' ').nth(4)).map(unescape).collect()
}

/// The kernel writes space, tab, newline and backslash as octal numbers.
fn unescape(text: &str) -> PathBuf {
    let text = text.replace("\\040", " ").replace("\\011", "\t").replace("\\012", "\n");
    PathBuf::from(text.replace("\\134", "\\"))
}
