//! The whole capture: which kind each description is, in which order they are read, and what has
//! to be put back afterwards.

use std::{
    collections::{BTreeMap, HashMap},
    fs, io,
    os::fd::AsFd,
    time::Instant,
};

use ckpt_format::{
    blocker::Blocker,
    files::{File, Files, Kind, SignalOwner},
    ipc::Notify,
    memory::SharedObject,
    process::Descriptor,
};

use super::{
    Holder, Source, anonymous, deleted, epoll, event, fanotify,
    find::{Found, Object, Refusal},
    inotify, interpreters, lock, mailbox, memfd, nameless, nsfs, path, pipe, places, process,
    socket::{self, Protocol},
    spent::Spent,
    tables, tcp, terminal, timer, tun, udp, unix,
};
use crate::{
    beside,
    ipc::{self, Mailboxes},
    sys::{
        descriptor::{self, Query},
        task,
    },
    unnamed,
};

/// What [`capture`] has read.
#[derive(Debug)]
pub struct Captured {
    /// The files.
    pub files: Files,
    /// The descriptor table of each process by its number inside the VE.
    pub tables: BTreeMap<i32, Vec<Descriptor>>,
    /// The contents of [`Files::unnamed`], to be read.
    pub contents: Vec<(SharedObject, fs::File)>,
    /// The message queues of each IPC namespace, by its number. Their messages are still to be
    /// read.
    pub mailboxes: Vec<Mailboxes>,
    /// Puts the originals back as they were, if they are to run on.
    pub undo: Undo,
}

/// Puts back what the capture had to change in sockets and terminals of the VE.
///
/// Dropping it puts everything back, so that no error path leaves a connection stuck.
/// [`Undo::seal`] is for the one case in which the originals must die in silence.
#[derive(Debug, Default)]
pub struct Undo {
    pub(super) queues: Vec<tcp::Taken>,
    pub(super) connections: Vec<tcp::Repaired>,
    pub(super) terminals: Vec<terminal::Drained>,
    pub(super) datagrams: Vec<udp::Seen>,
    pub(super) frames: Vec<tun::Taken>,
}

impl Undo {
    /// The originals will not run again: connections stay in repair mode, so that closing them
    /// tells their peers nothing. The last descriptors that we hold are closed.
    pub fn seal(mut self) {
        self.queues.drain(..).for_each(tcp::Taken::seal);
        self.connections.drain(..).for_each(tcp::Repaired::seal);
        self.terminals.drain(..).for_each(terminal::Drained::seal);
        self.datagrams.drain(..).for_each(udp::Seen::seal);
        self.frames.drain(..).for_each(tun::Taken::seal);
    }

    /// Puts this back as well.
    pub(super) fn hold(&mut self, held: tcp::Held) {
        match held {
            tcp::Held::Nothing => {}
            tcp::Held::Connection(repaired) => self.connections.push(repaired),
            tcp::Held::Queue(taken) => self.queues.push(taken),
        }
    }

    /// Undoes all but what was done to connections: somebody else has put those right, and they
    /// have moved on since.
    pub fn spare_connections(mut self) {
        self.connections.drain(..).for_each(tcp::Repaired::seal);
    }
}

/// Ends what a daemon left behind that died between [`capture`] and the end of its [`Undo`].
/// Returns how many connections had to be mended.
pub fn mend(source: &Source<'_>) -> Result<usize, Vec<Blocker>> {
    let found = Found::of(source)?;
    let sockets = found.objects.iter().filter(|object| socket::is_tcp(object));
    Ok(sockets.filter(|object| tcp::mend(object).unwrap_or(false)).count())
}

/// The kinds of descriptions, as far as they can be told without reading them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Class {
    ByPath,
    Deleted,
    DeletedDirectory,
    DeletedNode,
    Namespace,
    Mailbox,
    Memfd,
    Pipe,
    Event,
    Timer,
    Signal,
    Epoll,
    Inotify,
    Fanotify,
    Process,
    Terminal(terminal::Side),
    Tun,
    Socket(Protocol),
}

/// A capture at work.
#[derive(Debug)]
pub(super) struct Capture<'a> {
    pub(super) source: &'a Source<'a>,
    pub(super) found: Found,
    pub(super) files: Files,
    /// The contents of [`Files::unnamed`].
    contents: Vec<(SharedObject, fs::File)>,
    pub(super) mailboxes: Vec<Mailboxes>,
    /// Places in [`Files::pipes`] by inode.
    pub(super) pipes: HashMap<(u64, u64), u32>,
    /// Places in [`Files::nodes`] by inode.
    pub(super) nodes: HashMap<(u64, u64), u32>,
    /// Places in [`Files::terminals`] by number.
    pub(super) terminals: HashMap<u32, u32>,
    /// The mounts of the VE, each with its namespace.
    mounts: HashMap<u64, u32>,
    pub(super) networks: socket::Networks,
    pub(super) undo: Undo,
}

