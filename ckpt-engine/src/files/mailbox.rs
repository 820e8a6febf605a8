//! Descriptors of POSIX message queues. The queues themselves are part of the IPC namespace, see
//! [`crate::ipc`].

use std::{
    collections::BTreeMap,
    io,
    os::fd::{AsFd, AsRawFd, OwnedFd},
    path::Path,
};

use ckpt_format::{
    files::{File, Files, Kind},
    ipc::Mailbox,
    process::Descriptor,
};

use super::{
    Argument, Remote,
    capture::Capture,
    find::{Object, Refusal},
    rebuild::{Rebuild, RebuildError},
};
use crate::{ipc::Opened, sys::descriptor, unnamed};

/// Whether it is one.
pub(super) fn is_mailbox(object: &Object) -> bool {
    const MQUEUE_MAGIC: i64 = 0x1980_0202;
    object.file_type() == libc::S_IFREG
        && object.link.iter().filter(|&&byte| byte == b'/').count() > 0
        && !object.is_path_only()
        && descriptor::file_system(object.fd()).is_ok_and(|magic| magic == MQUEUE_MAGIC)
}

/// Refuses one that tells a process of messages in a way that is not known outside of it.
fn check(opened: &Opened, described: &Mailbox) -> Result<(), Refusal> {
    if opened.told_by_thread.is_some() {
        return Err(Refusal::new(
            "a message queue whose next message starts a thread (mq_notify, SIGEV_THREAD)",
            "restart the program, or let it wait by mq_receive",
        ));
    }
    if described.notify.is_some() && opened.holds_letters()? {
        return Err(Refusal::new(
            "a message queue with messages and with somebody to be told of the next (mq_notify)",
            "let the program read the messages, or end it",
        ));
    }
    Ok(())
}

pub(super) fn capture(capture: &mut Capture<'_>, id: usize) -> Result<Kind, Refusal> {
    let object = &capture.found.objects[id];
    let device = Some(object.inode().0);
    let namespace = capture.mailboxes.iter().position(|all| all.device == device);
    let number = namespace.and_then(|place| u32::try_from(place).ok());
    let found = number.and_then(|number| capture.files.ipc_mut(number)).zip(namespace);
    let (Some((ipc, place)), Some(namespace)) = (found, number) else {
        return Err(Refusal::new(
            "a message queue of an IPC namespace that is not there any more",
            "end the program",
        ));
    };
    let all = &mut capture.mailboxes[place].opened;
    let known = all.iter().position(|opened| opened.inode == object.inode());
    let place = match known {
        Some(place) => place,
        None => {
            let path = format!("/proc/self/fd/{}", object.fd.as_raw_fd());
            let opened = Opened::new(Path::new(&path))?;
            let name = unnamed::lost_name(&object.link).unwrap_or(&object.link);
            let name = name.rsplit(|&byte| byte == b'/').next().unwrap_or(name).to_vec();
            ipc.mailboxes.push(opened.describe(name, true, capture.source.id_base)?);
            all.push(opened);
            all.len() - 1
        }
    };
    check(&all[place], &ipc.mailboxes[place])?;
    let mailbox = u32::try_from(place).map_err(io::Error::other)?;
    Ok(Kind::Mailbox { namespace, mailbox })
}

pub(super) fn rebuild(
    rebuild: &Rebuild<'_>,
    (namespace, mailbox): (u32, u32),
    flags: u32,
) -> Result<OwnedFd, RebuildError> {
    let all = rebuild.target.mailboxes.get(namespace as usize).ok_or(RebuildError::Damaged)?;
    let made = all.get(mailbox as usize).ok_or(RebuildError::Damaged)?;
    rebuild
        .target
        .reopen(made.as_fd(), flags)
        .map_err(|source| RebuildError::Kernel { object: "message queue", source })
}

/// Lets the processes ask again to be told of the next message.
pub(super) fn finish(
    files: &Files,
    tables: &BTreeMap<i32, Vec<Descriptor>>,
    remote: &mut dyn Remote,
) -> Result<(), RebuildError> {
    let mailboxes = (0..).zip(files.ipcs()).flat_map(|(namespace, ipc)| {
        (0..)
            .zip(&ipc.mailboxes)
            .map(move |(mailbox, it)| (Kind::Mailbox { namespace, mailbox }, it))
    });
    for (kind, mailbox) in mailboxes {
        let Some(notify) = mailbox.notify else { continue };
        let refers = |file: &File| file.kind == kind;
        let table = tables.get(&notify.pid).map(Vec::as_slice).unwrap_or_default();
        let held = table.iter().find(|held| files.get(held.file).is_some_and(refers));
        let Some(held) = held else { continue };
        // struct sigevent: the value, the signal, and how.
        let mut event = [0u8; 64];
        event[8..12].copy_from_slice(&notify.signal.to_ne_bytes());
        event[12..16].copy_from_slice(&i32::from(notify.signal == 0).to_ne_bytes());
        let none = || Argument::Value(0);
        let fd = Argument::Value(u64::from(held.fd.cast_unsigned()));
        let arguments = [fd, Argument::In(&event), none(), none(), none(), none()];
        let pid = notify.pid;
        remote
            .call(pid, libc::SYS_mq_notify, arguments)
            .map_err(|source| RebuildError::Remote { pid, object: "message queue", source })?;
    }
    Ok(())
}
