//! Descriptors of other processes, and what fcntl(2), kcmp(2) and statx(2) tell about a file.

use std::{
    cell::Cell,
    cmp::Ordering,
    ffi::CString,
    io, mem,
    os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd},
};

fn check(value: libc::c_long) -> io::Result<i32> {
    if value < 0 { Err(io::Error::last_os_error()) } else { Ok(value as i32) }
}

/// Takes ownership of a descriptor number that the kernel has just returned.
pub(super) fn own(value: libc::c_long) -> io::Result<OwnedFd> {
    let fd = check(value)?;
    // SAFETY: the kernel has just made this descriptor for us, so nobody else owns the number.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// pidfd_getfd(2): another descriptor for the same open file description.
pub fn fetch(pidfd: BorrowedFd<'_>, fd: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: the call takes three integers and touches no memory of ours.
    own(unsafe { libc::syscall(libc::SYS_pidfd_getfd, pidfd.as_raw_fd(), fd, 0) })
}

/// pidfd_open(2); `thread` asks for `PIDFD_THREAD`.
pub fn open_process(pid: i32, thread: bool) -> io::Result<OwnedFd> {
    let flags = if thread { libc::O_EXCL } else { 0 };
    // SAFETY: the call takes two integers and touches no memory of ours.
    own(unsafe { libc::syscall(libc::SYS_pidfd_open, pid, flags) })
}

fn order(value: libc::c_long) -> io::Result<Ordering> {
    match check(value)? {
        0 => Ok(Ordering::Equal),
        1 => Ok(Ordering::Less),
        2 => Ok(Ordering::Greater),
        _ => Err(io::ErrorKind::InvalidData.into()),
    }
}

/// kcmp(2): a total order of open file descriptions; equal means one description.
pub fn compare(left: BorrowedFd<'_>, right: BorrowedFd<'_>) -> io::Result<Ordering> {
    const KCMP_FILE: i32 = 0;
    let me = std::process::id();
    let (left, right) = (left.as_raw_fd(), right.as_raw_fd());
    // SAFETY: the call takes five integers and touches no memory of ours.
    order(unsafe { libc::syscall(libc::SYS_kcmp, me, me, KCMP_FILE, left, right) })
}

/// Whether `file` is the `nth` entry added under `number` to the epoll set.
///
/// `NotFound` means that there is no such entry.
pub fn is_epoll_target(
    file: BorrowedFd<'_>,
    epoll: BorrowedFd<'_>,
    number: i32,
    nth: u32,
) -> io::Result<bool> {
    const KCMP_EPOLL_TFD: i32 = 7;
    let me = std::process::id();
    // struct kcmp_epoll_slot.
    let slot: [u32; 3] = [epoll.as_raw_fd().cast_unsigned(), number.cast_unsigned(), nth];
    // SAFETY: the kernel reads one kcmp_epoll_slot, three u32, which `slot` is.
    let value = unsafe {
        libc::syscall(libc::SYS_kcmp, me, me, KCMP_EPOLL_TFD, file.as_raw_fd(), slot.as_ptr())
    };
    Ok(order(value)? == Ordering::Equal)
}

/// What statx(2) tells about an open file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Status {
    /// The device that holds the inode.
    pub device: u64,
    /// The inode number.
    pub inode: u64,
    /// Type and permission bits.
    pub mode: u32,
    /// Names left.
    pub links: u32,
    /// Owner, as the host numbers users.
    pub uid: u32,
    /// Group, as the host numbers groups.
    pub gid: u32,
    /// The size in bytes.
    pub size: u64,
    /// The device that a device node stands for.
    pub special: u64,
    /// The mount through which it was opened.
    pub mount: u64,
}