/// Reads all open files of frozen processes.
///
/// The caller has stopped the network of the VE before, so that connections are quiet.
pub fn capture(source: &Source<'_>) -> Result<Captured, Vec<Blocker>> {
    let mut capture = Capture::new(source)?;
    capture.read_ipcs()?;
    capture.files.interpreters = interpreters::capture(source.init)
        .map_err(|error| unreadable_part("what runs files of other kinds", &error))?;
    let mut blockers = Vec::new();
    let mut connections = capture.read_connections().into_iter();
    let mut spent = Spent::new("captured");
    let mut queues = capture.read_queues();
    // The list can still grow: what is in flight can be a socket with a queue that was not read.
    let mut place = 0;
    while place < capture.found.objects.len() {
        let start = Instant::now();
        let connection = connections.next().flatten().map(|read| {
            read.map(|(file, held)| {
                capture.undo.hold(held);
                file
            })
        });
        let read = match connection.or_else(|| queues.remove(&place)) {
            Some(read) => read,
            None => capture.read(place),
        };
        match read {
            Ok(file) => {
                spent.add(&file.kind, start.elapsed());
                capture.files.files.push(file);
            }
            Err(why) => {
                blockers.extend(capture.found.blockers(source, place, &why));
                capture.files.files.push(unreadable());
            }
        }
        place += 1;
    }
    drop(spent);
    let told = capture.undo.connections.iter().filter(|it| it.is_told).count();
    let all = capture.undo.connections.len();
    tracing::info!("the kernel's records have told {told} of {all} TCP connections of a VE");
    // What refers to others comes when all others are known.
    for place in 0..capture.found.objects.len() {
        if let Err(why) = capture.refer(place) {
            blockers.extend(capture.found.blockers(source, place, &why));
        }
    }
    match lock::capture(source, &capture.found) {
        Ok(locks) => {
            for (place, locks) in locks.descriptions {
                capture.files.files[place].locks = locks;
            }
            for (place, lease) in locks.leases {
                capture.files.files[place].lease = Some(lease);
            }
            capture.files.record_locks = locks.records;
        }
        Err((place, why)) => blockers.extend(capture.found.blockers(source, place, &why)),
    }
    // No process has these, so they come behind all that somebody has.
    match capture.networks.orphans() {
        Ok(orphans) => capture.files.files.extend(
            orphans
                .into_iter()
                .map(|(network, orphan)| File { network, ..plain(0, Kind::Tcp(Box::new(orphan))) }),
        ),
        Err(error) => tracing::warn!(%error, "closed connections of a VE that still send are lost"),
    }
    if blockers.is_empty() {
        let Capture { files, found, contents, mailboxes, undo, .. } = capture;
        // All our descriptors of pipes and sockets but those in `undo` are closed here: while we
        // hold an end of one nobody can see that the VE has closed it.
        Ok(Captured { files, tables: found.tables, contents, mailboxes, undo })
    } else {
        Err(blockers)
    }
}

/// Names every object that [`capture`] would refuse, without changing anything in a running VE.
pub fn check(source: &Source<'_>) -> Vec<Blocker> {
    let mut blockers = look(source);
    // What comes and goes while it is looked at can seem to belong to nobody.
    for _ in 0..2 {
        if blockers.is_empty() {
            break;
        }
        let again = look(source);
        blockers.retain(|blocker| again.contains(blocker));
    }
    blockers
}

fn look(source: &Source<'_>) -> Vec<Blocker> {
    let capture = match Capture::new(source) {
        Ok(capture) => capture,
        Err(blockers) => return blockers,
    };
    tables::prepare();
    tcp::prepare_for_orphans();
    let objects = capture.found.objects.iter().enumerate();
    let refused = objects.filter_map(|(place, object)| {
        let why = match capture.class(object) {
            Ok(Class::Socket(protocol)) => socket::check_peer(&capture, object, protocol).err()?,
            // Its other end may be in a queue, which is not read before the VE stands still.
            Err(_) if object.file_type() == libc::S_IFIFO && capture.found.any_in_flight() => {
                return None;
            }
            // It is remembered what is found.
            Ok(Class::Inotify) => inotify::capture(&capture.found, object, source.init).err()?,
            Ok(Class::Fanotify) => fanotify::capture(object, source.init).err()?,
            other => other.err()?,
        };
        Some(capture.found.blockers(source, place, &why))
    });
    let mut blockers: Vec<Blocker> = refused.flatten().collect();
    if let Err((place, why)) = lock::capture(source, &capture.found) {
        blockers.extend(capture.found.blockers(source, place, &why));
    }
    blockers.extend(source.processes.iter().filter_map(traced));
    blockers.extend(places::check(source, |mount| capture.is_mounted(mount)));
    blockers
}

