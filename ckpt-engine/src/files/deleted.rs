//! Files that are open but have no name any more: their contents travel with the VE's state.

use std::{
    collections::hash_map::Entry,
    fs::File,
    io,
    os::{
        fd::{AsFd, AsRawFd, OwnedFd},
        unix::{
            ffi::OsStrExt,
            fs::{FileExt, fchown},
        },
    },
};

use ckpt_format::files::{DeletedFile, Extent, Kind};
use nix::{
    errno::Errno,
    fcntl::OFlag,
    sys::stat::{Mode, fchmod},
    unistd::{Whence, lseek},
};

use super::{
    capture::Capture,
    find::{Object, Refusal},
    path,
    rebuild::{Rebuild, RebuildError, lossy},
};

/// How much all files without a name may hold together, in bytes: they are in the part of the
/// state that is sent while the VE stands still.
const LIMIT: u64 = 64 << 20;

/// What the kernel appends to the name.
const SUFFIX: &[u8] = b" (deleted)";

/// Whether a regular file has lost its name.
pub(super) fn is_deleted(object: &Object) -> bool {
    object.status.links == 0 || object.link.ends_with(SUFFIX)
}

/// Refuses files that are too large to travel with the state.
pub(super) fn check(object: &Object) -> Result<(), Refusal> {
    if object.status.size <= LIMIT {
        return Ok(());
    }
    Err(Refusal::new(
        format!("the deleted file {} of {} bytes", lossy(&object.link), object.status.size),
        format!("close it, or keep it under {LIMIT} bytes"),
    ))
}

pub(super) fn capture(capture: &mut Capture<'_>, id: usize) -> Result<Kind, Refusal> {
    let object = &capture.found.objects[id];
    let offset = object.info()?.number("pos", 10)?;
    if let Some(&file) = capture.deleted.get(&object.inode()) {
        return Ok(Kind::Deleted { file, offset });
    }
    let path = object.link.strip_suffix(SUFFIX).unwrap_or(&object.link).to_vec();
    let name = path.rsplit(|&byte| byte == b'/').next().unwrap_or(&[]);
    // O_TMPFILE shows a name of `#` and the inode number, and may be linked to a name later.
    let linkable = name.strip_prefix(b"#").is_some_and(|rest| rest.iter().all(u8::is_ascii_digit));
    let deleted = DeletedFile {
        path,
        mode: object.status.mode,
        uid: capture.source.inside(object.status.uid),
        gid: capture.source.inside(object.status.gid),
        size: object.status.size,
        linkable,
        extents: extents(object)?,
    };
    let held: u64 = capture.files.deleted.iter().chain([&deleted]).map(bytes).sum();
    if held > LIMIT {
        return Err(Refusal::new(
            format!("deleted files of {held} bytes together"),
            format!("close some of them, or keep them under {LIMIT} bytes"),
        ));
    }
    let file = u32::try_from(capture.files.deleted.len()).map_err(io::Error::other)?;
    capture.deleted.insert(object.inode(), file);
    capture.files.deleted.push(deleted);
    Ok(Kind::Deleted { file, offset })
}

fn bytes(file: &DeletedFile) -> u64 {
    file.extents.iter().map(|extent| extent.data.len() as u64).sum()
}

/// Reads all that is not a hole, through a description of our own: the VE's may be write-only,
/// and its offset must stay.
fn extents(object: &Object) -> io::Result<Vec<Extent>> {
    let file = File::open(format!("/proc/self/fd/{}", object.fd.as_raw_fd()))?;
    let size = i64::try_from(object.status.size).map_err(io::Error::other)?;
    let mut extents = Vec::new();
    let mut at = 0;
    while at < size {
        let start = match lseek(&file, at, Whence::SeekData) {
            Err(Errno::ENXIO) => break,
            other => other?,
        };
        let end = lseek(&file, start, Whence::SeekHole)?;
        let length = usize::try_from(end - start).map_err(io::Error::other)?;
        if length as u64 > LIMIT {
            return Err(io::ErrorKind::FileTooLarge.into());
        }
        let mut data = vec![0; length];
        file.read_exact_at(&mut data, start.cast_unsigned())?;
        extents.push(Extent { offset: start.cast_unsigned(), data });
        at = end;
    }
    Ok(extents)
}

/// Makes the file; descriptions are opened from it by [`Rebuild::reopen`].
pub(super) fn make(file: &DeletedFile, id_base: u32) -> Result<OwnedFd, RebuildError> {
    let failed = |source| RebuildError::Open { path: lossy(&file.path), source };
    let fd = without_name(file).map_err(failed)?;
    let made = File::from(fd);
    for extent in &file.extents {
        made.write_all_at(&extent.data, extent.offset).map_err(failed)?;
    }
    made.set_len(file.size).map_err(failed)?;
    fchown(&made, Some(id_base + file.uid), Some(id_base + file.gid)).map_err(failed)?;
    let mode = Mode::from_bits_truncate(file.mode & 0o7777);
    fchmod(made.as_fd(), mode).map_err(|errno| failed(errno.into()))?;
    Ok(made.into())
}

fn without_name(file: &DeletedFile) -> io::Result<OwnedFd> {
    let path = std::path::Path::new(std::ffi::OsStr::from_bytes(&file.path));
    let private = Mode::S_IRUSR | Mode::S_IWUSR;
    if !file.linkable {
        // Under its old name, so that it shows that name as deleted again.
        let flags = OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_RDWR | OFlag::O_CLOEXEC;
        if let Ok(fd) = nix::fcntl::open(path, flags | OFlag::O_NOFOLLOW, private) {
            std::fs::remove_file(path)?;
            return Ok(fd);
        }
    }
    // The name is taken by another file now, or its directory is gone as well.
    let mut flags = OFlag::O_TMPFILE | OFlag::O_RDWR | OFlag::O_CLOEXEC;
    flags.set(OFlag::O_EXCL, !file.linkable);
    let mut failure = Errno::ENOENT;
    for directory in path.ancestors().skip(1) {
        match nix::fcntl::open(directory, flags, private) {
            Ok(fd) => return Ok(fd),
            Err(errno) => failure = errno,
        }
    }
    Err(failure.into())
}

pub(super) fn rebuild(
    rebuild: &mut Rebuild<'_>,
    file: u32,
    offset: u64,
    flags: u32,
) -> Result<OwnedFd, RebuildError> {
    let description = rebuild.files.deleted.get(file as usize).ok_or(RebuildError::Damaged)?;
    let id_base = rebuild.target.id_base;
    let made = match rebuild.deleted.entry(file) {
        Entry::Occupied(made) => made.into_mut(),
        Entry::Vacant(place) => place.insert(make(description, id_base)?),
    };
    let failed = |source| RebuildError::Open { path: lossy(&description.path), source };
    let fd = rebuild.target.reopen(made.as_fd(), flags).map_err(failed)?;
    path::seek(fd, offset).map_err(failed)
}
