//! epoll_create(2).
//!
//! An entry is a file *and* the number under which it was added. The number may have been closed
//! since, or name another file, so the number alone does not tell the file: what it names is the
//! first guess, which the inode and kcmp(2) confirm.

use std::{
    collections::{BTreeMap, HashMap},
    io,
    os::fd::{AsFd, AsRawFd, OwnedFd, RawFd},
    thread,
};

use ckpt_format::{
    files::{BusyPoll, EpollEntry, FileId, Files, Kind},
    process::Descriptor,
};

use super::{
    Argument, Remote,
    capture::Capture,
    find::{Object, Refusal},
    info::parse,
    rebuild::{Rebuild, RebuildError},
};
use crate::sys::{
    self,
    descriptor::{ScratchTable, is_epoll_target},
    event,
};

/// One `tfd:` line of fdinfo.
struct Line {
    fd: i32,
    events: u32,
    data: u64,
    inode: u64,
}

/// "5 events: 19 data: 5  pos:0 ino:40c sdev:10", where a name may touch its value.
fn read_line(text: &str) -> io::Result<Line> {
    let mut rest = text;
    // They come in this order, so each is looked for behind the one before.
    let mut value = |name: &str, radix| {
        rest = rest.split_once(name).map_or("", |(_, behind)| behind).trim_start();
        let (word, behind) = rest.split_once(' ').unwrap_or((rest, ""));
        rest = behind;
        parse(word, radix)
    };
    Ok(Line {
        fd: i32::try_from(value("", 10)?).map_err(io::Error::other)?,
        events: u32::try_from(value("events:", 16)?).map_err(io::Error::other)?,
        data: value("data:", 16)?,
        inode: value("ino:", 16)?,
    })
}

/// Captured after all other files, because anything may be watched.
pub(super) fn capture(capture: &Capture<'_>, id: usize) -> Result<Kind, Refusal> {
    let object = &capture.found.objects[id];
    let info = object.info()?;
    let mut seen: HashMap<i32, u32> = HashMap::new();
    let mut entries = Vec::new();
    for text in info.all("tfd") {
        let line = read_line(text)?;
        let nth = seen.entry(line.fd).or_default();
        let file = target(capture, object, &line, *nth)?;
        *nth += 1;
        entries.push(EpollEntry { fd: line.fd, file, events: line.events, data: line.data });
    }
    // The kernel lists them in the order of its tree, which is by the addresses of the files.
    entries.sort_by_key(|entry| entry.fd);
    Ok(Kind::Epoll { entries, busy_poll: event::busy_poll(object.fd()).unwrap_or_default() })
}

fn target(capture: &Capture<'_>, epoll: &Object, line: &Line, nth: u32) -> Result<FileId, Refusal> {
    let objects = &capture.found.objects;
    let fits = |file: FileId| objects[file.0 as usize].status.inode == line.inode;
    let guesses = epoll.holders.iter().filter_map(|&(place, _)| {
        capture.found.in_table(capture.source.processes[place].pid, line.fd)
    });
    let mut guesses = guesses.filter(|&file| fits(file)).peekable();
    // An inode of its own tells the file, when it is open only once and added only once.
    if let Some(&guess) = guesses.peek() {
        let inode = objects[guess.0 as usize].inode();
        if capture.found.of_inode(inode).len() == 1 {
            return Ok(guess);
        }
    }
    let all = (0..objects.len()).map(|place| FileId(u32::try_from(place).unwrap_or(u32::MAX)));
    let candidates: Vec<FileId> = guesses.chain(all.filter(|&file| fits(file))).collect();
    // Entries of one number are told apart by their order, which is that of the lines.
    for places in [&[nth][..], &[0, 1, 2, 3]] {
        for &candidate in &candidates {
            let file = objects[candidate.0 as usize].fd();
            for &place in places {
                match is_epoll_target(file, epoll.fd(), line.fd, place) {
                    Ok(true) => return Ok(candidate),
                    Ok(false) => {}
                    Err(error) if error.raw_os_error() == Some(libc::ENOENT) => break,
                    Err(error) => return Err(error.into()),
                }
            }
        }
    }
    Err(Refusal::new(
        format!("an epoll set that watches a file outside the VE (as number {})", line.fd),
        "end the program",
    ))
}

pub(super) fn make(busy_poll: Option<BusyPoll>) -> Result<OwnedFd, RebuildError> {
    let make = || {
        let made = event::epoll()?;
        busy_poll.map_or(Ok(()), |wanted| event::set_busy_poll(made.as_fd(), wanted))?;
        Ok(made)
    };
    make().map_err(|source| RebuildError::Kernel { object: "epoll", source })
}