/// A process that a debugger holds cannot be held by us.
fn traced(holder: &Holder<'_>) -> Option<Blocker> {
    let status = fs::read_to_string(format!("/proc/{}/status", holder.host_pid)).ok()?;
    let tracer = status.lines().find_map(|line| line.strip_prefix("TracerPid:"))?.trim();
    let tracer: u32 = tracer.parse().ok()?;
    (tracer != 0 && tracer != std::process::id()).then(|| Blocker {
        pid: holder.pid,
        command: holder.command.clone(),
        fd: None,
        object: format!("a process traced by pid {tracer} of the host"),
        hint: "end the debugger (strace, gdb) that holds it".to_owned(),
    })
}

/// Keeps the place of a description that is refused, so that the others keep their numbers.
fn unreadable() -> File {
    plain(0, Kind::Signal { mask: 0 })
}

/// A description without anything that can be put on it.
pub(super) fn plain(flags: u32, kind: Kind) -> File {
    let (mounts, network) = (0, 0);
    File {
        flags,
        owner: None,
        signal: 0,
        locks: Vec::new(),
        lease: None,
        write_hint: 0,
        mounts,
        network,
        kind,
    }
}

impl<'a> Capture<'a> {
    fn new(source: &'a Source<'a>) -> Result<Self, Vec<Blocker>> {
        let mounts = match &source.mounts {
            Some(mounts) => mounts.clone(),
            None => {
                mounts(source.init).map_err(|error| unreadable_part("a mount table", &error))?
            }
        };
        Ok(Self {
            source,
            found: Found::of(source)?,
            files: Files::default(),
            contents: Vec::new(),
            mailboxes: Vec::new(),
            pipes: HashMap::new(),
            nodes: HashMap::new(),
            terminals: HashMap::new(),
            mounts,
            networks: socket::Networks::of(source)
                .map_err(|error| unreadable_part("the network namespaces", &error))?,
            undo: Undo::default(),
        })
    }

    fn class(&self, object: &Object) -> Result<Class, Refusal> {
        if process::is_pidfd(object) {
            return process::capture(self.source, object).map(|_| Class::Process);
        }
        if let Some(name) = object.anonymous() {
            return anonymous::class(name);
        }
        if object.is_path_only() {
            return self.class_of_name(object);
        }
        if nsfs::is_namespace(object) {
            return nsfs::capture(self.source, object).map(|_| Class::Namespace);
        }
        match object.file_type() {
            libc::S_IFREG if memfd::is_memfd(object) => Ok(Class::Memfd),
            libc::S_IFREG if mailbox::is_mailbox(object) => Ok(Class::Mailbox),
            libc::S_IFREG | libc::S_IFDIR => {
                if !object.link.starts_with(b"/") {
                    return Err(unknown(object));
                }
                self.inside_the_mounts(object)?;
                Ok(match deleted::is_deleted(object) {
                    false => Class::ByPath,
                    true if object.file_type() == libc::S_IFDIR => Class::DeletedDirectory,
                    true if deleted::other_name(self, object).is_some() => Class::ByPath,
                    true => Class::Deleted,
                })
            }
            libc::S_IFCHR => {
                if let Some(side) = terminal::side(object) {
                    return terminal::check(&self.found, object, side)
                        .map(|()| Class::Terminal(side));
                }
                if tun::is_tun(object) {
                    return tun::check(&self.networks, object).map(|()| Class::Tun);
                }
                path::check_device(object).map(|()| Class::ByPath)
            }
            libc::S_IFIFO => pipe::check(&self.found, object).map(|()| Class::Pipe),
            libc::S_IFSOCK => {
                let network = self.networks.of_socket(object)?;
                self.networks.protocol(self.source, object, network).map(Class::Socket)
            }
            _ => Err(unknown(object)),
        }
    }

