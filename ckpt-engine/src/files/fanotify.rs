//! fanotify(7): groups with their marks. Events that wait to be read are lost, as those of inotify.
//!
//! A VE has groups of the kind that needs no rights on the host: they tell handles of files instead
//! of opening them. Whether a group is one of those the kernel decides by who makes it, so a task
//! of the VE does.

use std::{
    io,
    os::fd::{AsFd, OwnedFd},
};

use ckpt_format::files::{Kind, Mark, Scope};

use super::{
    Argument, Remote,
    find::{Object, Refusal},
    info::parse,
    rebuild::{RebuildError, lossy},
    search::Mounts,
    watched::{self, Watched, device, read_handle},
};
use crate::sys::{event, task};

/// What a group without rights may be told at all: `FAN_REPORT_FID`, `_DIR_FID`, `_NAME` and
/// `_TARGET_FID`.
const REPORTS: u32 = 0x1e00;

/// Flags of a group that are those of its description, `FAN_CLOEXEC` and `FAN_NONBLOCK`.
const OF_DESCRIPTION: u32 = 3;

/// Where a mark is.
#[derive(Debug)]
enum Place {
    Inode(Watched),
    /// By its number in mountinfo.
    Mount(u64),
    /// By its device.
    Filesystem(u64),
}

/// One mark, as a line of fdinfo tells it.
#[derive(Debug)]
struct Line {
    place: Place,
    mask: u64,
    ignored: u64,
    flags: u32,
}

/// "fanotify ino:1 sdev:29 mflags:0 mask:22 ignored_mask:0 fhandle-bytes:c ...", or with "mnt_id:"
/// or "sdev:" alone; all in hex. `None` for a mark of another kind.
fn read_line(text: &str) -> io::Result<Option<Line>> {
    let word = |name: &str| text.split_whitespace().find_map(|word| word.strip_prefix(name));
    let value = |name: &str| parse(word(name).unwrap_or(""), 16);
    let place = if word("ino:").is_some() {
        let inode = (device(value("sdev:")?), value("ino:")?);
        Place::Inode(Watched { inode, handle: read_handle(text) })
    } else if word("mnt_id:").is_some() {
        Place::Mount(value("mnt_id:")?)
    } else if word("sdev:").is_some() {
        Place::Filesystem(device(value("sdev:")?))
    } else {
        return Ok(None);
    };
    Ok(Some(Line {
        place,
        mask: value("mask:")?,
        ignored: value("ignored_mask:")?,
        flags: u32::try_from(value("mflags:")?).map_err(io::Error::other)?,
    }))
}

/// The flags of a group, and of the files that it would open: "fanotify flags:200 event-flags:8000".
fn read_flags(text: &str) -> io::Result<(u32, u32)> {
    let value = |name: &str| {
        let word = text.split_whitespace().find_map(|word| word.strip_prefix(name));
        let value = parse(word.unwrap_or(""), 16)?;
        u32::try_from(value).map_err(io::Error::other)
    };
    Ok((value("flags:")?, value("event-flags:")?))
}

pub(super) fn capture(object: &Object, init: i32) -> Result<Kind, Refusal> {
    let info = object.info()?;
    let head = info.lines_from("fanotify flags:").next().unwrap_or_default();
    let (flags, event_flags) = read_flags(head)?;
    let refused =
        || Refusal::new("a fanotify group of a kind that is not known", "end the program");
    let texts = info.lines_from("fanotify ").filter(|text| *text != head);
    let lines = texts.map(read_line).collect::<io::Result<Option<Vec<Line>>>>()?;
    let flags = flags & !OF_DESCRIPTION;
    let lines = lines.filter(|_| flags & !REPORTS == 0).ok_or_else(refused)?;
    let mounts = Mounts::of(init)?;
    let watched: Vec<&Watched> = lines
        .iter()
        .filter_map(|line| match &line.place {
            Place::Inode(watched) => Some(watched),
            _ => None,
        })
        .collect();
    let paths = watched::paths(&watched, &mounts, init)?;
    let mut marks = Vec::with_capacity(lines.len());
    for Line { place, mask, ignored, flags } in &lines {
        let (scope, path) = match place {
            Place::Inode(watched) => (Scope::Inode, paths.get(&watched.inode).cloned().flatten()),
            Place::Mount(number) => (Scope::Mount, mounts.point_of(*number)),
            Place::Filesystem(device) => (Scope::Filesystem, mounts.point_on(*device)),
        };
        let path = path.ok_or_else(|| {
            Refusal::new(
                "a fanotify mark on something that has no path in the VE",
                "restart the program",
            )
        })?;
        let (mask, ignored, flags) = (*mask, *ignored, *flags);
        marks.push(Mark { scope, path, mask, ignored, flags });
    }
    Ok(Kind::Fanotify { flags, event_flags, marks })
}