fn statx(directory: RawFd, path: &CString, flags: i32) -> io::Result<Status> {
    // SAFETY: statx is plain integers, for which all zero is a valid value.
    let mut buffer: libc::statx = unsafe { mem::zeroed() };
    let mask = libc::STATX_BASIC_STATS | libc::STATX_MNT_ID;
    // SAFETY: `path` is NUL-terminated and `buffer` has the size that the kernel writes.
    check(libc::c_long::from(unsafe {
        libc::statx(directory, path.as_ptr(), flags, mask, &raw mut buffer)
    }))?;
    Ok(Status {
        device: libc::makedev(buffer.stx_dev_major, buffer.stx_dev_minor),
        inode: buffer.stx_ino,
        mode: u32::from(buffer.stx_mode),
        links: buffer.stx_nlink,
        uid: buffer.stx_uid,
        gid: buffer.stx_gid,
        size: buffer.stx_size,
        special: libc::makedev(buffer.stx_rdev_major, buffer.stx_rdev_minor),
        mount: buffer.stx_mnt_id,
    })
}

/// statx(2) of an open file.
pub fn status(fd: BorrowedFd<'_>) -> io::Result<Status> {
    statx(fd.as_raw_fd(), &CString::default(), libc::AT_EMPTY_PATH)
}

/// statx(2) of a path, without following a last symbolic link.
pub fn status_of_path(path: &[u8]) -> io::Result<Status> {
    let path = CString::new(path).map_err(|_| io::ErrorKind::InvalidInput)?;
    statx(libc::AT_FDCWD, &path, libc::AT_SYMLINK_NOFOLLOW)
}

/// The fcntl(2) commands that take and give an integer.
#[derive(Clone, Copy, Debug)]
#[expect(missing_docs, reason = "the names are those of the commands")]
pub enum Query {
    GetFlags,
    GetSignal,
    GetPipeSize,
    GetSeals,
}

/// fcntl(2) without an argument.
pub fn query(fd: BorrowedFd<'_>, query: Query) -> io::Result<i32> {
    let command = match query {
        Query::GetFlags => libc::F_GETFL,
        Query::GetSignal => F_GETSIG,
        Query::GetPipeSize => libc::F_GETPIPE_SZ,
        Query::GetSeals => libc::F_GET_SEALS,
    };
    // SAFETY: these commands take no argument and touch no memory of ours.
    check(libc::c_long::from(unsafe { libc::fcntl(fd.as_raw_fd(), command) }))
}

/// The fcntl(2) commands that change something by an integer.
#[derive(Clone, Copy, Debug)]
#[expect(missing_docs, reason = "the names are those of the commands")]
pub enum Change {
    SetFlags,
    SetOwner,
    SetSignal,
    SetPipeSize,
    AddSeals,
}

const F_SETSIG: i32 = 10;
const F_GETSIG: i32 = 11;
const F_GETOWN_EX: i32 = 16;

/// fcntl(2) with an integer.
pub fn change(fd: BorrowedFd<'_>, change: Change, value: i32) -> io::Result<()> {
    let command = match change {
        Change::SetFlags => libc::F_SETFL,
        Change::SetOwner => libc::F_SETOWN,
        Change::SetSignal => F_SETSIG,
        Change::SetPipeSize => libc::F_SETPIPE_SZ,
        Change::AddSeals => libc::F_ADD_SEALS,
    };
    // SAFETY: these commands take an integer and touch no memory of ours.
    check(libc::c_long::from(unsafe { libc::fcntl(fd.as_raw_fd(), command, value) })).map(drop)
}

/// Another descriptor of the same file, the first one that is free from `lowest` on.
pub fn duplicate(fd: BorrowedFd<'_>, lowest: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: the command takes an integer and touches no memory of ours.
    own(libc::c_long::from(unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_DUPFD_CLOEXEC, lowest) }))
}

/// `F_GETLEASE`: `F_RDLCK`, `F_WRLCK`, or none.
pub fn lease(fd: BorrowedFd<'_>) -> io::Result<Option<i32>> {
    const F_GETLEASE: i32 = 1025;
    // SAFETY: this command takes no argument.
    let lease = check(libc::c_long::from(unsafe { libc::fcntl(fd.as_raw_fd(), F_GETLEASE) }))?;
    Ok((lease != libc::F_UNLCK).then_some(lease))
}

