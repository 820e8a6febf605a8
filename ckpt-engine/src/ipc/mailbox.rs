//! POSIX message queues. Those with names are files of a file system that belongs to the IPC
//! namespace; it is looked at whether the VE has mounted it or not.

use std::{
    ffi::CString,
    fs::{self, File},
    io::{self, Read},
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
        unix::{
            ffi::OsStringExt,
            fs::{MetadataExt, OpenOptionsExt, fchown},
        },
    },
    path::Path,
};

use ckpt_format::ipc::{Mailbox, Notify};
use nix::sys::stat::{Mode, fchmod};

use super::as_creator;
use crate::sys::{mailbox, mount::FilesystemContext, namespace::in_ipc_of};

/// `SIGEV_SIGNAL` and `SIGEV_NONE`.
const BY_SIGNAL: i32 = 0;
const SILENTLY: i32 = 1;

/// Priority and text of the messages in one mailbox.
pub(crate) type Letters = Vec<(u32, Vec<u8>)>;

/// The mailboxes of one IPC namespace that we have open ourselves, in the order of
/// [`Ipc::mailboxes`](ckpt_format::ipc::Ipc::mailboxes).
#[derive(Debug)]
pub struct Mailboxes {
    /// The device of their files, which is that of no other namespace; `None` without a file
    /// system for them.
    pub(crate) device: Option<u64>,
    pub(crate) opened: Vec<Opened>,
}

/// A mailbox that we have open ourselves, without blocking.
#[derive(Debug)]
pub(crate) struct Opened {
    /// Its descriptor.
    pub(crate) file: File,
    /// The device and inode that all descriptors of it show.
    pub(crate) inode: (u64, u64),
    /// The process, as numbered on the host, that is told of the next message in a way that
    /// cannot be set up again.
    pub(crate) told_by_thread: Option<i32>,
    /// The process that is told by a signal.
    told: Option<(i32, i32)>,
}

impl Opened {
    /// Looks at one by a path that leads to it.
    pub(crate) fn new(path: &Path) -> io::Result<Self> {
        let file =
            File::options().read(true).write(true).custom_flags(libc::O_NONBLOCK).open(path)?;
        let metadata = file.metadata()?;
        let mut text = String::new();
        (&file).read_to_string(&mut text)?;
        let value = |name: &str| -> i32 {
            let word = text.split_whitespace().find_map(|word| word.strip_prefix(name));
            word.and_then(|word| word.parse().ok()).unwrap_or(0)
        };
        let pid = value("NOTIFY_PID:");
        let (how, signal) = (value("NOTIFY:"), value("SIGNO:"));
        let told = match how {
            _ if pid == 0 => None,
            BY_SIGNAL => Some((pid, signal)),
            SILENTLY => Some((pid, 0)),
            _ => None,
        };
        let told_by_thread = (pid != 0 && told.is_none()).then_some(pid);
        Ok(Self { inode: (metadata.dev(), metadata.ino()), file, told_by_thread, told })
    }

    /// Describes it, without its messages. `inside` gives a process's number in the VE.
    pub(crate) fn describe(
        &self,
        name: Vec<u8>,
        deleted: bool,
        id_base: u32,
    ) -> io::Result<Mailbox> {
        let metadata = self.file.metadata()?;
        let attributes = mailbox::attributes(self.file.as_fd())?;
        let inside = |id: u32| id.checked_sub(id_base).unwrap_or(65534);
        Ok(Mailbox {
            name,
            deleted,
            mode: metadata.mode() & 0o7777,
            uid: inside(metadata.uid()),
            gid: inside(metadata.gid()),
            messages_max: attributes.messages_max,
            size_max: attributes.size_max,
            messages: Vec::new(),
            notify: self.told.map(|(pid, signal)| Notify { pid, signal }),
        })
    }

    /// Whether there is a message in it.
    pub(crate) fn holds_letters(&self) -> io::Result<bool> {
        Ok(mailbox::attributes(self.file.as_fd())?.messages > 0)
    }
}

