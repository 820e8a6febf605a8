//! The whole rebuild: in which order descriptions are made, and what follows when the new
//! processes have them.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
    sync::{Mutex, PoisonError},
    time::Instant,
};

use ckpt_format::{
    files::{File, FileId, Files, Kind},
    process::Descriptor,
};
use nix::{
    errno::Errno,
    fcntl::{OFlag, open, openat},
    sys::stat::Mode,
};

use super::{
    Argument, Remote, deleted, epoll, event, fanotify, frames, inotify, interpreters, lock,
    mailbox, memfd, nameless, nsfs, path, pipe, process, socket, spent::Spent, tcp, terminal,
    timer, tun, unix, watched,
};
use crate::{
    beside,
    sys::{
        descriptor::{self, Change},
        identity, namespace,
    },
};

/// Where files are rebuilt.
#[derive(Debug)]
pub struct Target {
    /// The host's number of the VE's user and group 0.
    pub id_base: u32,
    /// The new processes: number inside the VE, number on the host.
    pub processes: HashMap<i32, i32>,
    /// The memfds and files without a name by [`ckpt_format::memory::SharedObject::id`], with
    /// their contents, open for reading and writing.
    pub shared: HashMap<u64, OwnedFd>,
    /// The message queues of each IPC namespace, in the order of
    /// [`ckpt_format::ipc::Ipc::mailboxes`].
    pub mailboxes: Vec<Vec<OwnedFd>>,
    /// How far CLOCK_MONOTONIC of the source's host is ahead of ours.
    pub ahead_ns: i64,
    /// The mount namespaces of the VE, its own first; empty if there is no other.
    pub mounts: Vec<OwnedFd>,
    /// The namespaces that are there for programs, by kind and number.
    pub namespaces: HashMap<(&'static str, u32), OwnedFd>,
    /// What only a task of the VE can open, by the place in [`Files::files`]: see
    /// [`open_inside`].
    pub opened: HashMap<usize, OwnedFd>,
    /// The network namespaces of the VE, as its mount namespaces.
    pub networks: Vec<OwnedFd>,
    /// The connections that are there already. The rebuild takes them.
    pub early: Mutex<tcp::Early>,
    /// Our own `/proc/self/fd`, which the VE's mounts do not show.
    descriptors: OwnedFd,
    /// Our own `/proc`.
    pub(super) proc: OwnedFd,
}

impl Target {
    /// To be made *before* the thread enters the namespaces of the VE.
    pub fn new(id_base: u32) -> io::Result<Self> {
        let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        Ok(Self {
            id_base,
            processes: HashMap::new(),
            shared: HashMap::new(),
            mailboxes: Vec::new(),
            ahead_ns: 0,
            mounts: Vec::new(),
            namespaces: HashMap::new(),
            opened: HashMap::new(),
            networks: Vec::new(),
            early: Mutex::default(),
            descriptors: open("/proc/self/fd", flags, Mode::empty())?,
            proc: open("/proc", flags, Mode::empty())?,
        })
    }

    /// Our own `/proc/self/fd`.
    pub(super) fn descriptors(&self) -> BorrowedFd<'_> {
        self.descriptors.as_fd()
    }

    /// Another description of the same file, with the access and status flags of `flags`.
    pub(super) fn reopen(&self, fd: BorrowedFd<'_>, flags: u32) -> io::Result<OwnedFd> {
        let lasting = OFlag::O_ACCMODE
            | OFlag::O_APPEND
            | OFlag::O_NONBLOCK
            | OFlag::O_DIRECT
            | OFlag::O_SYNC
            | OFlag::O_DSYNC
            | OFlag::O_NOATIME
            | OFlag::O_PATH;
        let flags = OFlag::from_bits_truncate(flags.cast_signed()) & lasting;
        let name = fd.as_raw_fd().to_string();
        let flags = flags | OFlag::O_CLOEXEC | OFlag::O_NOCTTY;
        Ok(openat(&self.descriptors, name.as_str(), flags, Mode::empty())?)
    }
}

