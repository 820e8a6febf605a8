//! What a file is, and which one.

use std::{
    collections::HashMap,
    hash::{DefaultHasher, Hash, Hasher},
    io,
    os::fd::{AsFd, BorrowedFd},
};

use ckpt_engine::sys::handle::handle;
use ckpt_format::tree::Timestamp;
use nix::{
    errno::Errno,
    fcntl::AtFlags,
    sys::stat::{FileStat, fstat, fstatat},
};

/// Which file: the same for all its names and through renames, another one for a later file that
/// got the same inode number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct Identity {
    pub(super) inode: u64,
    /// What the file system's handle adds to the number; 0 where there are no handles.
    version: u64,
    /// `S_IFMT` of the mode, which an inode keeps for life.
    pub(super) kind: u32,
}

/// What stat(2) tells.
#[derive(Clone, Copy, Debug)]
pub(super) struct Status {
    pub(super) accessed: Timestamp,
    pub(super) rdev: u64,
    /// What it takes on its file system.
    pub(super) occupied_bytes: u64,
    pub(super) stamp: Stamp,
}

/// What stays the same as long as nobody changes a file by a system call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Stamp {
    pub(super) mode: u32,
    pub(super) uid: u32,
    pub(super) gid: u32,
    pub(super) size: u64,
    pub(super) modified: Timestamp,
    pub(super) changed: Timestamp,
}

fn timestamp(seconds: i64, nanoseconds: i64) -> Timestamp {
    Timestamp { seconds, nanoseconds: u32::try_from(nanoseconds).unwrap_or(0) }
}

impl From<FileStat> for Status {
    fn from(stat: FileStat) -> Self {
        Self {
            accessed: timestamp(stat.st_atime, stat.st_atime_nsec),
            rdev: stat.st_rdev,
            occupied_bytes: u64::try_from(stat.st_blocks).unwrap_or(0).saturating_mul(512),
            stamp: Stamp {
                mode: stat.st_mode,
                uid: stat.st_uid,
                gid: stat.st_gid,
                size: u64::try_from(stat.st_size).unwrap_or(0),
                modified: timestamp(stat.st_mtime, stat.st_mtime_nsec),
                changed: timestamp(stat.st_ctime, stat.st_ctime_nsec),
            },
        }
    }
}

fn errno(source: io::Error) -> Errno {
    Errno::from_raw(source.raw_os_error().unwrap_or(libc::EIO))
}

fn version(directory: BorrowedFd<'_>, name: &std::ffi::CStr) -> Result<u64, Errno> {
    let Some(handle) = handle(directory, name).map_err(errno)? else { return Ok(0) };
    // The same in every process; there is no attacker, as the kernel makes the handles.
    let mut hasher = DefaultHasher::new();
    handle.hash(&mut hasher);
    Ok(hasher.finish())
}

fn identity(stat: &FileStat, version: u64) -> Identity {
    Identity { inode: stat.st_ino, version, kind: stat.st_mode & libc::S_IFMT }
}

/// Files that were known before by their inode number, with what they were then: one that has not
/// changed since is the same, and its handle need not be asked for.
#[derive(Debug, Default)]
pub(super) struct Recall(HashMap<u64, (Identity, Stamp)>);

impl Recall {
    /// Whether this file is one of them.
    pub(super) fn knows(&self, identity: &Identity) -> bool {
        self.0.get(&identity.inode).is_some_and(|(known, _)| known == identity)
    }

    /// Whether this file is one of them and what it was.
    pub(super) fn is_same(&self, identity: &Identity, status: &Status) -> bool {
        self.0.get(&identity.inode) == Some(&(*identity, status.stamp))
    }

    fn identity(&self, stat: &FileStat) -> Option<Identity> {
        let (identity, stamp) = self.0.get(&stat.st_ino)?;
        let same = *stamp == Status::from(*stat).stamp;
        (same && identity.kind == stat.st_mode & libc::S_IFMT).then_some(*identity)
    }
}

impl FromIterator<(Identity, Stamp)> for Recall {
    fn from_iter<T: IntoIterator<Item = (Identity, Stamp)>>(known: T) -> Self {
        let by_number = |(identity, stamp): (Identity, Stamp)| (identity.inode, (identity, stamp));
        Self(known.into_iter().map(by_number).collect())
    }
}

/// Which file is open, and what it is.
pub(super) fn of_open(file: BorrowedFd<'_>) -> Result<(Identity, Status), Errno> {
    of_open_known(file, &Recall::default())
}

/// The same where nobody changes anything, and some are known.
pub(super) fn of_open_known(
    file: BorrowedFd<'_>,
    recall: &Recall,
) -> Result<(Identity, Status), Errno> {
    let stat = fstat(file)?;
    let identity = match recall.identity(&stat) {
        Some(known) => known,
        None => identity(&stat, version(file, c"")?),
    };
    Ok((identity, stat.into()))
}

/// Which file a name means where nobody changes anything, and what it is.
pub(super) fn of_steady_name(
    directory: BorrowedFd<'_>,
    name: &std::ffi::CStr,
    recall: &Recall,
) -> Result<(Identity, Status), Errno> {
    let stat = fstatat(directory.as_fd(), name, AtFlags::AT_SYMLINK_NOFOLLOW)?;
    let identity = match recall.identity(&stat) {
        Some(known) => known,
        None => identity(&stat, version(directory, name)?),
    };
    Ok((identity, stat.into()))
}

/// The same for a name that is not a text of C yet.
pub(super) fn of_steady_entry(
    directory: BorrowedFd<'_>,
    name: &[u8],
    recall: &Recall,
) -> Result<(Identity, Status), Errno> {
    let name = std::ffi::CString::new(name).map_err(|_| Errno::EINVAL)?;
    of_steady_name(directory, &name, recall)
}

/// Which file a name means, and what it is. The name may come to mean another file at any moment,
/// and the two answers must be about the same one.
pub(super) fn of_name(
    directory: BorrowedFd<'_>,
    name: &std::ffi::CStr,
) -> Result<(Identity, Status), Errno> {
    /// Somebody who renames in a loop is looked at in the next round.
    const ATTEMPTS: usize = 8;
    for _ in 0..ATTEMPTS {
        let before = version(directory, name)?;
        let stat = fstatat(directory.as_fd(), name, AtFlags::AT_SYMLINK_NOFOLLOW)?;
        if before == version(directory, name)? {
            return Ok((identity(&stat, before), stat.into()));
        }
    }
    Err(Errno::ENOENT)
}