/// Fills all sets, once all files are there.
pub(super) fn fill(rebuild: &Rebuild<'_>) -> Result<(), RebuildError> {
    let failed = |source: io::Error| RebuildError::Kernel { object: "epoll", source };
    let raw = |file: FileId| -> Result<RawFd, RebuildError> {
        Ok(rebuild.made(file).ok_or(RebuildError::Damaged)?.as_raw_fd())
    };
    let mut sets = Vec::new();
    let mut highest = 0;
    for (place, file) in rebuild.files.files.iter().enumerate() {
        let Kind::Epoll { entries, .. } = &file.kind else { continue };
        let id = FileId(u32::try_from(place).map_err(|_| RebuildError::Damaged)?);
        let mut additions = Vec::new();
        for entry in entries {
            highest = highest.max(entry.fd);
            additions.push((raw(entry.file)?, *entry));
        }
        sets.push((raw(id)?, additions));
    }
    if sets.iter().all(|(_, additions)| additions.is_empty()) {
        return Ok(());
    }
    let me =
        sys::descriptor::open_process(std::process::id().cast_signed(), false).map_err(failed)?;
    // A thread with a table of its own, because an entry remembers the number it was added under.
    let work = || -> io::Result<()> {
        let table = ScratchTable::leave_shared_table(me.as_fd(), highest)?;
        for (epoll, additions) in &sets {
            table.select(*epoll)?;
            for (file, entry) in additions {
                table.add(*file, entry.fd, entry.events, entry.data)?;
            }
        }
        Ok(())
    };
    thread::scope(|scope| scope.spawn(work).join())
        .unwrap_or_else(|_| Err(io::Error::other("the thread that fills epoll sets panicked")))
        .map_err(failed)
}

/// Lets processes add their own signalfds once more. A set learns of a signal through whoever
/// added the descriptor (kernel, fs/signalfd.c: the wait queue is that of the caller), so what
/// was added from outside would never speak.
pub(super) fn finish(
    files: &Files,
    tables: &BTreeMap<i32, Vec<Descriptor>>,
    remote: &mut dyn Remote,
) -> Result<(), RebuildError> {
    for (place, file) in files.files.iter().enumerate() {
        let Kind::Epoll { entries, .. } = &file.kind else { continue };
        let set = FileId(u32::try_from(place).map_err(|_| RebuildError::Damaged)?);
        for entry in entries {
            let watched = files.files.get(entry.file.0 as usize).ok_or(RebuildError::Damaged)?;
            if !matches!(watched.kind, Kind::Signal { .. }) {
                continue;
            }
            let Some((pid, set)) = adder(tables, set, *entry) else {
                tracing::warn!(fd = entry.fd, "a signalfd in a set of nobody stays silent");
                continue;
            };
            add_again(pid, set, *entry, remote)?;
        }
    }
    Ok(())
}

/// The process that can have added this entry, and its number for the set.
fn adder(
    tables: &BTreeMap<i32, Vec<Descriptor>>,
    set: FileId,
    entry: EpollEntry,
) -> Option<(i32, i32)> {
    tables.iter().find_map(|(&pid, table)| {
        let has = |fd: i32, file: FileId| {
            table.iter().any(|descriptor| descriptor.fd == fd && descriptor.file == file)
        };
        let set = table.iter().find(|descriptor| descriptor.file == set)?;
        has(entry.fd, entry.file).then_some((pid, set.fd))
    })
}

fn add_again(
    pid: i32,
    set: i32,
    entry: EpollEntry,
    remote: &mut dyn Remote,
) -> Result<(), RebuildError> {
    // `struct epoll_event` is packed here.
    let mut event = entry.events.to_ne_bytes().to_vec();
    event.extend(entry.data.to_ne_bytes());
    let number = |fd: i32| u64::from(fd.cast_unsigned());
    for operation in [libc::EPOLL_CTL_DEL, libc::EPOLL_CTL_ADD] {
        let arguments = [
            Argument::Value(number(set)),
            Argument::Value(number(operation)),
            Argument::Value(number(entry.fd)),
            Argument::In(&event),
            Argument::Value(0),
            Argument::Value(0),
        ];
        remote
            .call(pid, libc::SYS_epoll_ctl, arguments)
            .map_err(|source| RebuildError::Remote { pid, object: "epoll set", source })?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_read_however_it_is_spaced() {
        for text in [
            "5 events: 19 data: 5  pos:0 ino:40c sdev:10",
            "       5 events:       19 data:                5  pos:0 ino:40c sdev:10",
            "5 events:19 data:5 pos:0 ino:40c",
        ] {
            let Line { fd, events, data, inode } = read_line(text).unwrap();
            assert_eq!((fd, events, data, inode), (5, 0x19, 5, 0x40c), "{text}");
        }
        for damaged in ["", "x", "5", "5 events: 19 data: 5 pos:0", "5 events: 1g data: 5 ino:1"] {
            assert!(read_line(damaged).is_err(), "{damaged}");
        }
    }
}