    /// The kind of what is only named (`O_PATH`).
    fn class_of_name(&self, object: &Object) -> Result<Class, Refusal> {
        if memfd::is_memfd(object) {
            return Ok(Class::Memfd);
        }
        self.inside_the_mounts(object)?;
        if !deleted::is_deleted(object) || deleted::other_name(self, object).is_some() {
            return Ok(Class::ByPath);
        }
        match object.file_type() {
            libc::S_IFREG => Ok(Class::Deleted),
            libc::S_IFDIR => Ok(Class::DeletedDirectory),
            libc::S_IFIFO => Ok(Class::Pipe),
            _ if nameless::is_node(object) => Ok(Class::DeletedNode),
            _ => Err(unknown(object)),
        }
    }

    /// Reads what is known by a number or a name in the IPC namespaces of the VE.
    fn read_ipcs(&mut self) -> Result<(), Vec<Blocker>> {
        let failed = |error| unreadable_part("the objects of an IPC namespace", &error);
        let init = task::pidfd_open(self.source.init).map_err(failed)?;
        for namespace in std::iter::once(init.as_fd()).chain(self.source.ipcs.iter().copied()) {
            let (mut ipc, mailboxes) =
                ipc::capture(namespace, self.source.id_base).map_err(failed)?;
            for mailbox in &mut ipc.mailboxes {
                let inside = mailbox.notify.and_then(|notify| self.source.pid_inside(notify.pid));
                mailbox.notify =
                    mailbox.notify.zip(inside).map(|(notify, pid)| Notify { pid, ..notify });
            }
            match self.mailboxes.is_empty() {
                true => self.files.ipc = ipc,
                false => self.files.nested_ipcs.push(ipc),
            }
            self.mailboxes.push(mailboxes);
        }
        Ok(())
    }

    /// Sees to it that the contents of a description are sent; returns under which id.
    pub(super) fn keep_contents(&mut self, id: usize) -> Result<u64, Refusal> {
        let object = &self.found.objects[id];
        // The VE's own may be for writing only, and its offset must stay.
        let file = unnamed::reopen_to_read(&object.fd)?;
        let described = unnamed::describe(&file, &object.link, self.source.id_base)?;
        let id = described.id;
        if self.contents.iter().all(|(known, _)| known.id != id) {
            self.files.unnamed.push(described.clone());
            self.contents.push((described, file));
        }
        Ok(id)
    }

    fn inside_the_mounts(&self, object: &Object) -> Result<(), Refusal> {
        self.is_inside_the_mounts(object.status.mount, &object.link)
    }

    /// The mount namespace of a mount of the VE.
    pub(super) fn mounts_of(&self, mount: u64) -> Option<u32> {
        self.mounts.get(&mount).copied()
    }

    /// Whether this mount is one of the VE.
    pub(super) fn is_mounted(&self, mount: u64) -> bool {
        self.mounts.contains_key(&mount)
    }

    /// Refuses what was reached through a mount that is none of the VE's.
    pub(super) fn is_inside_the_mounts(&self, mount: u64, path: &[u8]) -> Result<(), Refusal> {
        if self.is_mounted(mount) {
            return Ok(());
        }
        let path = String::from_utf8_lossy(path);
        Err(Refusal::new(
            format!("{path}, opened through a mount that init does not see"),
            "close it, or end the command that was started from the host with it",
        ))
    }

    fn refer(&mut self, place: usize) -> Result<(), Refusal> {
        match &self.files.files[place].kind {
            Kind::Epoll { .. } => self.files.files[place].kind = epoll::capture(self, place)?,
            Kind::Unix(_) => {
                let connected = unix::connect(self, place)?;
                if let Kind::Unix(socket) = &mut self.files.files[place].kind {
                    socket.state = connected;
                }
            }
            _ => {}
        }
        Ok(())
    }

    /// Reads the sockets that hold files in flight, by their places. What only a queue holds is
    /// known then: it can be the other end of a pipe that is read before.
    fn read_queues(&mut self) -> HashMap<usize, Result<File, Refusal>> {
        let mut queues = HashMap::new();
        let mut place = 0;
        while place < self.found.objects.len() {
            if self.found.objects[place].holds_files() {
                queues.insert(place, self.read(place));
            }
            place += 1;
        }
        queues
    }

