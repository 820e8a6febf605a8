//! inotify(7): watches with their numbers. Events that wait to be read are lost, because they
//! cannot be read without being consumed.
//!
//! The kernel tells the inode of a watch and a handle of it, but no path: see [`watched`]. What has
//! lost its name is watched as long as it is open: such a watch is put on the rebuilt description.

use std::{
    io,
    os::fd::{AsFd, OwnedFd},
};

use ckpt_format::files::{FileId, Kind, Watch};

use super::{
    deleted,
    find::{Found, Object, Refusal},
    info::parse,
    rebuild::{Rebuild, RebuildError, lossy},
    search::Mounts,
    watched::{self, Watched, device, read_handle},
};
use crate::sys::event;

/// One `inotify` line of fdinfo.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Line {
    number: i32,
    watched: Watched,
    mask: u32,
}

/// "inotify wd:1 ino:40 sdev:1a mask:2 ignored_mask:0 fhandle-bytes:8 ...", all in hex.
fn read_line(text: &str) -> io::Result<Line> {
    let value = |name: &str| {
        let word = text.split_whitespace().find_map(|word| word.strip_prefix(name));
        parse(word.unwrap_or(""), 16)
    };
    Ok(Line {
        number: i32::try_from(value("wd:")?).map_err(io::Error::other)?,
        watched: Watched {
            inode: (device(value("sdev:")?), value("ino:")?),
            handle: read_handle(text),
        },
        mask: u32::try_from(value("mask:")?).map_err(io::Error::other)?,
    })
}

/// What is open of an inode that has no name.
fn nameless(found: &Found, inode: (u64, u64)) -> Option<FileId> {
    let is_nameless = |&&id: &&u32| {
        found
            .objects
            .get(id as usize)
            .is_some_and(|it| it.status.links == 0 && deleted::is_deleted(it))
    };
    found.of_inode(inode).iter().find(is_nameless).copied().map(FileId)
}

pub(super) fn capture(found: &Found, object: &Object, init: i32) -> Result<Kind, Refusal> {
    let info = object.info()?;
    let lines: Vec<Line> = info.lines_from("inotify ").map(read_line).collect::<io::Result<_>>()?;
    let (open, named): (Vec<_>, Vec<_>) = lines
        .into_iter()
        .map(|line| (nameless(found, line.watched.inode), line))
        .partition(|(file, _)| file.is_some());
    let lines: Vec<Line> = named.into_iter().map(|(_, line)| line).collect();
    let watched: Vec<&Watched> = lines.iter().map(|line| &line.watched).collect();
    let paths = watched::paths(&watched, &Mounts::of(init)?, init)?;
    let on_open = |(file, line): (Option<FileId>, Line)| Watch {
        number: line.number,
        path: Vec::new(),
        mask: line.mask,
        file,
    };
    let mut watches: Vec<Watch> = open.into_iter().map(on_open).collect();
    for line in lines {
        let Some(Some(path)) = paths.get(&line.watched.inode) else {
            return Err(Refusal::new(
                "an inotify watch on something that has no path in the VE",
                "restart the program",
            ));
        };
        let (number, mask) = (line.number, line.mask);
        watches.push(Watch { number, path: path.clone(), mask, file: None });
    }
    watches.sort_by_key(|watch| watch.number);
    Ok(Kind::Inotify { watches })
}

pub(super) fn rebuild(watches: &[Watch]) -> Result<OwnedFd, RebuildError> {
    let failed = |source| RebuildError::Kernel { object: "inotify set", source };
    let made = event::inotify().map_err(failed)?;
    for watch in watches.iter().filter(|watch| watch.file.is_none()) {
        event::watch(made.as_fd(), watch.number, &watch.path, watch.mask)
            .map_err(|source| RebuildError::Open { path: lossy(&watch.path), source })?;
    }
    Ok(made)
}

/// Puts on the watches of what has no name, when all of that is there.
pub(super) fn fill(rebuild: &Rebuild<'_>) -> Result<(), RebuildError> {
    let failed = |source| RebuildError::Kernel { object: "watch on a file without a name", source };
    for (file, made) in rebuild.files.files.iter().zip(&rebuild.made) {
        let (Kind::Inotify { watches }, Some(made)) = (&file.kind, made) else { continue };
        for watch in watches {
            let Some(file) = watch.file else { continue };
            let watched = rebuild.made(file).ok_or(RebuildError::Damaged)?;
            let descriptors = rebuild.target.descriptors();
            let (number, mask) = (watch.number, watch.mask);
            event::watch_open(made.as_fd(), number, (descriptors, watched), mask)
                .map_err(failed)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::{
        fs::File,
        io::{Read, Write},
        os::{fd::AsRawFd, unix::ffi::OsStrExt},
    };

    use super::{
        super::testing::{Child, rebuild},
        *,
    };
    use crate::sys::handle::Handle;

    #[test]
    fn a_line_tells_number_inode_and_handle() {
        let line = read_line(
            "inotify wd:1b ino:8e1 sdev:100026 mask:2 ignored_mask:0 fhandle-bytes:8 \
             fhandle-type:fe f_handle:0a0b000000000000",
        )
        .unwrap();
        assert_eq!((line.number, line.mask), (27, 2));
        assert_eq!(line.watched.inode, (libc::makedev(1, 0x26), 0x8e1));
        let bytes = vec![10, 11, 0, 0, 0, 0, 0, 0];
        assert_eq!(line.watched.handle.unwrap(), Handle { kind: 0xfe, bytes });
    }

    #[test]
    fn what_has_lost_its_name_is_watched_further() {
        let directory = tempfile::tempdir_in("/run").unwrap();
        let path = directory.path().join("gone");
        let mut file = File::create(&path).unwrap();
        let inotify = event::inotify().unwrap();
        event::watch(inotify.as_fd(), 9, path.as_os_str().as_bytes(), libc::IN_MODIFY).unwrap();
        std::fs::remove_file(&path).unwrap();
        let child = Child::holding(&[inotify.as_fd(), file.as_fd()]);
        let numbers = (inotify.as_raw_fd(), file.as_raw_fd());
        drop(inotify);
        let captured = child.capture();
        drop(child);
        let copy = rebuild(&captured);
        file = File::from(copy.of(numbers.1));
        file.write_all(b"x").unwrap();
        let mut event = [0; 64];
        let length = File::from(copy.of(numbers.0)).read(&mut event).unwrap();
        assert_eq!((length, event[0], event[4]), (16, 9, 2), "number 9, IN_MODIFY");
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