/// Why files could not be rebuilt.
#[derive(Debug, thiserror::Error)]
pub enum RebuildError {
    /// A name cannot be opened.
    #[error("cannot open {path}")]
    Open {
        /// The path inside the VE.
        path: String,
        /// Why.
        source: io::Error,
    },
    /// A name shows something of another type than on the source.
    #[error("{path} is not what it was on the source")]
    Changed {
        /// The path inside the VE.
        path: String,
    },
    /// The kernel does not make or set an object.
    #[error("cannot rebuild a {object}")]
    Kernel {
        /// The kind of object.
        object: &'static str,
        /// Why.
        source: io::Error,
    },
    /// A file cannot be tied to its network link.
    #[error("cannot attach a file to the network link {name}")]
    Link {
        /// The link's name.
        name: String,
        /// Why.
        source: io::Error,
    },
    /// A task of the VE could not do its part.
    #[error("process {pid} cannot set up its {object}")]
    Remote {
        /// The process inside the VE.
        pid: i32,
        /// The kind of object.
        object: &'static str,
        /// Why.
        source: Errno,
    },
    /// The captured state refers to something that is not in it.
    #[error("the captured files contradict themselves")]
    Damaged,
}

/// A path for messages.
pub(super) fn lossy(path: &[u8]) -> String {
    String::from_utf8_lossy(path).into_owned()
}

/// A rebuild at work.
#[derive(Debug)]
pub(super) struct Rebuild<'a> {
    pub(super) files: &'a Files,
    pub(super) target: &'a Target,
    pub(super) pipes: pipe::Pipes,
    /// What has no name any more, by the place in [`Files::nodes`].
    pub(super) nodes: HashMap<u32, OwnedFd>,
    pub(super) terminals: terminal::Terminals,
    /// The memfds whose first description is given out.
    pub(super) taken: HashSet<u64>,
    pub(super) made: Vec<Option<OwnedFd>>,
    /// By the place in `made`.
    pub(super) connections: Vec<(usize, tcp::Connection)>,
    /// What is of no use any more.
    pub(super) spent: Vec<File>,
    pub(super) early: tcp::Early,
    /// Ends of unix sockets whose peers are gone, by the end that is left.
    pub(super) gone: HashMap<u32, OwnedFd>,
    /// The mount and the network namespace that the thread is in.
    entered: u32,
    network: u32,
}

/// The rebuilt descriptions, before the VE runs.
#[derive(Debug)]
pub struct Rebuilt {
    made: Vec<Option<OwnedFd>>,
    /// See [`path::late_offset`], by the place in `made`.
    late_offsets: Vec<(usize, u64)>,
    connections: Vec<(usize, tcp::Connection)>,
    spent: Vec<File>,
}

/// Our descriptors of a VE that runs and has its own. Closing thousands takes a moment, which nobody
/// should wait for; as long as they are there nobody sees that the VE has closed something.
#[derive(Debug)]
pub struct Released {
    _made: Vec<Option<OwnedFd>>,
    _spent: Vec<File>,
}

/// Opens from inside what shows who has opened it, for [`Target::opened`]. `init` is a pidfd of
/// the VE's pid 1.
pub fn open_inside(
    files: &Files,
    init: &OwnedFd,
    remote: &mut dyn Remote,
) -> Result<HashMap<usize, OwnedFd>, RebuildError> {
    interpreters::rebuild(&files.interpreters, remote)?;
    let mut opened = HashMap::new();
    for (place, file) in files.files.iter().enumerate() {
        let inside = match &file.kind {
            Kind::Path(named) => path::open_inside(named, file, init, remote)?,
            Kind::Fanotify { flags, event_flags, .. } => {
                Some(fanotify::make((*flags, *event_flags), init, remote)?)
            }
            _ => None,
        };
        if let Some(inside) = inside {
            opened.insert(place, inside);
        }
    }
    Ok(opened)
}

