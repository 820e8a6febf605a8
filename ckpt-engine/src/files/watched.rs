//! What inotify(7) and fanotify(7) watch: the kernel tells an inode and a handle of it, but no path;
//! see [`search`].

use std::{
    fs, io,
    os::{fd::AsFd, unix::fs::MetadataExt},
    path::{Path, PathBuf},
};

use ckpt_format::files::{Files, Kind};

use super::{
    rebuild::{RebuildError, Rebuilt},
    search::{self, Inode, Mounts, Paths},
};
use crate::sys::{event, handle::Handle};

/// One inode that is watched.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Watched {
    pub(super) inode: Inode,
    pub(super) handle: Option<Handle>,
}

/// Twenty bits of minor, as the kernel has it inside.
pub(super) fn device(inside: u64) -> u64 {
    libc::makedev((inside >> 20) as u32, (inside & 0xf_ffff) as u32)
}

/// "fhandle-bytes:8 fhandle-type:1 f_handle:e8cb3500c97b61e4", where the file system has handles.
pub(super) fn read_handle(text: &str) -> Option<Handle> {
    let value = |name| text.split_whitespace().find_map(|word: &str| word.strip_prefix(name));
    let kind = u8::from_str_radix(value("fhandle-type:")?, 16).ok()?;
    let digits = value("f_handle:")?;
    let byte = |at| u8::from_str_radix(digits.get(at..at + 2)?, 16).ok();
    let bytes = (0..digits.len()).step_by(2).map(byte).collect::<Option<_>>()?;
    Some(Handle { kind: kind.into(), bytes })
}

/// Finds the paths of what is watched.
pub(super) fn paths(all: &[&Watched], mounts: &Mounts, init: i32) -> io::Result<Paths> {
    let by_handle = |it: &Watched| mounts.path_of(it.inode, it.handle.as_ref()?);
    let found: Paths = all.iter().map(|it| (it.inode, by_handle(it))).collect();
    if found.values().all(Option::is_some) {
        return Ok(found);
    }
    let (mut found, rest): (Paths, Paths) = found.into_iter().partition(|(_, it)| it.is_some());
    let root = PathBuf::from(format!("/proc/{init}/root"));
    // Service managers watch these, and there alone it is worth to look below /sys.
    let cgroups = Path::new("/sys/fs/cgroup");
    let device = fs::metadata(root.join("sys/fs/cgroup")).map_or(0, |metadata| metadata.dev());
    let (of_cgroups, mut others): (Paths, Paths) =
        rest.into_iter().partition(|((of, _), _)| *of == device);
    found.extend(search::below(&root, cgroups, of_cgroups));
    for watched in all.iter().filter(|watched| mounts.is_of_overlay(watched.inode.0)) {
        if let Some(place @ None) = others.get_mut(&watched.inode) {
            *place = mounts.path_in_overlay(&root, watched.inode, watched.handle.as_ref());
        }
    }
    let (in_overlays, others): (Paths, Paths) =
        others.into_iter().partition(|(_, place)| place.is_some());
    found.extend(in_overlays);
    if !others.is_empty() {
        found.extend(search::below(&root, Path::new("/"), others));
    }
    Ok(found)
}

/// Takes out what new fanotify groups have been told of the rebuilding of others: what watches a
/// whole file system sees all of it. Nothing of the VE has happened since they were made.
pub(super) fn forget_rebuilding(rebuilt: &Rebuilt, files: &Files) -> Result<(), RebuildError> {
    for (file, made) in files.files.iter().zip(rebuilt.made()) {
        if let (Kind::Fanotify { .. }, Some(made)) = (&file.kind, made) {
            event::drain(made.as_fd())
                .map_err(|source| RebuildError::Kernel { object: "file watch", source })?;
        }
    }
    Ok(())
}
