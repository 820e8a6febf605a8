//! Namespaces that are held open: `/proc/PID/ns/*`.

use std::{
    fs, io,
    os::fd::{AsFd, OwnedFd},
};

use ckpt_format::files::Kind;
use nix::{
    fcntl::{OFlag, openat},
    sys::stat::Mode,
};

use super::{
    Source,
    find::{Object, Refusal},
    rebuild::{RebuildError, Target, lossy},
};

/// The files of `/proc/PID/ns` by the kind that their link shows.
const NAMES: &[(&[u8], &[&str])] = &[
    (b"cgroup:[", &["cgroup"]),
    (b"ipc:[", &["ipc"]),
    (b"mnt:[", &["mnt"]),
    (b"net:[", &["net"]),
    (b"pid:[", &["pid", "pid_for_children"]),
    (b"time:[", &["time", "time_for_children"]),
    (b"user:[", &["user"]),
    (b"uts:[", &["uts"]),
];

fn names(object: &Object) -> Option<&'static [&'static str]> {
    let found = NAMES.iter().find(|(start, _)| object.link.starts_with(start))?;
    Some(found.1)
}

/// Whether it is a namespace.
pub(super) fn is_namespace(object: &Object) -> bool {
    names(object).is_some()
}

/// Finds its number, or a process that is in it.
pub(super) fn capture(source: &Source<'_>, object: &Object) -> Result<Kind, Refusal> {
    use std::os::unix::fs::MetadataExt;
    if let Some(&(kind, number)) = source.namespaces.get(&object.inode().1)
        && number > 0
    {
        let number = Some(number);
        return Ok(Kind::Namespace { name: kind.to_owned(), pid: 1, number });
    }
    let names = names(object).unwrap_or(&[]);
    for holder in &source.processes {
        for &name in names {
            let path = format!("/proc/{}/ns/{name}", holder.host_pid);
            let Ok(metadata) = fs::metadata(path) else { continue };
            if (metadata.dev(), metadata.ino()) == object.inode() {
                let name = name.to_owned();
                return Ok(Kind::Namespace { name, pid: holder.pid, number: None });
            }
        }
    }
    Err(Refusal::new(
        format!("the namespace {} that no process of the VE is in", lossy(&object.link)),
        "close it, or stop the service that keeps it open",
    ))
}

/// Opens the one that has this number, or that the rebuilt process is in.
pub(super) fn rebuild(
    target: &Target,
    name: &str,
    pid: i32,
    number: Option<u32>,
) -> Result<OwnedFd, RebuildError> {
    let known = NAMES.iter().any(|(_, names)| names.contains(&name));
    let host_pid = *target.processes.get(&pid).filter(|_| known).ok_or(RebuildError::Damaged)?;
    if let Some(number) = number {
        let made = target.namespaces.iter().find(|(key, _)| **key == (name, number));
        let (_, made) = made.ok_or(RebuildError::Damaged)?;
        // Each time another description.
        return target
            .reopen(made.as_fd(), 0)
            .map_err(|source| RebuildError::Kernel { object: "namespace", source });
    }
    let path = format!("{host_pid}/ns/{name}");
    openat(&target.proc, path.as_str(), OFlag::O_RDONLY | OFlag::O_CLOEXEC, Mode::empty()).map_err(
        |errno| RebuildError::Kernel { object: "namespace", source: io::Error::from(errno) },
    )
}