/// Makes all files of `files`.
///
/// Runs on a thread of its own that has entered the mount, network, UTS and IPC namespaces of
/// the rebuilt VE, in which the processes exist already. Nothing leaves the VE's network before
/// [`Rebuilt::release`].
pub fn rebuild(files: &Files, target: &Target) -> Result<Rebuilt, RebuildError> {
    let mut rebuild = Rebuild {
        files,
        target,
        pipes: HashMap::new(),
        nodes: HashMap::new(),
        terminals: HashMap::new(),
        taken: HashSet::new(),
        made: files.files.iter().map(|_| None).collect(),
        connections: Vec::new(),
        spent: Vec::new(),
        early: std::mem::take(&mut *target.early.lock().unwrap_or_else(PoisonError::into_inner)),
        gone: HashMap::new(),
        entered: 0,
        network: 0,
    };
    identity::own_new_files(target.id_base, target.id_base)
        .map_err(|source| RebuildError::Kernel { object: "file owner", source })?;
    socket::rebuild(&mut rebuild)?;
    let mut spent = Spent::new("rebuilt");
    for (place, file) in files.files.iter().enumerate() {
        let start = Instant::now();
        if rebuild.made[place].is_none() {
            let opened = target.opened.get(&place).map(OwnedFd::try_clone);
            rebuild.made[place] = Some(match opened {
                Some(opened) => {
                    let opened = opened.map_err(|source| RebuildError::Kernel {
                        object: "file that a process opened",
                        source,
                    })?;
                    rebuild.complete(file, opened)?
                }
                None => {
                    rebuild.enter(file.mounts)?;
                    rebuild.make(file)?
                }
            });
        }
        spent.add(&file.kind, start.elapsed());
    }
    drop(spent);
    rebuild.enter(0)?;
    rebuild.enter_network(0)?;
    terminal::settle(&mut rebuild)?;
    unix::fill(&mut rebuild)?;
    for (made, file) in rebuild.made.iter().zip(&files.files) {
        let Some(fd) = made else { continue };
        lock::rebuild(fd.as_fd(), &file.locks)?;
        if file.write_hint != 0 {
            descriptor::set_write_hint(fd.as_fd(), file.write_hint)
                .map_err(|source| RebuildError::Kernel { object: "file", source })?;
        }
    }
    epoll::fill(&rebuild)?;
    inotify::fill(&rebuild)?;
    let Rebuild { made, connections, spent, .. } = rebuild;
    let late = |file: &File| match &file.kind {
        Kind::Path(named) => path::late_offset(named),
        _ => None,
    };
    let places = files.files.iter().enumerate();
    let late_offsets = places.filter_map(|(place, file)| Some((place, late(file)?))).collect();
    Ok(Rebuilt { made, late_offsets, connections, spent })
}

