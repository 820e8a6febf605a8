//! Pipes and FIFOs.
//!
//! The data are copied with tee(2) into a pipe of our own, which consumes nothing and keeps the
//! packets of `O_DIRECT` writers apart.

use std::{
    collections::{HashMap, hash_map::Entry},
    ffi::OsStr,
    fs::{self, File},
    io::{self, Read, Write},
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
        unix::{
            ffi::OsStrExt,
            fs::{OpenOptionsExt, PermissionsExt, lchown},
        },
    },
    path::Path,
};

use ckpt_format::files::{Fifo, Kind, Pipe};
use nix::{
    fcntl::OFlag,
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::stat::Mode,
    unistd,
};

use super::{
    capture::Capture,
    find::{Found, Object, Refusal},
    rebuild::{Rebuild, RebuildError, Target, lossy},
};
use crate::{
    momentary,
    sys::descriptor::{self, Change, Count, Query},
};

fn is_fifo(object: &Object) -> bool {
    !object.link.starts_with(b"pipe:[")
}

/// Refuses pipes whose other end is held outside the VE: no descriptor of the VE is for it, and
/// still the kernel does not say that it is closed.
pub(super) fn check(found: &Found, object: &Object) -> Result<(), Refusal> {
    let (readers, writers, _) = ends(found, object);
    if (readers && writers) || is_fifo(object) {
        return Ok(());
    }
    let events = poll_now(object)?;
    let other_end_closed = events.intersects(PollFlags::POLLHUP | PollFlags::POLLERR);
    if other_end_closed {
        return Ok(());
    }
    Err(Refusal::new(
        "a pipe with one end outside the VE",
        "end the command that was started from the host with its input or output piped",
    ))
}

/// Whether descriptors of the VE can read, can write, and write in packets.
fn ends(found: &Found, object: &Object) -> (bool, bool, bool) {
    let (mut readers, mut writers, mut packets) = (false, false, false);
    for &end in found.of_inode(object.inode()) {
        let end = &found.objects[end as usize];
        let mode = end.flags & libc::O_ACCMODE;
        let usable = !end.is_path_only();
        readers |= usable && mode != libc::O_WRONLY;
        writers |= usable && mode != libc::O_RDONLY;
        packets |= usable && mode != libc::O_RDONLY && end.flags & libc::O_DIRECT != 0;
    }
    (readers, writers, packets)
}

fn poll_now(object: &Object) -> io::Result<PollFlags> {
    let mut fds = [PollFd::new(object.fd(), PollFlags::POLLIN | PollFlags::POLLOUT)];
    poll(&mut fds, PollTimeout::ZERO)?;
    Ok(fds[0].revents().unwrap_or(PollFlags::empty()))
}

pub(super) fn capture(capture: &mut Capture<'_>, id: usize) -> Result<Kind, Refusal> {
    let object = &capture.found.objects[id];
    let inode = object.inode();
    let (readers, writers, packet_mode) = ends(&capture.found, object);
    if let Some(&pipe) = capture.pipes.get(&inode) {
        return Ok(Kind::Pipe { pipe });
    }
    let fifo = if is_fifo(object) {
        let deleted = object.link.ends_with(b" (deleted)");
        let path = object.link.strip_suffix(b" (deleted)").unwrap_or(&object.link).to_vec();
        Some(Fifo { path, deleted, mode: object.status.mode & 0o7777 })
    } else {
        None
    };
    // Without one that can be used, because all only name it, there is nothing in it.
    let ends = capture.found.of_inode(inode).iter();
    let end = ends.map(|&end| &capture.found.objects[end as usize]).find(|it| !it.is_path_only());
    let (size, packets) = match end {
        Some(end) => {
            let size = descriptor::query(end.fd(), Query::GetPipeSize)?.cast_unsigned();
            (size, packets(end, size, packet_mode)?)
        }
        None => (0, Vec::new()),
    };
    let is_hung_up = |end| Ok::<_, io::Error>(poll_now(end)?.contains(PollFlags::POLLHUP));
    let pipe = Pipe {
        size,
        packets,
        packet_mode,
        uid: capture.source.inside(object.status.uid),
        gid: capture.source.inside(object.status.gid),
        hung_up: fifo.is_some() && readers && !writers && end.map_or(Ok(false), is_hung_up)?,
        fifo,
    };
    let place = u32::try_from(capture.files.pipes.len()).map_err(io::Error::other)?;
    capture.pipes.insert(inode, place);
    capture.files.pipes.push(pipe);
    Ok(Kind::Pipe { pipe: place })
}

