//! What is opened by its name: regular files, directories, devices, and anything with `O_PATH`.

use std::{
    io::{self, Seek, SeekFrom},
    os::{
        fd::{AsFd, OwnedFd},
        unix::ffi::OsStrExt,
    },
};

use ckpt_format::files::{File, Kind, PathFile};
use nix::{
    fcntl::{AT_FDCWD, OFlag, OpenHow, ResolveFlag, openat2},
    poll::{PollFd, PollFlags, PollTimeout},
};

use super::{
    Argument, Remote,
    capture::Capture,
    deleted,
    find::{Object, Refusal},
    gone,
    rebuild::{RebuildError, Target, lossy},
};
use crate::sys::{descriptor, task};

/// The character devices that are the same on every host, by major and minor number.
const DEVICES: &[(u32, u32, &str)] = &[
    (1, 3, "/dev/null"),
    (1, 5, "/dev/zero"),
    (1, 7, "/dev/full"),
    (1, 8, "/dev/random"),
    (1, 9, "/dev/urandom"),
    (1, 11, "/dev/kmsg"),
];

/// The name that a device has in every VE.
fn device_name(object: &Object) -> Option<&'static str> {
    let number = (libc::major(object.status.special), libc::minor(object.status.special));
    let device = DEVICES.iter().find(|device| (device.0, device.1) == number)?;
    (object.file_type() == libc::S_IFCHR).then_some(device.2)
}

/// Devices worth a name of their own in a message.
const KNOWN: &[(u32, u32, &str, &str)] = &[
    (10, 229, "/dev/fuse, a file system in user space", "unmount it"),
    (10, 232, "/dev/kvm, a virtual machine", "stop the virtual machine"),
    (10, 126, "/dev/userfaultfd", "stop the program"),
    (10, 237, "/dev/loop-control", "close it"),
];

/// Refuses devices that are bound to the host.
pub(super) fn check_device(object: &Object) -> Result<(), Refusal> {
    let number = (libc::major(object.status.special), libc::minor(object.status.special));
    if device_name(object).is_some() {
        return Ok(());
    }
    let name = lossy(&object.link);
    Err(match KNOWN.iter().find(|known| (known.0, known.1) == number) {
        Some((_, _, what, hint)) => Refusal::new(*what, *hint),
        None => Refusal::new(
            format!("the device {name} ({}:{})", number.0, number.1),
            "close it: only devices that every host has can be moved",
        ),
    })
}

/// The flags with which a file is opened again: those that open(2) takes and that last.
pub(super) fn reopen_flags(flags: u32) -> OFlag {
    let lasting = OFlag::O_ACCMODE
        | OFlag::O_APPEND
        | OFlag::O_NONBLOCK
        | OFlag::O_DIRECT
        | OFlag::O_SYNC
        | OFlag::O_DSYNC
        | OFlag::O_NOATIME
        | OFlag::O_DIRECTORY
        | OFlag::O_NOFOLLOW;
    let flags = OFlag::from_bits_truncate(flags.cast_signed());
    if flags.contains(OFlag::O_PATH) {
        let naming = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW;
        return (flags & naming) | OFlag::O_CLOEXEC;
    }
    (flags & lasting) | OFlag::O_NOCTTY | OFlag::O_CLOEXEC
}

pub(super) fn capture(capture: &Capture<'_>, id: usize) -> Result<Kind, Refusal> {
    let object = &capture.found.objects[id];
    let offset = if object.is_path_only() { 0 } else { object.info()?.number("pos", 10)? };
    // A common device that was opened on the host, such as the `/dev/null` of a command started
    // from there, is the same one here.
    let outside = !capture.is_mounted(object.status.mount);
    let own_mounts = capture.mounts_of(object.status.mount) == Some(0);
    let path = match device_name(object).filter(|_| outside) {
        Some(name) => name.as_bytes().to_vec(),
        None if deleted::is_deleted(object) => {
            deleted::other_name(capture, object).unwrap_or_else(|| object.link.clone())
        }
        None => object.link.clone(),
    };
    let process_gone = own_mounts && gone::is(capture.source.init, &path);
    Ok(Kind::Path(PathFile {
        path,
        // Of one that is gone nothing is read any more.
        offset: if process_gone { 0 } else { offset },
        process_gone,
        file_type: object.file_type(),
        device: object.status.special,
        trigger: has_trigger(object)?,
    }))
}

/// The files of pressure stall information (Documentation/accounting/psi.rst), of a cgroup or of
/// the whole machine.
const PRESSURE: [&[u8]; 4] = [b"cpu", b"memory", b"io", b"irq"];

/// The trigger that systemd and most others set: told when some tasks have stalled for 200 ms
/// within 2 s. The kernel shows nobody what was written, only that something was.
const TRIGGER: &[u8] = b"some 200000 2000000\0";

