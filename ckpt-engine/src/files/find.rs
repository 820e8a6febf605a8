//! Which descriptors there are, and which of them are one open file description.
//!
//! Every descriptor is fetched; descriptions are told apart by their inode first and by kcmp(2)
//! where inodes are shared (all eventfds have one, and so has a file that is open twice).

use std::{
    borrow::Cow,
    cmp::Ordering,
    collections::{BTreeMap, HashMap},
    fs, io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
    sync::Arc,
};

use ckpt_format::{blocker::Blocker, files::FileId, process::Descriptor};
use nix::errno::Errno;

use super::{
    Holder, Source,
    info::{Directory, Info},
    tables::{self, Entry},
    tcp,
};
use crate::{
    beside,
    sys::descriptor::{self, Query, Status},
};

/// One open file description of the VE.
#[derive(Debug)]
pub(super) struct Object {
    /// Our own descriptor for it.
    pub(super) fd: Arc<OwnedFd>,
    /// Its inode.
    pub(super) status: Status,
    /// `F_GETFL`.
    pub(super) flags: i32,
    /// What `/proc/PID/fd` shows.
    pub(super) link: Vec<u8>,
    /// Who holds it: the place in [`Source::processes`] and the number there. Empty for one that
    /// is only in flight in a socket's queue.
    pub(super) holders: Vec<(usize, i32)>,
    /// A TCP socket that was seen in the kernel's records, and what they tell beside its number.
    pub(super) tcp: Option<tcp::Told>,
    /// Its fdinfo as one of its holders sees it, read when it was found.
    info: Option<Info>,
}

impl Object {
    /// The descriptor, borrowed.
    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// Its fdinfo. That of a timer is not kept, because reading its time changes it.
    pub(super) fn info(&self) -> io::Result<Cow<'_, Info>> {
        match &self.info {
            Some(info) => Ok(Cow::Borrowed(info)),
            None => Info::of(self.fd()).map(Cow::Owned),
        }
    }

    /// `S_IFMT` of the mode.
    pub(super) fn file_type(&self) -> u32 {
        self.status.mode & libc::S_IFMT
    }

    /// Which object the inode is, whatever number of descriptions it has.
    pub(super) fn inode(&self) -> (u64, u64) {
        (self.status.device, self.status.inode)
    }

    /// Whether it is a socket in whose queue descriptors are.
    pub(super) fn holds_files(&self) -> bool {
        self.file_type() == libc::S_IFSOCK
            && self.tcp.is_none()
            && self.info().and_then(|info| info.number("scm_fds", 10)).is_ok_and(|count| count > 0)
    }

    /// What stands in the link after `anon_inode:`.
    pub(super) fn anonymous(&self) -> Option<&[u8]> {
        self.link.strip_prefix(b"anon_inode:")
    }

    /// Opened with `O_PATH`, so nothing can be done with it but naming it.
    pub(super) fn is_path_only(&self) -> bool {
        self.flags & libc::O_PATH != 0
    }
}

/// Why one object cannot be moved.
#[derive(Debug)]
pub(super) struct Refusal {
    /// What it is.
    pub(super) object: String,
    /// What the operator can do.
    pub(super) hint: String,
}

impl Refusal {
    /// A refusal in plain words.
    pub(super) fn new(object: impl Into<String>, hint: impl Into<String>) -> Self {
        Self { object: object.into(), hint: hint.into() }
    }
}

impl From<io::Error> for Refusal {
    fn from(error: io::Error) -> Self {
        Self::new(format!("an object that could not be read: {error}"), "try again, or close it")
    }
}

impl From<Errno> for Refusal {
    fn from(error: Errno) -> Self {
        io::Error::from(error).into()
    }
}

/// All descriptions, and the tables that refer to them.
#[derive(Debug, Default)]
pub(super) struct Found {
    /// The place is the [`FileId`].
    pub(super) objects: Vec<Object>,
    /// By process number inside the VE.
    pub(super) tables: BTreeMap<i32, Vec<Descriptor>>,
    /// What is said of locks: at which description, by which holder under which number.
    pub(super) locked: Vec<(usize, usize, i32, Info)>,
    /// What is seen of the sockets of each process of [`Source::processes`].
    pub(super) seen: Vec<tcp::Seen>,
    /// Descriptions of one inode in the order of kcmp(2).
    by_inode: HashMap<(u64, u64), Vec<u32>>,
    /// Descriptions by where the kernel keeps them, as far as it has told.
    by_file: HashMap<u64, FileId>,
}