impl Rebuild<'_> {
    /// The description that was made for this id.
    pub(super) fn made(&self, file: FileId) -> Option<BorrowedFd<'_>> {
        Some(self.made.get(file.0 as usize)?.as_ref()?.as_fd())
    }

    /// Goes into a mount namespace, where the paths of a file lead to it.
    fn enter(&mut self, mounts: u32) -> Result<(), RebuildError> {
        if mounts == self.entered {
            return Ok(());
        }
        let namespace = usize::try_from(mounts).ok().and_then(|at| self.target.mounts.get(at));
        let namespace = namespace.ok_or(RebuildError::Damaged)?;
        namespace::join(namespace.as_fd(), libc::CLONE_NEWNS)
            .map_err(|source| RebuildError::Kernel { object: "mount namespace", source })?;
        self.entered = mounts;
        Ok(())
    }

    /// Goes into a network namespace, for the sockets that belong there.
    pub(super) fn enter_network(&mut self, network: u32) -> Result<(), RebuildError> {
        if network == self.network {
            return Ok(());
        }
        let namespace = usize::try_from(network).ok().and_then(|at| self.target.networks.get(at));
        let namespace = namespace.ok_or(RebuildError::Damaged)?;
        namespace::join(namespace.as_fd(), libc::CLONE_NEWNET)
            .map_err(|source| RebuildError::Kernel { object: "network namespace", source })?;
        self.network = network;
        Ok(())
    }

    /// Does the rest to what a task of the VE has opened.
    fn complete(&mut self, file: &File, opened: OwnedFd) -> Result<OwnedFd, RebuildError> {
        if let Kind::Fanotify { marks, .. } = &file.kind {
            self.enter(file.mounts)?;
            fanotify::mark(&opened, marks)?;
            set_status(opened.as_fd(), file.flags)
                .map_err(|source| RebuildError::Kernel { object: "file", source })?;
        }
        Ok(opened)
    }

    fn make(&mut self, file: &File) -> Result<OwnedFd, RebuildError> {
        let fd = match &file.kind {
            Kind::Path(named) => return path::rebuild(self.target, named, file.flags),
            Kind::Tun(tun) => {
                self.enter_network(file.network)?;
                let made = tun::rebuild(self.target, tun, file.flags);
                self.enter_network(0)?;
                return made;
            }
            Kind::Deleted { object, offset } => {
                return deleted::rebuild(self, *object, *offset, file.flags);
            }
            Kind::DeletedDirectory { path } => {
                return deleted::rebuild_directory(path, file.flags);
            }
            Kind::DeletedNode { node } => return nameless::rebuild(self, *node, file.flags),
            Kind::Mailbox { namespace, mailbox } => {
                return mailbox::rebuild(self, (*namespace, *mailbox), file.flags);
            }
            Kind::Namespace { name, pid, number } => {
                return nsfs::rebuild(self.target, name, *pid, *number);
            }
            Kind::Memfd { object, offset } => {
                return memfd::rebuild(self, *object, *offset, file.flags);
            }
            Kind::Pipe { pipe } => return pipe::rebuild(self, *pipe, file.flags),
            Kind::PtyMaster { terminal } => {
                return terminal::rebuild(self, *terminal, true, file.flags);
            }
            Kind::PtySlave { terminal, .. } => {
                return terminal::rebuild(self, *terminal, false, file.flags);
            }
            Kind::Event(event) => event::rebuild_event(*event)?,
            Kind::Signal { mask } => event::rebuild_signal(*mask)?,
            Kind::Timer(timer) => timer::rebuild(timer, self.target.ahead_ns)?,
            Kind::Epoll { busy_poll, .. } => epoll::make(*busy_poll)?,
            Kind::Inotify { watches } => inotify::rebuild(watches)?,
            Kind::Process { pid, thread, .. } => process::rebuild(self.target, *pid, *thread)?,
            Kind::GoneProcess { status, thread } => {
                process::rebuild_gone(self.target, *status, *thread)?
            }
            // Sockets are made before, because they refer to each other.
            _ => return Err(RebuildError::Damaged),
        };
        set_status(fd.as_fd(), file.flags)
            .map_err(|source| RebuildError::Kernel { object: "file", source })?;
        Ok(fd)
    }
}

/// The flags of objects that are not opened by a name.
pub(super) fn set_status(fd: BorrowedFd<'_>, flags: u32) -> io::Result<()> {
    let status = flags.cast_signed() & libc::O_NONBLOCK;
    if status != 0 { descriptor::change(fd, Change::SetFlags, status) } else { Ok(()) }
}

