//! inotify(7): watches with their numbers. Events that wait to be read are lost, because they
//! cannot be read without being consumed.
//!
//! The kernel tells the inode of a watch and no path, and the handle that it tells beside it
//! cannot be opened on an overlay. So the VE's files are searched for the inodes, level by
//! level: what is watched is rarely deep.

use std::{
    collections::{HashMap, VecDeque},
    fs, io,
    os::{
        fd::{AsFd, OwnedFd},
        unix::{
            ffi::OsStringExt,
            fs::{DirEntryExt, MetadataExt},
        },
    },
    path::{Path, PathBuf},
};

use ckpt_format::files::{Kind, Watch};

use super::{
    find::{Object, Refusal},
    info::parse,
    rebuild::{RebuildError, lossy},
};
use crate::sys::event;

/// How many directory entries are looked at for all watches of one set.
const ENTRIES: usize = 400_000;

/// One `inotify` line of fdinfo.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Line {
    number: i32,
    inode: u64,
    device: u64,
    mask: u32,
}

/// "inotify wd:1 ino:40 sdev:1a mask:2 ignored_mask:0 fhandle-bytes:8 ...", all in hex.
fn read_line(text: &str) -> io::Result<Line> {
    let value = |name: &str| {
        let word = text.split_whitespace().find_map(|word| word.strip_prefix(name));
        parse(word.unwrap_or(""), 16)
    };
    let device = value("sdev:")?;
    Ok(Line {
        number: i32::try_from(value("wd:")?).map_err(io::Error::other)?,
        inode: value("ino:")?,
        // Twenty bits of minor, as the kernel has it inside.
        device: libc::makedev((device >> 20) as u32, (device & 0xf_ffff) as u32),
        mask: u32::try_from(value("mask:")?).map_err(io::Error::other)?,
    })
}

pub(super) fn capture(object: &Object, init: i32) -> Result<Kind, Refusal> {
    let info = object.info()?;
    let lines: Vec<Line> = info.lines_from("inotify ").map(read_line).collect::<io::Result<_>>()?;
    let root = PathBuf::from(format!("/proc/{init}/root"));
    let cgroups = root.join("sys/fs/cgroup");
    let device = fs::metadata(&cgroups).map_or(0, |metadata| metadata.dev());
    // Service managers watch these, and there alone it is worth to look below /sys.
    let (of_cgroups, others): (Paths, Paths) = lines
        .iter()
        .map(|line| ((line.device, line.inode), None))
        .partition(|((of, _), _)| *of == device);
    let mut paths = search(&root, cgroups, of_cgroups);
    paths.extend(search(&root, root.clone(), others));
    let mut watches = Vec::with_capacity(lines.len());
    for line in lines {
        let Some(Some(path)) = paths.get(&(line.device, line.inode)) else {
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

type Paths = HashMap<(u64, u64), Option<Vec<u8>>>;

/// Finds paths below `top` by device and inode, level by level. They are told from `root` on.
fn search(root: &Path, top: PathBuf, mut wanted: Paths) -> Paths {
    if wanted.is_empty() {
        return wanted;
    }
    let mut looked_at = 0;
    let found = |path: &Path, wanted: &mut Paths| {
        let Ok(metadata) = fs::symlink_metadata(path) else { return };
        let Some(place) = wanted.get_mut(&(metadata.dev(), metadata.ino())) else { return };
        if place.is_none() {
            let inside = path.strip_prefix(root).unwrap_or(path);
            *place = Some(Path::new("/").join(inside).into_os_string().into_vec());
        }
    };
    found(&top.join(""), &mut wanted);
    let mut directories = VecDeque::from([top]);
    while let Some(directory) = directories.pop_front() {
        let inside = directory.strip_prefix(root).unwrap_or(Path::new(""));
        // Nothing there can be watched for changes, and there is no end to it.
        if inside == Path::new("proc") || inside == Path::new("sys") {
            continue;
        }
        let Ok(entries) = fs::read_dir(&directory) else { continue };
        for entry in entries.flatten() {
            looked_at += 1;
            let is_directory = entry.file_type().is_ok_and(|kind| kind.is_dir());
            // A mount has another inode than the directory under it.
            if is_directory || wanted.keys().any(|&(_, inode)| inode == entry.ino()) {
                found(&entry.path(), &mut wanted);
            }
            if is_directory {
                directories.push_back(entry.path());
            }
        }
        let complete = wanted.values().all(Option::is_some);
        if complete || looked_at > ENTRIES {
            break;
        }
    }
    wanted
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
