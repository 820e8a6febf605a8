//! What an IPC namespace holds: System V memory, semaphores and messages, and POSIX message
//! queues.
//!
//! Read and made by threads of our own that enter the namespace. The contents of shared memory
//! travel with the memory of the processes; what only a process itself can say, its `SEM_UNDO`,
//! is found by [`undo`].

mod mailbox;
mod semaphore;
mod table;
mod undo;

use std::{
    fs::{self, File},
    io,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::fs::MetadataExt,
    },
};

use ckpt_format::{
    ipc::{Entry, Ipc, Mailbox, MessageQueue, Segment, SemaphoreSet},
    memory::{PAGE, SharedKind, SharedObject},
};

pub use self::mailbox::Mailboxes;
use self::semaphore::rebuild_sets;
pub(crate) use self::{
    mailbox::{Letters, Opened, device_of, read_letters},
    undo::{adjustments, restore as restore_undo},
};
use crate::{
    procfs,
    sys::{
        identity,
        ipc::{self, Attached, Family, Permissions},
        namespace, task,
    },
    unnamed,
};

/// Set in the ids of segments, whose numbers are those of their own table.
const OF_A_SEGMENT: u64 = 1 << 63;

/// The [`SharedObject::id`] of the segment with this number in the namespace with this inode. The
/// number is the lower half.
pub(crate) fn segment_id(namespace: u64, number: u64) -> u64 {
    OF_A_SEGMENT | namespace << 32 | number
}

/// Whether a segment is one of the namespace with this inode.
pub(crate) fn is_of(object: u64, namespace: u64) -> bool {
    let number = object & u64::from(u32::MAX);
    object == segment_id(namespace, number)
}

/// The inode of the IPC namespace of a process; 0 for one that has ended.
pub(crate) fn namespace_of(pid: i32) -> u64 {
    fs::metadata(procfs::path(pid, "ns/ipc")).map_or(0, |metadata| metadata.ino())
}

/// Whether an object is a segment.
pub(crate) fn is_segment(object: u64) -> bool {
    object & OF_A_SEGMENT != 0
}

/// The limits of the namespace, below `/proc/sys`.
const LIMITS: &[&str] = &[
    "kernel/shmmax",
    "kernel/shmall",
    "kernel/shmmni",
    "kernel/shm_rmid_forced",
    "kernel/msgmax",
    "kernel/msgmnb",
    "kernel/msgmni",
    "kernel/sem",
    "fs/mqueue/queues_max",
    "fs/mqueue/msg_max",
    "fs/mqueue/msgsize_max",
    "fs/mqueue/msg_default",
    "fs/mqueue/msgsize_default",
];

fn limit_path(name: &str) -> String {
    format!("/proc/sys/{name}")
}

/// Everything of an IPC namespace, or of that of a process, but the letters in mailboxes; with our
/// own descriptors for the mailboxes that have names.
pub(crate) fn capture(of: BorrowedFd<'_>, id_base: u32) -> io::Result<(Ipc, Mailboxes)> {
    namespace::in_ipc_of(of, || {
        let read =
            |name: &&str| Some(((*name).to_owned(), fs::read_to_string(limit_path(name)).ok()?));
        let limits = LIMITS.iter().filter_map(read).collect();
        let segments = table::segments(id_base)?;
        let semaphores = table::semaphores(id_base)?
            .into_iter()
            .map(|(entry, count)| {
                Ok(SemaphoreSet { values: ipc::semaphore_values(entry.id, count)?, entry })
            })
            .collect::<io::Result<_>>()?;
        let queues =
            table::queues(id_base)?.into_iter().map(read_queue).collect::<io::Result<_>>()?;
        let (mailboxes, opened) = mailbox::named(id_base)?;
        Ok((Ipc { limits, segments, semaphores, queues, mailboxes }, opened))
    })
}

fn read_queue((entry, size_max): (Entry, usize)) -> io::Result<MessageQueue> {
    let mut messages = Vec::new();
    for place in 0.. {
        let found = ipc::peek_message(entry.id, place, size_max).map_err(|error| {
            // The kernel copies none that may not be sent any more (ipc/msgutil.c, `copy_msg`).
            let is_too_long = error.raw_os_error() == Some(libc::EINVAL);
            let text = format!("a message in the queue {} is longer than kernel.msgmax", entry.id);
            if is_too_long { io::Error::other(text) } else { error }
        });
        match found? {
            Some((kind, text)) => messages.push((kind, text.into())),
            None => break,
        }
    }
    Ok(MessageQueue { entry, bytes_max: ipc::queue_limit(entry.id)?, messages })
}

