//! inotify(7): watches with their numbers. Events that wait to be read are lost, because they
//! cannot be read without being consumed.
//!
//! The kernel tells the inode of a watch and a handle of it, but no path: see [`search`].

use std::{
    fs, io,
    os::{
        fd::{AsFd, OwnedFd},
        unix::fs::MetadataExt,
    },
    path::{Path, PathBuf},
};

use ckpt_format::files::{Kind, Watch};

use super::{
    find::{Object, Refusal},
    info::parse,
    rebuild::{RebuildError, lossy},
    search::{self, Mounts, Paths},
};
use crate::sys::{event, handle::Handle};

/// One `inotify` line of fdinfo.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Line {
    number: i32,
    /// Device and inode.
    inode: (u64, u64),
    mask: u32,
    handle: Option<Handle>,
}

/// "inotify wd:1 ino:40 sdev:1a mask:2 ignored_mask:0 fhandle-bytes:8 ...", all in hex.
fn read_line(text: &str) -> io::Result<Line> {
    let value = |name: &str| {
        let word = text.split_whitespace().find_map(|word| word.strip_prefix(name));
        parse(word.unwrap_or(""), 16)
    };
    Ok(Line {
        number: i32::try_from(value("wd:")?).map_err(io::Error::other)?,
        inode: (device(value("sdev:")?), value("ino:")?),
        mask: u32::try_from(value("mask:")?).map_err(io::Error::other)?,
        handle: read_handle(text),
    })
}

/// Twenty bits of minor, as the kernel has it inside.
fn device(inside: u64) -> u64 {
    libc::makedev((inside >> 20) as u32, (inside & 0xf_ffff) as u32)
}

/// "fhandle-bytes:8 fhandle-type:1 f_handle:e8cb3500c97b61e4", where the file system has handles.
fn read_handle(text: &str) -> Option<Handle> {
    let value = |name| text.split_whitespace().find_map(|word: &str| word.strip_prefix(name));
    let kind = u8::from_str_radix(value("fhandle-type:")?, 16).ok()?;
    let digits = value("f_handle:")?;
    let byte = |at| u8::from_str_radix(digits.get(at..at + 2)?, 16).ok();
    let bytes = (0..digits.len()).step_by(2).map(byte).collect::<Option<_>>()?;
    Some(Handle { kind: kind.into(), bytes })
}

/// Finds the paths of what is watched.
fn paths(lines: &[Line], init: i32) -> io::Result<Paths> {
    let mounts = Mounts::of(init)?;
    let by_handle = |line: &Line| mounts.path_of(line.inode, line.handle.as_ref()?);
    let found: Paths = lines.iter().map(|line| (line.inode, by_handle(line))).collect();
    if found.values().all(Option::is_some) {
        return Ok(found);
    }
    let (mut found, rest): (Paths, Paths) = found.into_iter().partition(|(_, it)| it.is_some());
    let root = PathBuf::from(format!("/proc/{init}/root"));
    // Service managers watch these, and there alone it is worth to look below /sys.
    let cgroups = Path::new("/sys/fs/cgroup");
    let device = fs::metadata(root.join("sys/fs/cgroup")).map_or(0, |metadata| metadata.dev());
    let (of_cgroups, others): (Paths, Paths) =
        rest.into_iter().partition(|((of, _), _)| *of == device);
    found.extend(search::below(&root, cgroups, of_cgroups));
    found.extend(search::below(&root, Path::new("/"), others));
    Ok(found)
}

pub(super) fn capture(object: &Object, init: i32) -> Result<Kind, Refusal> {
    let info = object.info()?;
    let lines: Vec<Line> = info.lines_from("inotify ").map(read_line).collect::<io::Result<_>>()?;
    let paths = paths(&lines, init)?;
    let mut watches = Vec::with_capacity(lines.len());
    for line in lines {
        let Some(Some(path)) = paths.get(&line.inode) else {
            return Err(Refusal::new(
                "an inotify watch on something that has no path in the VE",
                "restart the program",
            ));
        };
        watches.push(Watch { number: line.number, path: path.clone(), mask: line.mask });
    }
    watches.sort_by_key(|watch| watch.number);
    Ok(Kind::Inotify { watches })
}

pub(super) fn rebuild(watches: &[Watch]) -> Result<OwnedFd, RebuildError> {
    let failed = |source| RebuildError::Kernel { object: "inotify set", source };
    let made = event::inotify().map_err(failed)?;
    for watch in watches {
        event::watch(made.as_fd(), watch.number, &watch.path, watch.mask)
            .map_err(|source| RebuildError::Open { path: lossy(&watch.path), source })?;
    }
    Ok(made)
}

#[cfg(test)]
mod tests {
    use std::{
        fs::File,
        io::Read,
        os::{fd::AsRawFd, unix::ffi::OsStrExt},
    };

    use super::{
        super::testing::{Child, rebuild},
        *,
    };

    #[test]
    fn a_line_tells_number_inode_and_handle() {
        let line = read_line(
            "inotify wd:1b ino:8e1 sdev:100026 mask:2 ignored_mask:0 fhandle-bytes:8 \
             fhandle-type:fe f_handle:0a0b000000000000",
        )
        .unwrap();
        assert_eq!((line.number, line.mask), (27, 2));
        assert_eq!(line.inode, (libc::makedev(1, 0x26), 0x8e1));
        let bytes = vec![10, 11, 0, 0, 0, 0, 0, 0];
        assert_eq!(line.handle.unwrap(), Handle { kind: 0xfe, bytes });
    }

    #[test]
    fn watches_keep_their_numbers_and_go_on() {
        // Near the root, where the search is short.
        let directory = tempfile::tempdir_in("/run").unwrap();
        let path = directory.path().as_os_str().as_bytes();
        let inotify = event::inotify().unwrap();
        event::watch(inotify.as_fd(), 7, path, libc::IN_CREATE).unwrap();
        let child = Child::holding(&[inotify.as_fd()]);
        let number = inotify.as_raw_fd();
        drop(inotify);
        let captured = child.capture();
        drop(child);
        let copy = rebuild(&captured);
        File::create(directory.path().join("new")).unwrap();
        let mut event = [0; 64];
        let length = File::from(copy.of(number)).read(&mut event).unwrap();
        assert_eq!((length, event[0], event[5]), (32, 7, 1), "number 7, IN_CREATE");
        assert_eq!(&event[16..19], b"new");
    }
}
