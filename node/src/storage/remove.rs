//! Removes names with all below them, except where something is mounted.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use nix::{
    dir::Dir,
    errno::Errno,
    fcntl::{OFlag, openat},
    sys::stat::Mode,
    unistd::{UnlinkatFlags, unlinkat},
};

use super::{
    error::{TreeError, at},
    path,
};

/// Places that must stay, because the kernel silently takes away what is mounted on a place that
/// is removed in another mount namespace.
#[derive(Debug)]
pub(super) struct MountPoints(Vec<Vec<u8>>);

impl MountPoints {
    pub(super) fn new(places: Vec<Vec<u8>>) -> Self {
        Self(places)
    }

    /// Whether something is mounted on this place or below it.
    pub(super) fn at_or_above(&self, path: &[u8]) -> bool {
        self.0.iter().any(|place| {
            place.strip_prefix(path).is_some_and(|rest| rest.is_empty() || rest[0] == b'/')
        })
    }
}

/// A directory that is being emptied.
struct Level {
    directory: OwnedFd,
    path: Vec<u8>,
    names: Vec<Vec<u8>>,
}

/// Removes a name and all below it, as far as the mount points allow. A name that does not exist
/// is no error. False when there was nothing to remove.
pub(super) fn remove(
    parent: BorrowedFd<'_>,
    name: &[u8],
    path: &[u8],
    mount_points: &MountPoints,
) -> Result<bool, TreeError> {
    match remove_one(parent, name, path, mount_points)? {
        Outcome::Absent => return Ok(false),
        Outcome::Done => return Ok(true),
        Outcome::Full => (),
    }
    let mut levels = vec![enter(parent, name, path)?];
    while let Some(level) = levels.last_mut() {
        let Some(name) = level.names.pop() else {
            let Some(level) = levels.pop() else { break };
            let (_, name) = path::split(&level.path);
            let parent = levels.last().map_or(parent, |level| level.directory.as_fd());
            if !mount_points.at_or_above(&level.path) {
                unlinkat(parent, name, UnlinkatFlags::RemoveDir)
                    .map_err(at("remove", &level.path))?;
            }
            continue;
        };
        let path = path::join(&level.path, &name);
        if let Outcome::Full = remove_one(level.directory.as_fd(), &name, &path, mount_points)? {
            let next = enter(level.directory.as_fd(), &name, &path)?;
            levels.push(next);
        }
    }
    Ok(true)
}

enum Outcome {
    /// It is gone, or stays.
    Done,
    /// It was not there.
    Absent,
    /// It is a directory that may have something in it.
    Full,
}

fn remove_one(
    parent: BorrowedFd<'_>,
    name: &[u8],
    path: &[u8],
    mount_points: &MountPoints,
) -> Result<Outcome, TreeError> {
    if mount_points.at_or_above(path) {
        // A directory is emptied, as far as nothing else is mounted there; a file stays.
        let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        return match openat(parent, name, flags, Mode::empty()) {
            Ok(_) => Ok(Outcome::Full),
            Err(Errno::ENOENT) => Ok(Outcome::Absent),
            Err(Errno::ENOTDIR | Errno::ELOOP) => Ok(Outcome::Done),
            Err(errno) => Err(at("remove", path)(errno)),
        };
    }
    match unlinkat(parent, name, UnlinkatFlags::NoRemoveDir) {
        Ok(()) => Ok(Outcome::Done),
        Err(Errno::ENOENT) => Ok(Outcome::Absent),
        Err(Errno::EISDIR) => Ok(Outcome::Full),
        Err(errno) => Err(at("remove", path)(errno)),
    }
}

fn enter(parent: BorrowedFd<'_>, name: &[u8], path: &[u8]) -> Result<Level, TreeError> {
    let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    let directory = openat(parent, name, flags, Mode::empty()).map_err(at("open", path))?;
    let copy = directory.try_clone().map_err(at("open", path))?;
    let mut names = Vec::new();
    for entry in Dir::from_fd(copy).map_err(at("read", path))?.iter() {
        let entry = entry.map_err(at("read", path))?;
        let name = entry.file_name().to_bytes();
        if !matches!(name, b"." | b"..") {
            names.push(name.to_vec());
        }
    }
    Ok(Level { directory, path: path.to_vec(), names })
}