/// `F_GET_RW_HINT`: how long the data written to a file are expected to live; 0 is not set.
pub fn write_hint(fd: BorrowedFd<'_>) -> io::Result<u64> {
    const F_GET_RW_HINT: i32 = 1035;
    let mut hint = 0u64;
    // SAFETY: the kernel writes one u64, which `hint` is.
    check(libc::c_long::from(unsafe {
        libc::fcntl(fd.as_raw_fd(), F_GET_RW_HINT, &raw mut hint)
    }))?;
    Ok(hint)
}

/// `F_SET_RW_HINT`.
pub fn set_write_hint(fd: BorrowedFd<'_>, hint: u64) -> io::Result<()> {
    const F_SET_RW_HINT: i32 = 1036;
    // SAFETY: the kernel reads one u64, which `hint` is.
    let set = unsafe { libc::fcntl(fd.as_raw_fd(), F_SET_RW_HINT, &raw const hint) };
    check(libc::c_long::from(set)).map(drop)
}

/// The magic number of the file system that an open file is on (fstatfs(2)).
pub fn file_system(fd: BorrowedFd<'_>) -> io::Result<i64> {
    // SAFETY: statfs is plain integers, for which all zero is a valid value.
    let mut found: libc::statfs = unsafe { mem::zeroed() };
    // SAFETY: the kernel writes one statfs, which `found` is.
    check(libc::c_long::from(unsafe { libc::fstatfs(fd.as_raw_fd(), &raw mut found) }))?;
    Ok(found.f_type)
}

/// The wait status of a process that has been collected, by its pidfd (Linux 6.15).
pub fn exit_status(pidfd: BorrowedFd<'_>) -> io::Result<i32> {
    const PIDFD_INFO_EXIT: u64 = 1 << 3;
    const PIDFD_GET_INFO: libc::c_ulong = 0xc040_ff0b;
    /// Where struct pidfd_info has its `exit_code`.
    const EXIT_CODE: usize = 15;
    // struct pidfd_info in its first size, 64 bytes; the mask comes first.
    let mut info = [0u32; 16];
    info[0] = PIDFD_INFO_EXIT as u32;
    // SAFETY: the kernel reads and writes 64 bytes, which `info` has.
    check(libc::c_long::from(unsafe {
        libc::ioctl(pidfd.as_raw_fd(), PIDFD_GET_INFO, info.as_mut_ptr())
    }))?;
    if u64::from(info[0]) & PIDFD_INFO_EXIT == 0 {
        return Err(io::ErrorKind::Unsupported.into());
    }
    Ok(info[EXIT_CODE].cast_signed())
}

/// `F_GETOWN_EX`: the kind of owner and its number in our own pid namespace; 0 is none.
pub fn signal_owner(fd: BorrowedFd<'_>) -> io::Result<(i32, i32)> {
    // struct f_owner_ex.
    let mut owner = [0i32; 2];
    // SAFETY: the kernel writes one f_owner_ex, two i32, which `owner` is.
    check(libc::c_long::from(unsafe {
        libc::fcntl(fd.as_raw_fd(), F_GETOWN_EX, owner.as_mut_ptr())
    }))?;
    Ok((owner[0], owner[1]))
}

/// The ioctl(2) requests that write one integer.
#[derive(Clone, Copy, Debug)]
pub enum Count {
    /// Bytes that can be read (`FIONREAD`, `SIOCINQ`).
    Readable,
    /// Bytes written and not acknowledged or not read by the peer (`SIOCOUTQ`).
    Outstanding,
    /// Bytes written and not sent (`SIOCOUTQNSD`).
    Unsent,
    /// Whether an urgent byte comes next (`SIOCATMARK`): 0 or 1.
    AtMark,
}

/// Asks for one of the counts.
pub fn count(fd: BorrowedFd<'_>, count: Count) -> io::Result<u32> {
    const SIOCATMARK: libc::c_ulong = 0x8905;
    const SIOCOUTQNSD: libc::c_ulong = 0x894B;
    let request = match count {
        Count::Readable => libc::FIONREAD,
        Count::Outstanding => libc::TIOCOUTQ,
        Count::Unsent => SIOCOUTQNSD,
        Count::AtMark => SIOCATMARK,
    };
    let mut value = 0i32;
    // SAFETY: these requests write one i32, which `value` is.
    check(libc::c_long::from(unsafe { libc::ioctl(fd.as_raw_fd(), request, &raw mut value) }))?;
    Ok(value.cast_unsigned())
}