/// What the table tells about a segment of a process's namespace, which has this number in the VE,
/// and the file behind it.
pub(crate) fn segment(
    (host, file): (i32, &File),
    object: u64,
    number: u32,
    id_base: u32,
) -> io::Result<SharedObject> {
    let process = task::pidfd_open(host)?;
    let inode = namespace_of(host);
    let all = namespace::in_ipc_of(process.as_fd(), || table::segments(id_base))?;
    let segment = all.into_iter().find(|segment| id_of(inode, segment) == object);
    let segment = segment.ok_or(io::ErrorKind::NotFound)?;
    describe(object, Segment { namespace: number, ..segment }, file)
}

/// A segment of huge pages is as large as these.
fn describe(id: u64, segment: Segment, file: &File) -> io::Result<SharedObject> {
    let huge = unnamed::huge_page(file)?.unwrap_or(0);
    let size = if huge == 0 { segment.size } else { file.metadata()?.len() };
    Ok(SharedObject { id, size, kind: SharedKind::Segment(Segment { huge, ..segment }) })
}

fn id_of(namespace: u64, segment: &Segment) -> u64 {
    segment_id(namespace, u64::from(segment.entry.id.cast_unsigned()))
}

fn inode_of(namespace: BorrowedFd<'_>) -> io::Result<u64> {
    Ok(File::from(namespace.try_clone_to_owned()?).metadata()?.ino())
}

/// How often each segment of a namespace is attached, by [`SharedObject::id`].
pub(crate) fn attachments(namespace: BorrowedFd<'_>) -> io::Result<Vec<(u64, u64)>> {
    let inode = inode_of(namespace)?;
    let all = namespace::in_ipc_of(namespace, || table::attachments(0))?;
    Ok(all.into_iter().map(|(segment, count)| (id_of(inode, &segment), count)).collect())
}

/// The segments that nobody has attached: no process's memory shows them. Of the namespace that
/// has this number in the VE.
pub fn detached_segments(
    of: BorrowedFd<'_>,
    number: u32,
    id_base: u32,
) -> io::Result<Vec<(SharedObject, File)>> {
    let inode = inode_of(of)?;
    namespace::in_ipc_of(of, || {
        let detached = table::attachments(id_base)?.into_iter().filter(|(_, count)| *count == 0);
        let open = |(segment, _): (Segment, u64)| {
            let id = id_of(inode, &segment);
            let segment = Segment { namespace: number, ..segment };
            let file = open_segment(&segment, true).ok()?;
            Some((describe(id, segment, &file).ok()?, file))
        };
        // One that cannot be opened has been removed meanwhile.
        Ok(detached.filter_map(open).collect())
    })
}

/// The file behind a segment of the calling thread's namespace.
fn open_segment(segment: &Segment, read_only: bool) -> io::Result<File> {
    let attached = Attached::new(segment.entry.id, read_only)?;
    let own = std::process::id().cast_signed();
    // How far it goes, its size does not say if it is of huge pages.
    let maps = procfs::read_text(own, "maps").map_err(io::Error::other)?;
    let maps = procfs::parse_maps(&maps);
    let line = maps.iter().find(|line| line.start == attached.address());
    let line = line.ok_or(io::ErrorKind::NotFound)?;
    let path = procfs::path(own, &format!("map_files/{:x}-{:x}", line.start, line.end));
    File::options().read(true).write(!read_only).open(path)
}

/// Makes a segment, empty, in an IPC namespace of the VE, or that of a process.
pub(crate) fn make_segment(of: &OwnedFd, segment: &Segment, id_base: u32) -> io::Result<File> {
    namespace::in_ipc_of(of.as_fd(), || {
        let entry = segment.entry;
        let size = usize::try_from(segment.size).map_err(io::Error::other)?;
        let key = if segment.removed { 0 } else { entry.key };
        let huge = segment.huge;
        if huge != 0 && (!huge.is_power_of_two() || huge <= PAGE) {
            return Err(io::ErrorKind::InvalidData.into());
        }
        as_creator(&entry, id_base, || {
            let make = || numbered("shm", entry.id, || ipc::make_memory(key, size, huge));
            match make() {
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                    // One that was removed on the source since, but is still attached.
                    ipc::remove(Family::Memory, ipc::memory_with_key(key)?)?;
                    make()
                }
                made => made,
            }
        })?;
        open_segment(segment, false)
    })
}

/// Runs `work` as the one who has made an object.
fn as_creator<T>(
    entry: &Entry,
    id_base: u32,
    work: impl FnOnce() -> io::Result<T>,
) -> io::Result<T> {
    identity::own_new_files(id_base, id_base)?;
    identity::act_as(id_base + entry.creator_uid, id_base + entry.creator_gid, work)
}

/// Has the next object of a family get a number.
fn numbered(family: &str, id: i32, make: impl FnOnce() -> io::Result<i32>) -> io::Result<i32> {
    fs::write(format!("/proc/sys/kernel/{family}_next_id"), id.to_string())?;
    let made = make()?;
    if made == id { Ok(made) } else { Err(io::ErrorKind::AlreadyExists.into()) }
}