/// The file system of the calling thread's namespace; `None` in a kernel without one.
fn mounted() -> io::Result<Option<File>> {
    match FilesystemContext::open("mqueue") {
        Ok(context) => Ok(Some(File::from(context.mount(0)?))),
        Err(error) if error.raw_os_error() == Some(libc::ENODEV) => Ok(None),
        Err(error) => Err(error),
    }
}

/// The device of the file system of an IPC namespace.
pub(crate) fn device_of(namespace: BorrowedFd<'_>) -> io::Result<Option<u64>> {
    in_ipc_of(namespace, || mounted()?.map(|root| Ok(root.metadata()?.dev())).transpose())
}

/// The mailboxes of the calling thread's namespace.
pub(super) fn named(id_base: u32) -> io::Result<(Vec<Mailbox>, Mailboxes)> {
    let Some(root) = mounted()? else {
        return Ok((Vec::new(), Mailboxes { device: None, opened: Vec::new() }));
    };
    let device = Some(root.metadata()?.dev());
    let (mut mailboxes, mut all) = (Vec::new(), Vec::new());
    for entry in fs::read_dir(format!("/proc/thread-self/fd/{}", root.as_raw_fd()))? {
        let entry = entry?;
        let opened = Opened::new(&entry.path())?;
        mailboxes.push(opened.describe(entry.file_name().into_vec(), false, id_base)?);
        all.push(opened);
    }
    Ok((mailboxes, Mailboxes { device, opened: all }))
}

/// Takes all messages out of a mailbox whose users stand still, and puts them back in their
/// order: there is no other way to read them. To be done by a process that nobody kills meanwhile.
pub(crate) fn read_letters(file: &OwnedFd) -> io::Result<Letters> {
    let size = usize::try_from(mailbox::attributes(file.as_fd())?.size_max).unwrap_or(0);
    let mut letters = Vec::new();
    let taken = loop {
        match mailbox::receive(file.as_fd(), size) {
            Ok(Some(letter)) => letters.push(letter),
            Ok(None) => break Ok(()),
            Err(error) => break Err(error),
        }
    };
    for (priority, text) in &letters {
        mailbox::send(file.as_fd(), *priority, text)?;
    }
    taken.map(|()| letters)
}

/// Makes mailboxes in the calling thread's namespace; each descriptor does not block.
pub(super) fn rebuild(mailboxes: &[Mailbox], id_base: u32) -> io::Result<Vec<OwnedFd>> {
    let mut made: Vec<Option<OwnedFd>> = mailboxes.iter().map(|_| None).collect();
    // A name that has gone may be another one's now.
    for deleted in [true, false] {
        for (mailbox, made) in mailboxes.iter().zip(&mut made) {
            if mailbox.deleted == deleted {
                *made = Some(rebuild_one(mailbox, id_base)?);
            }
        }
    }
    Ok(made.into_iter().flatten().collect())
}

fn rebuild_one(wanted: &Mailbox, id_base: u32) -> io::Result<OwnedFd> {
    let name = CString::new(wanted.name.clone()).map_err(|_| io::ErrorKind::InvalidInput)?;
    let entry = ckpt_format::ipc::Entry {
        creator_uid: wanted.uid,
        creator_gid: wanted.gid,
        ..Default::default()
    };
    let made =
        as_creator(&entry, id_base, || mailbox::make(&name, wanted.messages_max, wanted.size_max))?;
    for (priority, text) in &wanted.messages {
        mailbox::send(made.as_fd(), *priority, text)?;
    }
    fchown(&made, Some(id_base + wanted.uid), Some(id_base + wanted.gid))?;
    fchmod(made.as_fd(), Mode::from_bits_truncate(wanted.mode & 0o7777))?;
    if wanted.deleted {
        mailbox::unlink(&name)?;
    }
    Ok(made)
}
