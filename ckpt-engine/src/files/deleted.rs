//! What is open but has no name any more: files, whose contents travel with the VE's memory, and
//! directories, which are empty.

use std::{
    ffi::OsStr,
    fs, io,
    os::{
        fd::{AsFd, OwnedFd},
        unix::ffi::OsStrExt,
    },
    path::{Path, PathBuf},
};

use ckpt_format::files::Kind;
use nix::{fcntl::OFlag, sys::stat::Mode};

use super::{
    capture::Capture,
    find::{Object, Refusal},
    path,
    rebuild::{Rebuild, RebuildError, lossy},
    search,
};
use crate::{momentary, unnamed};

/// Whether a file or directory has lost the name under which it was opened.
pub(super) fn is_deleted(object: &Object) -> bool {
    object.status.links == 0 || unnamed::lost_name(&object.link).is_some()
}

pub(super) fn capture(capture: &mut Capture<'_>, id: usize) -> Result<Kind, Refusal> {
    let object = &capture.found.objects[id];
    let offset = object.info()?.number("pos", 10)?;
    let object = capture.keep_contents(id)?;
    Ok(Kind::Deleted { object, offset })
}

/// Another name of a file that was opened under one that has gone.
pub(super) fn other_name(capture: &Capture<'_>, object: &Object) -> Option<Vec<u8>> {
    let lost = unnamed::lost_name(&object.link)?;
    if object.status.links == 0 {
        return None;
    }
    let root = PathBuf::from(format!("/proc/{}/root", capture.source.init));
    // Mostly beside the old name, or where that directory's other files are.
    let lost = Path::new(OsStr::from_bytes(lost));
    let near = lost.ancestors().skip(1).take(2).chain([Path::new("/")]);
    near.filter_map(|start| search::by_inode(&root, start, object.inode())).next()
}

/// The path of a directory without a name, which nobody can put anything into.
pub(super) fn capture_directory(object: &Object) -> Kind {
    let path = unnamed::lost_name(&object.link).unwrap_or(&object.link).to_vec();
    Kind::DeletedDirectory { path }
}

pub(super) fn rebuild(
    rebuild: &Rebuild<'_>,
    object: u64,
    offset: u64,
    flags: u32,
) -> Result<OwnedFd, RebuildError> {
    let made = rebuild.target.shared.get(&object).ok_or(RebuildError::Damaged)?;
    let failed = |source| RebuildError::Kernel { object: "file without a name", source };
    let fd = rebuild.target.reopen(made.as_fd(), flags).map_err(failed)?;
    path::seek(fd, offset).map_err(failed)
}

/// Makes a directory and removes it.
pub(super) fn rebuild_directory(path: &[u8], flags: u32) -> Result<OwnedFd, RebuildError> {
    let failed = |source: io::Error| RebuildError::Open { path: lossy(path), source };
    let flags = path::reopen_flags(flags) | OFlag::O_DIRECTORY;
    let make = |path: &Path| {
        fs::create_dir(path)?;
        Ok(nix::fcntl::open(path, flags, Mode::empty())?)
    };
    momentary::near_old_name(Path::new(OsStr::from_bytes(path)), make).map_err(failed)
}
