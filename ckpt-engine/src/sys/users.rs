//! User namespaces: whose they are, and processes that are in one for a moment.

use std::{
    ffi::CStr,
    io::{self, PipeReader, PipeWriter, Read, Write},
    os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd},
};

use nix::fcntl::readlinkat;

use super::check;

const NS_GET_USERNS: libc::Ioctl = 0xb701;
const NS_GET_PARENT: libc::Ioctl = 0xb702;
const NS_GET_OWNER_UID: libc::Ioctl = 0xb704;

pub(super) fn related(namespace: BorrowedFd<'_>, request: libc::Ioctl) -> io::Result<OwnedFd> {
    // SAFETY: the request takes no argument.
    let fd = check(libc::c_long::from(unsafe { libc::ioctl(namespace.as_raw_fd(), request) }))?;
    let fd = RawFd::try_from(fd).map_err(io::Error::other)?;
    // SAFETY: a new descriptor that nobody else knows.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// The user namespace that a namespace of another kind belongs to.
pub fn owner(namespace: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    related(namespace, NS_GET_USERNS)
}

/// The namespace that a user namespace is in.
pub fn parent(users: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    related(users, NS_GET_PARENT)
}

/// Who made a user namespace, as the caller numbers users.
pub fn creator(users: BorrowedFd<'_>) -> io::Result<u32> {
    let mut user = 0u32;
    let argument = &raw mut user;
    // SAFETY: the kernel writes one `uid_t` to where the argument points.
    let result = unsafe { libc::ioctl(users.as_raw_fd(), NS_GET_OWNER_UID, argument) };
    check(libc::c_long::from(result))?;
    Ok(user)
}

/// A child of the caller that does nothing but be there. It ends with this.
#[derive(Debug)]
pub struct Visitor(libc::pid_t);

impl Visitor {
    /// Its number, as the caller counts.
    pub fn pid(&self) -> i32 {
        self.0
    }
}

impl Drop for Visitor {
    fn drop(&mut self) {
        // SAFETY: integers only; a child of ours that has not been waited for.
        unsafe { libc::kill(self.0, libc::SIGKILL) };
        let _ = nix::sys::wait::waitpid(nix::unistd::Pid::from_raw(self.0), None);
    }
}

/// Forks a child that runs `work`, tells whether it worked, and waits to be killed.
///
/// # Safety
/// `work` makes system calls only: the caller may have other threads, and the child has not.
pub(super) unsafe fn visitor(
    work: impl FnOnce(&PipeWriter) -> io::Result<()>,
) -> io::Result<(Visitor, PipeReader)> {
    let (mut reader, mut writer) = io::pipe()?;
    // SAFETY: the child makes system calls only, see above.
    let pid = check(libc::c_long::from(unsafe { libc::fork() }))?;
    if pid == 0 {
        let code = match work(&writer) {
            Ok(()) => 0,
            Err(error) => error.raw_os_error().unwrap_or(libc::EIO),
        };
        // SAFETY: integers only. After the change of user, which would take it back.
        unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL, 0, 0, 0) };
        // Nobody to tell if the reader is gone.
        let _ = writer.write_all(&code.to_ne_bytes());
        loop {
            // SAFETY: no arguments; ends with the process.
            unsafe { libc::pause() };
        }
    }
    let visitor = Visitor(libc::pid_t::try_from(pid).map_err(io::Error::other)?);
    drop(writer);
    let mut code = [0; 4];
    reader.read_exact(&mut code)?;
    match i32::from_ne_bytes(code) {
        0 => Ok((visitor, reader)),
        code => Err(io::Error::from_raw_os_error(code)),
    }
}

fn join(namespace: RawFd, kind: libc::c_int) -> io::Result<()> {
    // SAFETY: no pointers; the descriptor is open.
    check(libc::c_long::from(unsafe { libc::setns(namespace, kind) })).map(drop)
}

/// A process in a user namespace.
pub fn visit(users: BorrowedFd<'_>) -> io::Result<Visitor> {
    let users = users.as_raw_fd();
    // SAFETY: one system call.
    Ok(unsafe { visitor(|_| join(users, libc::CLONE_NEWUSER)) }?.0)
}

/// Does something as root of a user namespace, by a child.
///
/// # Safety
/// `work` makes system calls only: the caller may have other threads, and the child has not.
pub(super) unsafe fn act_in(
    users: BorrowedFd<'_>,
    work: impl FnOnce() -> io::Result<()>,
) -> io::Result<()> {
    let users = users.as_raw_fd();
    let inside = |_: &PipeWriter| {
        join(users, libc::CLONE_NEWUSER)?;
        work()
    };
    // SAFETY: one system call, and what the caller does.
    unsafe { visitor(inside) }.map(drop)
}