fn permissions(entry: &Entry, id_base: u32) -> Permissions {
    Permissions { uid: id_base + entry.uid, gid: id_base + entry.gid, mode: entry.mode }
}

/// Makes everything in an IPC namespace of the VE, or that of a process; returns descriptors for
/// the mailboxes. The segments are there already, each attached where it was; those that have gone
/// since are removed.
pub(crate) fn rebuild(of: &OwnedFd, wanted: &Ipc, id_base: u32) -> io::Result<Vec<OwnedFd>> {
    namespace::in_ipc_of(of.as_fd(), || {
        for there in table::segments(id_base)? {
            let segment = wanted.segments.iter().find(|it| it.entry.id == there.entry.id);
            let Some(segment) = segment else {
                ipc::remove(Family::Memory, there.entry.id)?;
                continue;
            };
            let id = segment.entry.id;
            ipc::set_permissions(Family::Memory, id, permissions(&segment.entry, id_base))?;
            if segment.locked {
                ipc::lock_memory(id)?;
            }
            if segment.removed && !there.removed {
                ipc::remove(Family::Memory, id)?;
            }
        }
        raise_limits(wanted)?;
        rebuild_sets(&wanted.semaphores, id_base)?;
        wanted.queues.iter().try_for_each(|queue| rebuild_queue(queue, id_base))?;
        let mailboxes = mailbox::rebuild(&wanted.mailboxes, id_base)?;
        // What exists may be beyond a limit that was lowered since.
        for (name, text) in &wanted.limits {
            set_limit(name, text)?;
        }
        Ok(mailboxes)
    })
}

/// Makes room for what there is, which may be beyond the limits of a new namespace and, where they
/// were lowered since, beyond those of the VE. What the host's administrator may do without being
/// limited, a lesser root may not.
fn raise_limits(wanted: &Ipc) -> io::Result<()> {
    let mailboxes = |of: fn(&Mailbox) -> i64| wanted.mailboxes.iter().map(of).max();
    let queues = |of: fn(&MessageQueue) -> u64| wanted.queues.iter().map(of).max();
    let longest = |queue: &MessageQueue| {
        queue.messages.iter().map(|(_, text)| text.len() as u64).max().unwrap_or(0)
    };
    let there = [
        ("fs/mqueue/msg_max", mailboxes(|it| it.messages_max).map(i64::cast_unsigned)),
        ("fs/mqueue/msgsize_max", mailboxes(|it| it.size_max).map(i64::cast_unsigned)),
        ("kernel/msgmnb", queues(|it| it.bytes_max)),
        ("kernel/msgmax", queues(longest)),
    ];
    let there = there.into_iter().filter_map(|(name, most)| Some((name, most?.to_string())));
    let limits = wanted.limits.iter().map(|(name, text)| (name.as_str(), text.clone()));
    for (name, needed) in limits.filter(|(name, _)| LIMITS.contains(name)).chain(there) {
        let Ok(now) = fs::read_to_string(limit_path(name)) else { continue };
        if let Some(raised) = raised(&now, &needed) {
            write_limit(&limit_path(name), &raised)?;
        }
    }
    Ok(())
}

/// The larger of each number of a limit, some of which have several; nothing if all stay.
fn raised(now: &str, needed: &str) -> Option<String> {
    let numbers =
        |text: &str| text.split_whitespace().map(str::parse).collect::<Result<Vec<u64>, _>>();
    let (now, needed) = (numbers(now).ok()?, numbers(needed).ok()?);
    let most: Vec<u64> = now.iter().zip(&needed).map(|(now, needed)| *now.max(needed)).collect();
    let text = |most: &[u64]| most.iter().map(u64::to_string).collect::<Vec<_>>().join(" ");
    (most != now).then(|| text(&most))
}

fn set_limit(name: &str, text: &str) -> io::Result<()> {
    let path = limit_path(name);
    if !LIMITS.contains(&name) || fs::read_to_string(&path).is_ok_and(|now| now == text) {
        return Ok(());
    }
    write_limit(&path, text)
}

/// Only root of the namespace may set its limits, whoever else has all capabilities.
fn write_limit(path: &str, text: &str) -> io::Result<()> {
    let root = fs::metadata(path)?;
    identity::own_new_files(root.uid(), root.gid())?;
    identity::act_as(root.uid(), root.gid(), || fs::write(path, text))
}

fn rebuild_queue(queue: &MessageQueue, id_base: u32) -> io::Result<()> {
    let entry = queue.entry;
    let id = as_creator(&entry, id_base, || {
        numbered("msg", entry.id, || ipc::make_messages(entry.key))
    })?;
    if ipc::queue_limit(id)? != queue.bytes_max {
        ipc::set_queue_limit(id, queue.bytes_max)?;
    }
    for (kind, text) in &queue.messages {
        ipc::send_message(id, *kind, text)?;
    }
    ipc::set_permissions(Family::Messages, id, permissions(&entry, id_base))
}