impl Found {
    /// Looks at every process.
    pub(super) fn of(source: &Source<'_>) -> Result<Self, Vec<Blocker>> {
        let mut found = Self::default();
        let mut blockers = Vec::new();
        found.seen.resize_with(source.processes.len(), tcp::Seen::default);
        let stopped = source.stopped_ns;
        let mut told = stopped.map_or_else(HashMap::new, |_| tables::read(source.init));
        for (place, holder) in source.processes.iter().enumerate() {
            let told = told.remove(&holder.host_pid);
            // Of a large table nothing was told.
            let untold = stopped.filter(|_| told.is_none());
            let seen = untold.map(|_| tcp::Seen::whole(holder.host_pid, stopped));
            if let Err(error) = found.add_process(place, holder, told, seen, stopped) {
                blockers.push(Blocker {
                    pid: holder.pid,
                    command: holder.command.clone(),
                    fd: None,
                    object: format!("a descriptor table that could not be read: {error}"),
                    hint: "try again".to_owned(),
                });
            }
        }
        if blockers.is_empty() { Ok(found) } else { Err(blockers) }
    }

    /// Adds the table of a process, which the kernel may have told, or which was seen.
    fn add_process(
        &mut self,
        holder_place: usize,
        holder: &Holder<'_>,
        told: Option<Vec<Entry>>,
        seen: Option<tcp::Seen>,
        stopped_ns: Option<i64>,
    ) -> io::Result<()> {
        let mut table = Vec::new();
        let mut unknown = Vec::new();
        match told.or_else(|| seen.as_ref()?.table()) {
            Some(entries) => {
                for entry in entries {
                    let file = self.by_file.get(&entry.file).filter(|_| entry.unlocked);
                    let Some(&file) = file else {
                        unknown.push((entry.fd, Some(entry.file)));
                        continue;
                    };
                    self.objects[file.0 as usize].holders.push((holder_place, entry.fd));
                    let Entry { fd, close_on_exec, .. } = entry;
                    table.push(Descriptor { fd, file, close_on_exec });
                }
            }
            None => match numbers(holder.host_pid) {
                // A process that has ended meanwhile, or is a zombie, holds nothing.
                Err(error) if has_ended(&error) => {}
                numbers => unknown.extend(numbers?.into_iter().map(|fd| (fd, None))),
            },
        }
        if stopped_ns.is_none() {
            tcp::prepare(unknown.len());
        }
        if !unknown.is_empty() {
            let count = unknown.len();
            let seen = seen.unwrap_or_else(|| tcp::Seen::of(holder.host_pid, count, stopped_ns));
            self.fetch_all(holder_place, holder, unknown, seen, &mut table)?;
        }
        table.sort_unstable_by_key(|descriptor| descriptor.fd);
        self.tables.insert(holder.pid, table);
        Ok(())
    }

    /// Fetches descriptors of a process, each with where the kernel keeps it if that is told.
    fn fetch_all(
        &mut self,
        holder_place: usize,
        holder: &Holder<'_>,
        unknown: Vec<(i32, Option<u64>)>,
        seen: tcp::Seen,
        table: &mut Vec<Descriptor>,
    ) -> io::Result<()> {
        let directory = match Directory::of_process(holder.host_pid) {
            Err(error) if has_ended(&error) => return Ok(()),
            other => other?,
        };
        let fetched = beside::each(&unknown, |&(fd, _)| fetch(holder, &directory, &seen, fd));
        for ((fd, kept_at), fetched) in unknown.into_iter().zip(fetched) {
            let Some(Fetched { fd: fetched, status, told }) = fetched? else { continue };
            let known = self.objects.len();
            let tcp = if let About::Tcp(told) = &told { Some(*told) } else { None };
            let file = self.add_with(fetched, status, tcp)?;
            let place = file.0 as usize;
            let object = &mut self.objects[place];
            object.holders.push((holder_place, fd));
            let close_on_exec = match told {
                About::Tcp(told) => told.closes,
                About::All(info) => {
                    if info.all("lock").next().is_some() {
                        self.locked.push((place, holder_place, fd, info.clone()));
                    }
                    let flags = info.number("flags", 8)?;
                    if place == known {
                        object.info = Some(info);
                    }
                    flags & u64::from(libc::O_CLOEXEC.cast_unsigned()) != 0
                }
            };
            self.by_file.extend(kept_at.map(|at| (at, file)));
            table.push(Descriptor { fd, file, close_on_exec });
        }
        self.seen[holder_place] = seen;
        Ok(())
    }

    /// Adds a descriptor of ours, or finds the description that it is one more of.
    pub(super) fn add(&mut self, fd: OwnedFd) -> io::Result<FileId> {
        let status = descriptor::status(fd.as_fd())?;
        self.add_with(fd, status, None)
    }