impl Rebuilt {
    /// The descriptions by their number, as far as they are held here.
    pub(super) fn made(&self) -> impl Iterator<Item = Option<BorrowedFd<'_>>> {
        self.made.iter().map(|made| made.as_ref().map(AsFd::as_fd))
    }

    /// The description for this id, to be installed in descriptor tables.
    pub fn descriptor(&self, file: FileId) -> Option<BorrowedFd<'_>> {
        Some(self.made.get(file.0 as usize)?.as_ref()?.as_fd())
    }

    /// Does what only tasks of the VE can do. The descriptors are installed; the processes stand
    /// still and have their credentials, sessions and groups.
    pub fn finish(
        &mut self,
        files: &Files,
        tables: &BTreeMap<i32, Vec<Descriptor>>,
        remote: &mut dyn Remote,
    ) -> Result<(), RebuildError> {
        watched::forget_rebuilding(self, files)?;
        unix::finish(files, tables, remote)?;
        terminal::finish(files, tables, remote)?;
        epoll::finish(files, tables, remote)?;
        mailbox::finish(files, tables, remote)?;
        frames::finish(files, tables, remote)?;
        // Before the signals, because whoever takes a lease becomes the owner.
        lock::finish(files, tables, remote)?;
        for (place, file) in files.files.iter().enumerate() {
            if file.owner.is_none() && file.signal == 0 {
                continue;
            }
            let id = FileId(u32::try_from(place).map_err(|_| RebuildError::Damaged)?);
            // One that is only in flight has nobody who could do it.
            let Some((pid, fd)) = holder(tables, id) else { continue };
            set_signal_owner(pid, fd, file, remote)?;
        }
        Ok(())
    }

    /// Lets the network connections go on. The VE runs here from now on.
    ///
    /// A connection that cannot go on is reported and left to its peer; the others go on. Peers that
    /// wait for nothing are not asked whether they are still there, unless `ask_all` says so.
    pub fn release(self, ask_all: bool) -> Released {
        for (place, offset) in self.late_offsets {
            let Some(fd) = &self.made[place] else { continue };
            let offset = i64::try_from(offset).unwrap_or(i64::MAX);
            if let Err(error) = nix::unistd::lseek(fd, offset, nix::unistd::Whence::SeekSet) {
                tracing::warn!(%error, "a half-read file of /proc begins anew");
            }
        }
        beside::each(&self.connections, |(place, connection)| {
            let Some(fd) = &self.made[*place] else { return };
            if let Err(error) = connection.release(fd.as_fd(), ask_all) {
                tracing::error!(%error, "a TCP connection could not go on");
            }
        });
        Released { _made: self.made, _spent: self.spent }
    }
}

/// A process that holds a description, and the number there.
pub(super) fn holder(tables: &BTreeMap<i32, Vec<Descriptor>>, file: FileId) -> Option<(i32, i32)> {
    tables.iter().find_map(|(&pid, table)| {
        let descriptor = table.iter().find(|descriptor| descriptor.file == file)?;
        Some((pid, descriptor.fd))
    })
}

/// A few fcntl(2) calls made by a task of the VE.
fn set_signal_owner(
    pid: i32,
    fd: i32,
    file: &File,
    remote: &mut dyn Remote,
) -> Result<(), RebuildError> {
    const F_SETSIG: u64 = 10;
    const F_SETOWN_EX: u64 = 15;
    let failed = |source| RebuildError::Remote { pid, object: "signal-driven I/O", source };
    let owner_seen = file.owner.and_then(|owner| remote.number(pid, owner.pid));
    let none = || Argument::Value(0);
    let number = || Argument::Value(u64::from(fd.cast_unsigned()));
    let mut fcntl = |command: u64, argument: Argument<'_>| {
        let arguments = [number(), Argument::Value(command), argument, none(), none(), none()];
        remote.call(pid, libc::SYS_fcntl, arguments).map(drop).map_err(failed)
    };
    if let Some(owner) = file.owner {
        let mut bytes = owner.kind.to_ne_bytes().to_vec();
        let seen = owner_seen.ok_or(RebuildError::Remote {
            pid,
            object: "signal-driven I/O",
            source: Errno::ESRCH,
        })?;
        bytes.extend(seen.to_ne_bytes());
        fcntl(F_SETOWN_EX, Argument::In(&bytes))?;
    }
    if file.signal != 0 {
        fcntl(F_SETSIG, Argument::Value(u64::from(file.signal.cast_unsigned())))?;
    }
    if file.flags.cast_signed() & libc::O_ASYNC != 0 {
        fcntl(libc::F_SETFL as u64, Argument::Value(u64::from(file.flags)))?;
    }
    Ok(())
}