/// tee(2) without blocking: copies what is in one pipe into another, and consumes nothing.
pub fn tee(from: BorrowedFd<'_>, to: BorrowedFd<'_>, length: usize) -> io::Result<usize> {
    // SAFETY: the call takes integers only and touches no memory of ours.
    let copied =
        unsafe { libc::tee(from.as_raw_fd(), to.as_raw_fd(), length, libc::SPLICE_F_NONBLOCK) };
    usize::try_from(copied).map_err(|_| io::Error::last_os_error())
}

/// vmsplice(2): puts the first page of a mapping into a pipe, the page itself and no copy of it.
pub fn give_page(pipe: &OwnedFd, mapping: &super::vm::SharedMapping) -> io::Result<()> {
    let (start, end) = mapping.range();
    let len = usize::try_from(end - start).unwrap_or(usize::MAX).min(4096);
    let piece = libc::iovec { iov_base: start as *mut libc::c_void, iov_len: len };
    // SAFETY: the kernel reads one `iovec`, which names memory that lives as long as the mapping;
    // the pipe keeps a reference to the page of its own.
    let given =
        unsafe { libc::vmsplice(pipe.as_raw_fd(), &raw const piece, 1, libc::SPLICE_F_NONBLOCK) };
    if usize::try_from(given) == Ok(len) { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Gives the calling thread a file system context (root, working directory, umask) of its own.
pub fn unshare_directories() -> io::Result<()> {
    // SAFETY: the call takes one integer; only the calling thread's own context is copied.
    check(libc::c_long::from(unsafe { libc::unshare(libc::CLONE_FS) })).map(drop)
}

/// setns(2) of the calling thread.
pub fn enter(namespace: BorrowedFd<'_>, kind: i32) -> io::Result<()> {
    // SAFETY: the call takes two integers and touches no memory of ours.
    check(libc::c_long::from(unsafe { libc::setns(namespace.as_raw_fd(), kind) })).map(drop)
}

/// A file system with nothing in it that is mounted nowhere: its root directory.
pub fn detached_tmpfs() -> io::Result<OwnedFd> {
    const FSCONFIG_CMD_CREATE: libc::c_uint = 6;
    let name = c"tmpfs";
    // SAFETY: `name` is NUL-terminated and only read.
    let context = own(unsafe {
        libc::syscall(libc::SYS_fsopen, name.as_ptr(), 1 /* FSOPEN_CLOEXEC */)
    })?;
    let raw = context.as_raw_fd();
    // SAFETY: this command takes no key and no value.
    check(unsafe {
        libc::syscall(
            libc::SYS_fsconfig,
            raw,
            FSCONFIG_CMD_CREATE,
            std::ptr::null::<libc::c_char>(),
            std::ptr::null::<libc::c_void>(),
            0,
        )
    })?;
    // SAFETY: the call takes three integers and touches no memory of ours.
    own(unsafe {
        libc::syscall(libc::SYS_fsmount, raw, 1 /* FSMOUNT_CLOEXEC */, 0)
    })
}

/// A descriptor table of the calling thread's own, in which files can have any number.
///
/// The thread loses all other descriptors, so it must be a thread that was made for this and
/// uses nothing but what it fetches from the table that it left.
#[derive(Debug)]
pub struct ScratchTable {
    /// All numbers below are taken.
    filled: Cell<RawFd>,
    owner: RawFd,
    epoll: RawFd,
}

impl ScratchTable {
    /// Leaves the shared table, which `me` (a pidfd of our own process) still leads to.
    /// Numbers up to `highest` are free afterwards.
    pub fn leave_shared_table(me: BorrowedFd<'_>, highest: RawFd) -> io::Result<Self> {
        // SAFETY: the call takes one integer; the thread gets a copy of the table, in which all
        // numbers stay valid.
        check(libc::c_long::from(unsafe { libc::unshare(libc::CLONE_FILES) }))?;
        // Two numbers above all that will be placed: ours, and the epoll set's.
        let epoll = highest + 1;
        let owner = epoll + 1;
        // It may be there already, which dup3(2) takes for a mistake.
        if me.as_raw_fd() != owner {
            let flags = libc::O_CLOEXEC;
            // SAFETY: the number is open in the copy, and the target is unused or the copy's own.
            check(libc::c_long::from(unsafe { libc::dup3(me.as_raw_fd(), owner, flags) }))?;
        }
        // SAFETY: the table is this thread's own, and nothing in it is used by number but `owner`.
        check(unsafe { libc::syscall(libc::SYS_close_range, 0, epoll, 0) })?;
        // SAFETY: as above, for the numbers behind `owner`.
        check(unsafe { libc::syscall(libc::SYS_close_range, owner + 1, u32::MAX, 0) })?;
        Ok(Self { filled: Cell::new(0), owner, epoll })
    }

    /// Brings a file of the shared table in under `number`.
    fn place(&self, shared: RawFd, number: RawFd) -> io::Result<()> {
        // The kernel gives the lowest that is free: with little to fill up in front it is the right
        // one at once.
        const GAP_MAX: RawFd = 8;
        let gap = number.saturating_sub(self.filled.get());
        if (0..=GAP_MAX).contains(&gap) {
            for _ in 0..gap {
                // SAFETY: the call takes one integer; the copy is in the thread's own table.
                check(libc::c_long::from(unsafe { libc::dup(self.owner) }))?;
            }
            self.filled.set(number.max(self.filled.get()));
        }
        // SAFETY: the call takes three integers; `owner` stays open in this table.
        let temporary =
            check(unsafe { libc::syscall(libc::SYS_pidfd_getfd, self.owner, shared, 0) })?;
        if temporary == number {
            self.filled.set(self.filled.get().max(number + 1));
            return Ok(());
        }
        // SAFETY: both numbers are in the thread's own table, where nobody else uses them.
        let placed =
            check(libc::c_long::from(unsafe { libc::dup3(temporary, number, libc::O_CLOEXEC) }));
        // SAFETY: `temporary` was made above and is not used again.
        unsafe { libc::close(temporary) };
        placed.map(drop)
    }

    /// Chooses the epoll set (by its number in the shared table) that [`Self::add`] adds to.
    pub fn select(&self, shared_epoll: RawFd) -> io::Result<()> {
        self.place(shared_epoll, self.epoll)
    }

    /// `EPOLL_CTL_ADD` of a file of the shared table, as if it had the descriptor `number`.
    pub fn add(&self, shared: RawFd, number: RawFd, events: u32, data: u64) -> io::Result<()> {
        if !(0..self.epoll).contains(&number) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        self.place(shared, number)?;
        let mut event = libc::epoll_event { events, u64: data };
        // SAFETY: `event` lives across the call, and both numbers are open in this table.
        let added = check(libc::c_long::from(unsafe {
            libc::epoll_ctl(self.epoll, libc::EPOLL_CTL_ADD, number, &raw mut event)
        }));
        // SAFETY: `number` was placed above, in the thread's own table.
        unsafe { libc::close(number) };
        added.map(drop)
    }
}

/// flock(2) without waiting.
pub fn lock_description(fd: BorrowedFd<'_>, exclusive: bool) -> io::Result<()> {
    let operation = if exclusive { libc::LOCK_EX } else { libc::LOCK_SH } | libc::LOCK_NB;
    // SAFETY: the call takes two integers and touches no memory of ours.
    check(libc::c_long::from(unsafe { libc::flock(fd.as_raw_fd(), operation) })).map(drop)
}

/// `F_OFD_SETLK`, with `struct flock` as bytes.
pub fn lock_range(fd: BorrowedFd<'_>, lock: &[u8; 32]) -> io::Result<()> {
    // Aligned as struct flock.
    let words = lock.as_chunks::<8>().0.iter().map(|chunk| u64::from_ne_bytes(*chunk));
    let words: Vec<u64> = words.collect();
    // SAFETY: the kernel reads one struct flock, 32 bytes, which `words` holds.
    check(libc::c_long::from(unsafe {
        libc::fcntl(fd.as_raw_fd(), libc::F_OFD_SETLK, words.as_ptr())
    }))
    .map(drop)
}