/// Whether a program has written a trigger into a file of pressure. A poll of one without a
/// trigger is an error at once, so whoever waits for it would never sleep.
fn has_trigger(object: &Object) -> io::Result<bool> {
    let name = object.link.strip_prefix(b"/proc/pressure/").or_else(|| {
        let name = object.link.rsplit(|&byte| byte == b'/').next()?;
        name.strip_suffix(b".pressure").filter(|_| object.link.starts_with(b"/sys/fs/cgroup/"))
    });
    let writable = object.flags & libc::O_ACCMODE != libc::O_RDONLY;
    if !writable || name.is_none_or(|name| !PRESSURE.contains(&name)) {
        return Ok(false);
    }
    let mut polled = [PollFd::new(object.fd(), PollFlags::POLLPRI)];
    nix::poll::poll(&mut polled, PollTimeout::ZERO)?;
    Ok(!polled[0].revents().is_some_and(|events| events.contains(PollFlags::POLLERR)))
}

/// Sets the trigger of a file of pressure, if it had one.
fn set_trigger(fd: OwnedFd, file: &PathFile) -> io::Result<OwnedFd> {
    if file.trigger {
        nix::unistd::write(&fd, TRIGGER)?;
        nix::unistd::lseek(&fd, 0, nix::unistd::Whence::SeekSet)?;
    }
    Ok(fd)
}

pub(super) fn rebuild(
    target: &Target,
    file: &PathFile,
    flags: u32,
) -> Result<OwnedFd, RebuildError> {
    let failed = |source: io::Error| RebuildError::Open { path: lossy(&file.path), source };
    // The path has no symbolic link left in it, so one found now was put there since.
    let how = OpenHow::new().flags(reopen_flags(flags)).resolve(ResolveFlag::RESOLVE_NO_SYMLINKS);
    let open = |path: &[u8]| {
        openat2(AT_FDCWD, std::ffi::OsStr::from_bytes(path), how).map_err(io::Error::from)
    };
    let opened = match file.process_gone {
        true => gone::open(target, &file.path, open),
        false => open(&file.path),
    };
    let fd = opened.map_err(failed)?;
    let status = descriptor::status(fd.as_fd()).map_err(failed)?;
    if status.mode & libc::S_IFMT != file.file_type || status.special != file.device {
        return Err(RebuildError::Changed { path: lossy(&file.path) });
    }
    let fd = set_trigger(fd, file).map_err(failed)?;
    if late_offset(file).is_some() {
        return Ok(fd);
    }
    seek(fd, file.offset).map_err(failed)
}

/// True for files whose text the kernel makes up for whoever has opened them: it shows ids as that
/// task's user namespace maps them.
fn is_made_up(file: &PathFile) -> bool {
    file.path.starts_with(b"/proc/") && file.file_type == libc::S_IFREG
}

/// Opens such a file as root of the VE: pid 1 does it, whose descriptors `init` can fetch, or a
/// process in the mount namespace where its path leads to it.
pub(super) fn open_inside(
    file: &PathFile,
    opened: &File,
    init: &OwnedFd,
    remote: &mut dyn Remote,
) -> Result<Option<OwnedFd>, RebuildError> {
    if !is_made_up(file) || file.process_gone {
        return Ok(None);
    }
    // In another mount namespace it may be another file, which one of its processes opens.
    let (pid, holder) = match opened.mounts {
        0 => (1, None),
        mounts => match remote.member(mounts) {
            Some((pid, host)) => (pid, Some(host)),
            None => return Ok(None),
        },
    };
    let mut path = file.path.clone();
    path.push(0);
    let failed = |source: io::Error| RebuildError::Open { path: lossy(&file.path), source };
    let none = || Argument::Value(0);
    let flags = Argument::Value(reopen_flags(opened.flags).bits().cast_unsigned().into());
    let fd = remote
        .call(pid, libc::SYS_open, [Argument::In(&path), flags, none(), none(), none(), none()])
        .map_err(|errno| failed(errno.into()))?;
    let holder = holder.map(task::pidfd_open).transpose();
    let fetched = holder
        .and_then(|holder| task::pidfd_getfd(holder.as_ref().unwrap_or(init), fd as i32))
        .map_err(failed);
    remote
        .call(pid, libc::SYS_close, [Argument::Value(fd), none(), none(), none(), none(), none()])
        .map_err(|errno| failed(errno.into()))?;
    fetched.and_then(|fd| set_trigger(fd, file).map_err(failed)).map(Some)
}

/// The offset of a file whose text the kernel makes up when it is read *or its offset set*: half
/// read, it must go on with what the finished processes are, so that is set last.
pub(super) fn late_offset(file: &PathFile) -> Option<u64> {
    (is_made_up(file) && file.offset != 0).then_some(file.offset)
}

/// Sets the offset of a description.
pub(super) fn seek(fd: OwnedFd, offset: u64) -> io::Result<OwnedFd> {
    if offset == 0 {
        return Ok(fd);
    }
    let mut file = std::fs::File::from(fd);
    file.seek(SeekFrom::Start(offset))?;
    Ok(file.into())
}