/// Lets pid 1 of the VE, whose descriptors `init` can fetch, make a group without marks.
pub(super) fn make(
    (flags, event_flags): (u32, u32),
    init: &OwnedFd,
    remote: &mut dyn Remote,
) -> Result<OwnedFd, RebuildError> {
    let object = "fanotify group";
    let value = |value: u32| Argument::Value(value.into());
    let failed = |source| RebuildError::Kernel { object, source };
    let flags = flags & REPORTS | libc::FAN_CLOEXEC;
    let arguments = [value(flags), value(event_flags), value(0), value(0), value(0), value(0)];
    let fd = remote
        .call(1, libc::SYS_fanotify_init, arguments)
        .map_err(|source| RebuildError::Remote { pid: 1, object, source })?;
    let fetched = task::pidfd_getfd(init, fd as i32).map_err(failed);
    let arguments = [Argument::Value(fd), value(0), value(0), value(0), value(0), value(0)];
    remote.call(1, libc::SYS_close, arguments).map_err(|source| RebuildError::Remote {
        pid: 1,
        object,
        source,
    })?;
    fetched
}

/// Puts the marks on a new group, among the mounts of the calling thread.
pub(super) fn mark(group: &OwnedFd, marks: &[Mark]) -> Result<(), RebuildError> {
    for mark in marks {
        let failed = |source| RebuildError::Open { path: lossy(&mark.path), source };
        let scope = match mark.scope {
            Scope::Inode => libc::FAN_MARK_INODE,
            Scope::Mount => libc::FAN_MARK_MOUNT,
            Scope::Filesystem => libc::FAN_MARK_FILESYSTEM,
        };
        let lasting = mark.flags & libc::FAN_MARK_EVICTABLE;
        if mark.mask != 0 {
            event::mark(group.as_fd(), scope | lasting, mark.mask, &mark.path).map_err(failed)?;
        }
        if mark.ignored != 0 {
            // The older way to ignore differs in what it does to directories.
            let ignore = match mark.flags & libc::FAN_MARK_IGNORE {
                0 => libc::FAN_MARK_IGNORED_MASK,
                new => new,
            };
            let how = scope | lasting | ignore | mark.flags & libc::FAN_MARK_IGNORED_SURV_MODIFY;
            event::mark(group.as_fd(), how, mark.ignored, &mark.path).map_err(failed)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_tell_what_is_marked() {
        let of_inode = "fanotify ino:1 sdev:29 mflags:440 mask:22 ignored_mask:20 fhandle-bytes:c \
                        fhandle-type:1 f_handle:c0fd197c0100000000000000";
        let line = read_line(of_inode).unwrap().unwrap();
        assert_eq!((line.mask, line.ignored, line.flags), (0x22, 0x20, 0x440));
        let Place::Inode(watched) = line.place else { panic!("{line:?}") };
        assert_eq!(watched.inode, (libc::makedev(0, 0x29), 1));
        let line =
            read_line("fanotify mnt_id:41 mflags:0 mask:20 ignored_mask:0").unwrap().unwrap();
        assert!(matches!(line.place, Place::Mount(0x41)));
        let line = read_line("fanotify sdev:29 mflags:0 mask:20 ignored_mask:0").unwrap().unwrap();
        assert!(matches!(line.place, Place::Filesystem(_)));
        let of_mounts = "fanotify mnt_ns:4026532178 mflags:0 mask:3000000 ignored_mask:0";
        assert!(read_line(of_mounts).unwrap().is_none());
        assert_eq!(read_flags("fanotify flags:c00 event-flags:8000").unwrap(), (0xc00, 0x8000));
    }
}