    fn add_with(
        &mut self,
        fd: OwnedFd,
        status: Status,
        tcp: Option<tcp::Told>,
    ) -> io::Result<FileId> {
        let bucket = self.by_inode.entry((status.device, status.inode)).or_default();
        let objects = &self.objects;
        let mut failure = None;
        let place = bucket.binary_search_by(|&id| {
            let other = objects[id as usize].fd.as_fd();
            descriptor::compare(other, fd.as_fd()).unwrap_or_else(|error| {
                failure = Some(error);
                Ordering::Equal
            })
        });
        if let Some(error) = failure {
            return Err(error);
        }
        match place {
            Ok(place) => Ok(FileId(bucket[place])),
            Err(place) => {
                let id = u32::try_from(objects.len()).map_err(io::Error::other)?;
                let flags = match tcp.and_then(|told| told.flags) {
                    Some(flags) => flags,
                    None => descriptor::query(fd.as_fd(), Query::GetFlags)?,
                };
                // The links of sockets tell nothing but their inode, those of their nodes do.
                let nothing = is_socket(&status) && flags & libc::O_PATH == 0;
                let link = if nothing { Vec::new() } else { own_link(fd.as_fd())? };
                bucket.insert(place, id);
                let (fd, holders, info) = (Arc::new(fd), Vec::new(), None);
                self.objects.push(Object { fd, status, flags, link, holders, tcp, info });
                Ok(FileId(id))
            }
        }
    }

    /// The descriptions of one inode.
    pub(super) fn of_inode(&self, inode: (u64, u64)) -> &[u32] {
        self.by_inode.get(&inode).map_or(&[], Vec::as_slice)
    }

    /// The description that a process has under a number.
    pub(super) fn in_table(&self, pid: i32, fd: i32) -> Option<FileId> {
        let table = self.tables.get(&pid)?;
        let place = table.binary_search_by_key(&fd, |descriptor| descriptor.fd).ok()?;
        Some(table[place].file)
    }

    /// Whether descriptors are in flight: more is found when the queues are read, which happens only
    /// while the VE stands still.
    pub(super) fn any_in_flight(&self) -> bool {
        self.objects.iter().any(Object::holds_files)
    }

    /// Turns a refusal into a blocker for each process that holds the object.
    pub(super) fn blockers(&self, source: &Source<'_>, id: usize, why: &Refusal) -> Vec<Blocker> {
        let blocker = |pid, command: &str, fd| Blocker {
            pid,
            command: command.to_owned(),
            fd,
            object: why.object.clone(),
            hint: why.hint.clone(),
        };
        let holders = &self.objects[id].holders;
        if holders.is_empty() {
            // In flight: nobody holds it, and init is as good an address as any.
            return vec![blocker(1, "in a socket's queue", None)];
        }
        let holder = |&(place, fd): &(usize, i32)| {
            let process = &source.processes[place];
            blocker(process.pid, &process.command, Some(fd))
        };
        holders.iter().map(holder).collect()
    }
}

/// A descriptor of ours for what a process has under a number, and its inode.
struct Fetched {
    fd: OwnedFd,
    status: Status,
    told: About,
}

/// What is known of the number.
enum About {
    /// Of a TCP socket nothing else is of interest.
    Tcp(tcp::Told),
    All(Info),
}

/// None for a descriptor that has been closed meanwhile, as it can be at any moment in a running VE.
fn fetch(
    holder: &Holder<'_>,
    directory: &Directory,
    seen: &tcp::Seen,
    fd: i32,
) -> io::Result<Option<Fetched>> {
    let gone = |error: &io::Error| error.raw_os_error() == Some(libc::EBADF) || has_ended(error);
    let fetched = match descriptor::fetch(holder.pidfd, fd) {
        Err(error) if gone(&error) => return Ok(None),
        other => other?,
    };
    // In a VE that stands still it is what was seen.
    if let Some((status, told)) = seen.at_rest(fd) {
        return Ok(Some(Fetched { fd: fetched, status, told: About::Tcp(told) }));
    }
    let status = descriptor::status(fetched.as_fd())?;
    if let Some(told) = seen.told(fd, status.inode).filter(|_| is_socket(&status)) {
        return Ok(Some(Fetched { fd: fetched, status, told: About::Tcp(told) }));
    }
    // What has no inode of its own is described there, and nowhere else; so are locks.
    let describes = matches!(status.mode & libc::S_IFMT, 0 | libc::S_IFREG | libc::S_IFDIR);
    let info = match if describes { directory.whole(fd) } else { directory.head(fd) } {
        Ok(head) if !describes && head.all("lock").next().is_some() => directory.whole(fd),
        other => other,
    };
    match info {
        Err(error) if has_ended(&error) => Ok(None),
        info => Ok(Some(Fetched { fd: fetched, status, told: About::All(info?) })),
    }
}

fn is_socket(status: &Status) -> bool {
    status.mode & libc::S_IFMT == libc::S_IFSOCK
}

fn numbers(host_pid: i32) -> io::Result<Vec<i32>> {
    let mut numbers = Vec::new();
    for entry in fs::read_dir(format!("/proc/{host_pid}/fd"))? {
        numbers.extend(entry?.file_name().to_str().and_then(|name| name.parse::<i32>().ok()));
    }
    numbers.sort_unstable();
    Ok(numbers)
}

fn has_ended(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ESRCH))
}

/// What our own `/proc/self/fd` shows for a descriptor.
pub(super) fn own_link(fd: BorrowedFd<'_>) -> io::Result<Vec<u8>> {
    use std::os::unix::ffi::OsStringExt;
    let link = fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd()))?;
    Ok(link.into_os_string().into_vec())
}
