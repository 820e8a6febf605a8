//! Locks on files: flock(2) and `F_OFD_SETLK` locks belong to a description, `F_SETLK` locks to
//! a process.

use std::{
    collections::{BTreeMap, HashSet},
    os::fd::BorrowedFd,
};

use ckpt_format::{
    files::{DescriptionLock, FileId, Files, RecordLock},
    process::Descriptor,
};

use super::{
    Argument, Remote, Source,
    find::{Found, Object, Refusal},
    info::{Info, parse},
    rebuild::{RebuildError, holder},
};
use crate::sys::descriptor;

/// One `lock:` line of fdinfo.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Line {
    kind: Type,
    exclusive: bool,
    start: u64,
    /// 0 is to the end of the file.
    length: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Type {
    Flock,
    Description,
    Record,
    Lease,
}

/// "1: POSIX  ADVISORY  WRITE 812 00:1b:1234 0 EOF".
fn read_line(text: &str) -> Option<Line> {
    let mut words = text.split_whitespace().skip(1);
    let kind = match words.next()? {
        "FLOCK" => Type::Flock,
        "OFDLCK" => Type::Description,
        "POSIX" => Type::Record,
        _ => Type::Lease,
    };
    let exclusive = words.nth(1)? == "WRITE";
    let start = parse(words.nth(2)?, 10).ok()?;
    let length = match words.next()? {
        "EOF" => 0,
        last => parse(last, 10).ok()?.checked_sub(start)?.checked_add(1)?,
    };
    Some(Line { kind, exclusive, start, length })
}

/// The locks of one capture.
#[derive(Debug, Default)]
pub(super) struct Locks {
    /// By the place of the description.
    pub(super) descriptions: BTreeMap<usize, Vec<DescriptionLock>>,
    pub(super) records: Vec<RecordLock>,
    /// By the place of the description.
    pub(super) leases: BTreeMap<usize, i32>,
}

/// Whether a description can have locks that are those of the VE alone: what has no inode of its own
/// (eventfds and the like) has one with all others of the host.
fn may_be_locked(object: &Object) -> bool {
    !object.is_path_only() && object.file_type() != 0
}

/// Finds all locks, in what is said of each descriptor; a lease that is being broken is refused.
/// The table of all locks, `/proc/locks`, would name them at once, but to open it waits for a grace
/// period of the kernel, 10 ms and more.
pub(super) fn capture(source: &Source<'_>, found: &Found) -> Result<Locks, (usize, Refusal)> {
    let mut locks = Locks::default();
    let mut seen = HashSet::new();
    for (place, object) in found.objects.iter().enumerate() {
        // One that is only in flight has nobody who could say it.
        if object.holders.is_empty() && may_be_locked(object) {
            let info = Info::of(object.fd()).map_err(|error| (place, Refusal::from(error)))?;
            locks.of_description(place, object, &info)?;
        }
    }
    let mut records = HashSet::new();
    for (place, holder, fd, info) in &found.locked {
        let (place, fd) = (*place, *fd);
        let object = &found.objects[place];
        if !may_be_locked(object) {
            continue;
        }
        if seen.insert(place) {
            locks.of_description(place, object, info)?;
        }
        // Those of a process are shown at its own descriptors only, at each for the inode.
        let pid = source.processes[*holder].pid;
        for line in info.all("lock").filter_map(read_line) {
            let new =
                line.kind == Type::Record && records.insert((pid, object.inode(), line.start));
            if new {
                let Line { exclusive, start, length, .. } = line;
                locks.records.push(RecordLock { pid, fd, exclusive, start, length });
            }
        }
    }
    Ok(locks)
}

impl Locks {
    /// Adds those of a description, which are shown at each of its descriptors.
    fn of_description(
        &mut self,
        place: usize,
        object: &Object,
        info: &Info,
    ) -> Result<(), (usize, Refusal)> {
        for text in info.all("lock") {
            let Some(line) = read_line(text) else { continue };
            let range = match line.kind {
                Type::Flock => None,
                Type::Description => Some((line.start, line.length)),
                Type::Record => continue,
                Type::Lease if text.contains("BREAKING") => return Err((place, breaking())),
                Type::Lease => {
                    let lease = descriptor::lease(object.fd());
                    if let Some(lease) = lease.map_err(|error| (place, error.into()))? {
                        self.leases.insert(place, lease);
                    }
                    continue;
                }
            };
            let lock = DescriptionLock { exclusive: line.exclusive, range };
            self.descriptions.entry(place).or_default().push(lock);
        }
        Ok(())
    }
}