/// Reads what is in a pipe without taking it out.
fn packets(object: &Object, size: u32, packet_mode: bool) -> io::Result<Vec<serde_bytes::ByteBuf>> {
    let length = descriptor::count(object.fd(), Count::Readable)?;
    if length == 0 {
        return Ok(Vec::new());
    }
    // A reader of our own, because the VE may hold the writing end only. It does not block.
    let reader = File::options()
        .read(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(format!("/proc/self/fd/{}", object.fd.as_raw_fd()))?;
    let mut flags = OFlag::O_CLOEXEC | OFlag::O_NONBLOCK;
    flags.set(OFlag::O_DIRECT, packet_mode);
    let (copy, copy_writer) = unistd::pipe2(flags)?;
    let wanted = i32::try_from(size).map_err(io::Error::other)?;
    descriptor::change(copy_writer.as_fd(), Change::SetPipeSize, wanted)?;
    let copied = descriptor::tee(reader.as_fd(), copy_writer.as_fd(), length as usize)?;
    if copied != length as usize {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    drop(copy_writer);
    let mut copy = File::from(copy);
    let mut packets: Vec<serde_bytes::ByteBuf> = Vec::new();
    let mut buffer = vec![0; if packet_mode { 4096 } else { copied }];
    loop {
        match copy.read(&mut buffer)? {
            0 => return Ok(packets),
            read if packet_mode => packets.push(serde_bytes::ByteBuf::from(&buffer[..read])),
            read => match packets.last_mut() {
                Some(all) => all.extend_from_slice(&buffer[..read]),
                None => packets.push(serde_bytes::ByteBuf::from(&buffer[..read])),
            },
        }
    }
}

/// A pipe of the target, from which its descriptions are made.
#[derive(Debug)]
pub(super) enum Made {
    /// The ends as pipe(2) gave them; each may be given out once.
    Ends { reader: OwnedFd, reader_free: bool, writer: Option<OwnedFd> },
    /// A FIFO with nothing in it: only its name is held, so that nobody sees an end come or go.
    Empty(OwnedFd),
    /// A FIFO with data, held open for both ways until all descriptions are made.
    Full(OwnedFd),
}

/// The pipes of one rebuild by their place in [`ckpt_format::files::Files::pipes`].
pub(super) type Pipes = HashMap<u32, Made>;

fn make(pipe: &Pipe, id_base: u32) -> Result<Made, RebuildError> {
    let failed = |source: io::Error| RebuildError::Kernel { object: "pipe", source };
    let Some(fifo) = &pipe.fifo else {
        let (reader, writer) = unistd::pipe2(OFlag::O_CLOEXEC).map_err(|e| failed(e.into()))?;
        std::os::unix::fs::fchown(&reader, Some(id_base + pipe.uid), Some(id_base + pipe.gid))
            .map_err(failed)?;
        set_size(writer.as_fd(), pipe.size).map_err(failed)?;
        fill(pipe, writer.as_fd()).map_err(failed)?;
        return Ok(Made::Ends { reader, reader_free: true, writer: Some(writer) });
    };
    make_fifo(pipe, fifo, id_base)
        .map_err(|source| RebuildError::Open { path: lossy(&fifo.path), source })?
        .ok_or_else(|| RebuildError::Changed { path: lossy(&fifo.path) })
}

fn make_fifo(pipe: &Pipe, fifo: &Fifo, id_base: u32) -> io::Result<Option<Made>> {
    let path = Path::new(OsStr::from_bytes(&fifo.path));
    if !fifo.deleted {
        return open_fifo(pipe, path);
    }
    momentary::near_old_name(path, |path| {
        unistd::mkfifo(path, Mode::empty())?;
        fs::set_permissions(path, fs::Permissions::from_mode(fifo.mode & 0o7777))?;
        lchown(path, Some(id_base + pipe.uid), Some(id_base + pipe.gid))?;
        open_fifo(pipe, path)
    })
}

fn open_fifo(pipe: &Pipe, path: &Path) -> io::Result<Option<Made>> {
    let options = |flags: i32| {
        let mut options = File::options();
        options.read(true).custom_flags(libc::O_NOFOLLOW | flags);
        options
    };
    let name = options(libc::O_PATH).open(path)?;
    if descriptor::status(name.as_fd())?.mode & libc::S_IFMT != libc::S_IFIFO {
        return Ok(None);
    }
    if pipe.packets.is_empty() {
        return Ok(Some(Made::Empty(name.into())));
    }
    // For reading and writing, which never waits for another end.
    let both = options(libc::O_NONBLOCK).write(true).open(path)?;
    set_size(both.as_fd(), pipe.size)?;
    fill(pipe, both.as_fd())?;
    Ok(Some(Made::Full(both.into())))
}

fn set_size(end: BorrowedFd<'_>, size: u32) -> io::Result<()> {
    let size = i32::try_from(size).map_err(io::Error::other)?;
    if descriptor::query(end, Query::GetPipeSize)? == size {
        return Ok(());
    }
    descriptor::change(end, Change::SetPipeSize, size)
}

fn fill(pipe: &Pipe, writer: BorrowedFd<'_>) -> io::Result<()> {
    if pipe.packets.is_empty() {
        return Ok(());
    }
    let mut flags = OFlag::O_NONBLOCK;
    flags.set(OFlag::O_DIRECT, pipe.packet_mode);
    descriptor::change(writer, Change::SetFlags, flags.bits())?;
    let mut file = File::from(writer.try_clone_to_owned()?);
    for packet in &pipe.packets {
        file.write_all(packet)?;
    }
    Ok(())
}

pub(super) fn rebuild(
    rebuild: &mut Rebuild<'_>,
    pipe: u32,
    flags: u32,
) -> Result<OwnedFd, RebuildError> {
    let description = rebuild.files.pipes.get(pipe as usize).ok_or(RebuildError::Damaged)?;
    let failed = |source: io::Error| RebuildError::Kernel { object: "pipe", source };
    let target = rebuild.target;
    let made = match rebuild.pipes.entry(pipe) {
        Entry::Occupied(made) => made.into_mut(),
        Entry::Vacant(place) => place.insert(make(description, target.id_base)?),
    };
    match made {
        Made::Ends { reader, reader_free, writer } => {
            let mode = flags.cast_signed() & libc::O_ACCMODE;
            let ready = match mode {
                libc::O_RDONLY if *reader_free => {
                    *reader_free = false;
                    Some(reader.try_clone().map_err(failed)?)
                }
                libc::O_WRONLY => writer.take(),
                _ => None,
            };
            let Some(fd) = ready else {
                return target.reopen(reader.as_fd(), flags).map_err(failed);
            };
            let status = flags.cast_signed() & (libc::O_NONBLOCK | libc::O_DIRECT);
            descriptor::change(fd.as_fd(), Change::SetFlags, status).map_err(failed)?;
            Ok(fd)
        }
        Made::Full(both) => target.reopen(both.as_fd(), flags).map_err(failed),
        Made::Empty(name) if flags.cast_signed() & libc::O_PATH != 0 => {
            target.reopen(name.as_fd(), flags).map_err(failed)
        }
        Made::Empty(name) => open_empty(target, name.as_fd(), description, flags).map_err(failed),
    }
}

/// Opens one end of a FIFO without waiting for the other one.
fn open_empty(
    target: &Target,
    name: BorrowedFd<'_>,
    pipe: &Pipe,
    flags: u32,
) -> io::Result<OwnedFd> {
    let both = || target.reopen(name, (libc::O_RDWR | libc::O_NONBLOCK).cast_unsigned());
    let writes_only = flags.cast_signed() & libc::O_ACCMODE == libc::O_WRONLY;
    let reader_for_a_moment = if writes_only { Some(both()?) } else { None };
    let fd = target.reopen(name, flags | libc::O_NONBLOCK.cast_unsigned())?;
    drop(reader_for_a_moment);
    if pipe.hung_up && !writes_only {
        // A reader sees the hang-up of a writer that came and went after its own open only.
        drop(both()?);
    }
    set_size(fd.as_fd(), pipe.size)?;
    let status = flags.cast_signed() & (libc::O_NONBLOCK | libc::O_DIRECT);
    descriptor::change(fd.as_fd(), Change::SetFlags, status)?;
    Ok(fd)
}