    /// Reads the TCP sockets, of which each tells all by itself and there may be thousands.
    fn read_connections(&self) -> Vec<Option<Result<(File, tcp::Held), Refusal>>> {
        let alike = tcp::Alike::of(&self.found);
        beside::each(&self.found.objects, |object| {
            if object.file_type() != libc::S_IFSOCK || object.is_path_only() {
                return None;
            }
            let (network, read) = match alike.group(object, || self.networks.of_socket(object)) {
                Some((group, sight)) => (group.network, tcp::capture_alike(object, &group, sight)),
                None => {
                    let network = self.networks.of_socket(object).ok()?;
                    match self.networks.protocol(self.source, object, network) {
                        Ok(Protocol::Tcp { v6, multipath }) => {
                            (network, tcp::capture(object, network, v6, multipath, None))
                        }
                        // What is refused is refused by its name later.
                        _ => return None,
                    }
                }
            };
            let described = read
                .and_then(|(kind, held)| Ok((self.described(object, kind, network.number)?, held)));
            Some(described)
        })
    }

    fn read(&mut self, place: usize) -> Result<File, Refusal> {
        let class = self.class(&self.found.objects[place])?;
        let kind = match class {
            Class::ByPath => path::capture(self, place)?,
            Class::Deleted => deleted::capture(self, place)?,
            Class::DeletedDirectory => deleted::capture_directory(&self.found.objects[place]),
            Class::DeletedNode => nameless::capture(self, place)?,
            Class::Namespace => nsfs::capture(self.source, &self.found.objects[place])?,
            Class::Mailbox => mailbox::capture(self, place)?,
            Class::Memfd => memfd::capture(self, place)?,
            Class::Pipe => pipe::capture(self, place)?,
            Class::Event => event::capture_event(&self.found.objects[place])?,
            Class::Signal => event::capture_signal(&self.found.objects[place])?,
            Class::Timer => timer::capture(&self.found.objects[place])?,
            Class::Epoll => Kind::Epoll { entries: Vec::new(), busy_poll: None },
            Class::Inotify => {
                inotify::capture(&self.found, &self.found.objects[place], self.source.init)?
            }
            Class::Fanotify => fanotify::capture(&self.found.objects[place], self.source.init)?,
            Class::Process => process::capture(self.source, &self.found.objects[place])?,
            Class::Terminal(side) => terminal::capture(self, place, side)?,
            Class::Tun => tun::capture(self, place)?,
            Class::Socket(protocol) => socket::capture(self, place, protocol)?,
        };
        let object = &self.found.objects[place];
        let network = match class {
            Class::Socket(_) => self.networks.of_socket(object)?.number,
            Class::Tun => tun::network(&self.networks, object)?.number,
            _ => 0,
        };
        self.described(object, kind, network)
    }

    /// What there is about a description beside its kind.
    fn described(&self, object: &Object, kind: Kind, network: u32) -> Result<File, Refusal> {
        let flags = object.flags.cast_unsigned();
        // What is no file in any mount of the VE is the same everywhere.
        let mounts = self.mounts.get(&object.status.mount).copied().unwrap_or(0);
        if object.is_path_only() {
            return Ok(File { mounts, ..plain(flags, kind) });
        }
        if object.tcp.is_some_and(|told| told.is_unowned) {
            return Ok(File { mounts, network, ..plain(flags, kind) });
        }
        let owner = match descriptor::signal_owner(object.fd())? {
            (_, 0) => None,
            // An owner that is gone gets no signal, which is the same as none.
            (kind, pid) => {
                self.source.owner_inside(kind, pid)?.map(|pid| SignalOwner { kind, pid })
            }
        };
        let signal = descriptor::query(object.fd(), Query::GetSignal)?;
        let write_hint = match object.file_type() {
            libc::S_IFREG => descriptor::write_hint(object.fd()).unwrap_or(0),
            _ => 0,
        };
        Ok(File { owner, signal, write_hint, mounts, network, ..plain(flags, kind) })
    }
}

fn unreadable_part(what: &str, error: &io::Error) -> Vec<Blocker> {
    vec![Blocker {
        pid: 1,
        command: "init".to_owned(),
        fd: None,
        object: format!("{what} that could not be read: {error}"),
        hint: "try again".to_owned(),
    }]
}

fn name(object: &Object) -> String {
    String::from_utf8_lossy(&object.link).into_owned()
}

fn unknown(object: &Object) -> Refusal {
    Refusal::new(
        format!("{}, which cannot be opened again by its name", name(object)),
        "close it, or end the program",
    )
}

/// The ids of the mounts that a process can see.
fn mounts(host_pid: i32) -> io::Result<HashMap<u64, u32>> {
    let table = fs::read_to_string(format!("/proc/{host_pid}/mountinfo"))?;
    Ok(table.lines().filter_map(|line| Some((line.split(' ').next()?.parse().ok()?, 0))).collect())
}