fn breaking() -> Refusal {
    Refusal::new("a lease (F_SETLEASE) that is being broken", "try again in a moment")
}

/// `struct flock` of the architecture.
fn encode(exclusive: bool, start: u64, length: u64) -> [u8; 32] {
    let kind = if exclusive { libc::F_WRLCK } else { libc::F_RDLCK } as i16;
    let mut bytes = [0; 32];
    bytes[..2].copy_from_slice(&kind.to_ne_bytes());
    bytes[2..4].copy_from_slice(&(libc::SEEK_SET as i16).to_ne_bytes());
    bytes[8..16].copy_from_slice(&start.to_ne_bytes());
    bytes[16..24].copy_from_slice(&length.to_ne_bytes());
    bytes
}

/// Locks a rebuilt description.
pub(super) fn rebuild(fd: BorrowedFd<'_>, locks: &[DescriptionLock]) -> Result<(), RebuildError> {
    for lock in locks {
        let locked = match lock.range {
            None => descriptor::lock_description(fd, lock.exclusive),
            Some((start, length)) => {
                descriptor::lock_range(fd, &encode(lock.exclusive, start, length))
            }
        };
        locked.map_err(|source| RebuildError::Kernel { object: "file lock", source })?;
    }
    Ok(())
}

/// Lets the processes take their own locks.
pub(super) fn finish(
    files: &Files,
    tables: &BTreeMap<i32, Vec<Descriptor>>,
    remote: &mut dyn Remote,
) -> Result<(), RebuildError> {
    for (place, file) in files.files.iter().enumerate() {
        let Some(lease) = file.lease else { continue };
        let id = FileId(u32::try_from(place).map_err(|_| RebuildError::Damaged)?);
        // One that is only in flight has nobody who could take it.
        let Some((pid, fd)) = holder(tables, id) else { continue };
        take_lease(pid, fd, lease, remote)?;
    }
    for lock in &files.record_locks {
        let held = tables
            .get(&lock.pid)
            .is_some_and(|table| table.iter().any(|descriptor| descriptor.fd == lock.fd));
        if !held {
            return Err(RebuildError::Damaged);
        }
        let bytes = encode(lock.exclusive, lock.start, lock.length);
        let none = || Argument::Value(0);
        let arguments = [
            Argument::Value(u64::from(lock.fd.cast_unsigned())),
            Argument::Value(libc::F_SETLK as u64),
            Argument::In(&bytes),
            none(),
            none(),
            none(),
        ];
        remote.call(lock.pid, libc::SYS_fcntl, arguments).map_err(|source| {
            RebuildError::Remote { pid: lock.pid, object: "record lock", source }
        })?;
    }
    Ok(())
}

/// The holder gets the signal when somebody else wants the file.
fn take_lease(pid: i32, fd: i32, lease: i32, remote: &mut dyn Remote) -> Result<(), RebuildError> {
    const F_SETLEASE: u64 = 1024;
    let value = |value: i32| Argument::Value(u64::from(value.cast_unsigned()));
    let none = || Argument::Value(0);
    let arguments = [value(fd), Argument::Value(F_SETLEASE), value(lease), none(), none(), none()];
    remote.call(pid, libc::SYS_fcntl, arguments).map(drop).map_err(|source| RebuildError::Remote {
        pid,
        object: "lease",
        source,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_all_kinds_are_read() {
        let record = read_line("1: POSIX  ADVISORY  WRITE 812 00:1b:1234 10 19").unwrap();
        assert_eq!((record.kind, record.exclusive), (Type::Record, true));
        assert_eq!((record.start, record.length), (10, 10));
        let whole = read_line("2: FLOCK  ADVISORY  READ 812 00:1b:1234 0 EOF").unwrap();
        assert_eq!((whole.kind, whole.exclusive, whole.length), (Type::Flock, false, 0));
        assert_eq!(read_line("3: FLOCK"), None);
    }
}
