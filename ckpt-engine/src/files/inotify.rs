//! inotify(7): watches with their numbers. Events that wait to be read are lost, because they
//! cannot be read without being consumed.
//!
//! The kernel tells the inode of a watch and a handle of it, but no path: see [`watched`].

use std::{
    io,
    os::fd::{AsFd, OwnedFd},
};

use ckpt_format::files::{Kind, Watch};

use super::{
    find::{Object, Refusal},
    info::parse,
    rebuild::{RebuildError, lossy},
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

pub(super) fn capture(object: &Object, init: i32) -> Result<Kind, Refusal> {
    let info = object.info()?;
    let lines: Vec<Line> = info.lines_from("inotify ").map(read_line).collect::<io::Result<_>>()?;
    let watched: Vec<&Watched> = lines.iter().map(|line| &line.watched).collect();
    let paths = watched::paths(&watched, &Mounts::of(init)?, init)?;
    let mut watches = Vec::with_capacity(lines.len());
    for line in lines {
        let Some(Some(path)) = paths.get(&line.watched.inode) else {
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