/// Which of the mounts at `points` of a mount namespace the root of its user namespace may not
/// take away. Tried on a copy that is gone afterwards; `points` come in the order in which they
/// can be taken away.
pub fn locked_mounts(
    users: BorrowedFd<'_>,
    mounts: BorrowedFd<'_>,
    points: &[&CStr],
) -> io::Result<Vec<bool>> {
    let (users, mounts) = (users.as_raw_fd(), mounts.as_raw_fd());
    let mut locked = vec![false; points.len()];
    let (mut reader, mut writer) = io::pipe()?;
    let work = |_: &PipeWriter| {
        join(users, libc::CLONE_NEWUSER)?;
        join(mounts, libc::CLONE_NEWNS)?;
        // SAFETY: no pointers.
        check(libc::c_long::from(unsafe { libc::unshare(libc::CLONE_NEWNS) }))?;
        let flags = libc::MS_PRIVATE | libc::MS_REC;
        let none = std::ptr::null();
        // SAFETY: the one string is terminated; nothing is mounted, so the others may be absent.
        check(libc::c_long::from(unsafe {
            libc::mount(none, c"/".as_ptr(), none, flags, std::ptr::null())
        }))?;
        for point in points {
            let flags = libc::MNT_DETACH | libc::UMOUNT_NOFOLLOW;
            // SAFETY: the string is terminated and lives through the call.
            let result = unsafe { libc::umount2(point.as_ptr(), flags) };
            writer.write_all(&[u8::from(result != 0)])?;
        }
        Ok(())
    };
    // More answers than a pipe holds would wait for a reader that waits for the child.
    if points.len() > 4096 {
        return Err(io::ErrorKind::ArgumentListTooLong.into());
    }
    // SAFETY: system calls only, on strings that were made before.
    let (_visitor, _) = unsafe { visitor(work) }?;
    for locked in &mut locked {
        let mut answer = [0];
        reader.read_exact(&mut answer)?;
        *locked = answer[0] != 0;
    }
    Ok(locked)
}

/// A child of a process with one thread, which has done something and waits.
#[derive(Debug)]
pub struct Helper {
    pid: libc::pid_t,
    /// Its number as `/proc` of the host has it.
    pub host: i32,
    go: Option<PipeWriter>,
}

impl Drop for Helper {
    fn drop(&mut self) {
        drop(self.go.take());
        let _ = nix::sys::wait::waitpid(nix::unistd::Pid::from_raw(self.pid), None);
    }
}

impl Helper {
    /// Forks a child that does the work, and keeps it until this is dropped. `proc` is the top of
    /// the host's `/proc`.
    ///
    /// Refused in a process with more than one thread: the child could meet a lock that a thread
    /// it does not have will never release.
    pub fn start(proc: BorrowedFd<'_>, work: impl FnOnce() -> io::Result<()>) -> io::Result<Self> {
        use nix::{dir::Dir, fcntl::OFlag, sys::stat::Mode};
        let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        let threads = Dir::openat(proc, "self/task", flags, Mode::empty())?.into_iter();
        // Itself, and the two names that every directory has.
        if threads.count() != 3 {
            return Err(io::ErrorKind::ResourceBusy.into());
        }
        let ((mut told, tell), (wait, go)) = (io::pipe()?, io::pipe()?);
        // SAFETY: this process has exactly one thread, as checked above, so no lock is held by a
        // thread that is missing in the child.
        let pid = check(libc::c_long::from(unsafe { libc::fork() }))?;
        if pid == 0 {
            drop(go);
            help(proc, work, tell, wait);
        }
        drop((tell, wait));
        let pid = libc::pid_t::try_from(pid).map_err(io::Error::other)?;
        let mut this = Self { pid, host: 0, go: Some(go) };
        let mut answer = [0; 8];
        told.read_exact(&mut answer)?;
        let word = |at: usize| i32::from_ne_bytes(std::array::from_fn(|index| answer[at + index]));
        this.host = word(4);
        match word(0) {
            0 => Ok(this),
            code => Err(io::Error::from_raw_os_error(code)),
        }
    }
}

/// The life of a helper.
fn help(
    proc: BorrowedFd<'_>,
    work: impl FnOnce() -> io::Result<()>,
    mut tell: PipeWriter,
    mut wait: PipeReader,
) -> ! {
    let done = || {
        work()?;
        let host = readlinkat(proc.as_fd(), "self")?;
        let host = host.to_str().and_then(|host| host.parse::<i32>().ok());
        host.ok_or_else(|| io::Error::from(io::ErrorKind::InvalidData))
    };
    let (code, host) = match done() {
        Ok(host) => (0, host),
        Err(error) => (error.raw_os_error().unwrap_or(libc::EIO), 0),
    };
    // Whoever asked may be gone; then the next read ends at once.
    let _ = tell.write_all(&[code.to_ne_bytes(), host.to_ne_bytes()].concat());
    let _ = wait.read(&mut [0]);
    // SAFETY: `_exit` never returns and touches no memory.
    unsafe { libc::_exit(0) }
}
