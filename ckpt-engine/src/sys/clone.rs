//! Creating a process as a sibling, and preparing one for its life as another program.

use std::{
    io,
    os::fd::{AsRawFd, BorrowedFd, FromRawFd, IntoRawFd, OwnedFd, RawFd},
};

/// Which side of [`SingleThreaded::clone_sibling`] this is.
#[derive(Debug)]
pub enum Sibling {
    /// The new process.
    Child,
    /// The caller: the new process's number, and a descriptor for it.
    Caller(i32, OwnedFd),
}

/// Proof that the process had only one thread. Kept honest by its owner, a seed, which starts
/// none.
#[derive(Clone, Copy, Debug)]
pub struct SingleThreaded(());

impl SingleThreaded {
    /// Looks at the process's threads.
    pub fn check() -> io::Result<Self> {
        match std::fs::read_dir("/proc/self/task")?.count() {
            1 => Ok(Self(())),
            _ => Err(io::ErrorKind::Unsupported.into()),
        }
    }

    /// Like fork(2), but the child's parent is the caller's parent, so that the caller can end.
    ///
    /// Only for a process with one thread, because the child would have only one and the
    /// others' locks would stay taken for ever.
    pub fn clone_sibling(self) -> io::Result<Sibling> {
        clone_sibling()
    }
}

fn clone_sibling() -> io::Result<Sibling> {
    let mut pidfd: libc::c_int = -1;
    // SAFETY: an all-zero clone_args is a valid one.
    let mut arguments: libc::clone_args = unsafe { std::mem::zeroed() };
    // The exit signal must be 0 here: it is inherited from the caller.
    arguments.flags = (libc::CLONE_PARENT | libc::CLONE_PIDFD).cast_unsigned().into();
    arguments.pidfd = (&raw mut pidfd).addr() as u64;
    let size = size_of::<libc::clone_args>();
    // SAFETY: the structure lives through the call; without CLONE_VM the child has its own copy
    // of this single-threaded process, as after fork(2).
    let result = unsafe { libc::syscall(libc::SYS_clone3, &raw const arguments, size) };
    match i32::try_from(result) {
        Ok(0) => Ok(Sibling::Child),
        Ok(pid) if pid > 0 => {
            // SAFETY: the kernel has just made this descriptor for us alone.
            Ok(Sibling::Caller(pid, unsafe { OwnedFd::from_raw_fd(pidfd) }))
        }
        _ => Err(io::Error::last_os_error()),
    }
}

/// Closes every descriptor from `first` upwards. For a process that owns nothing above it any
/// more and is about to become another program.
pub fn close_from(first: i32) -> io::Result<()> {
    let first = first.cast_unsigned();
    // SAFETY: no pointers; the caller's values above `first` are leaked on purpose before the
    // process image is replaced, so nothing uses or closes them again.
    match unsafe { libc::syscall(libc::SYS_close_range, first, libc::c_uint::MAX, 0) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Lets every descriptor from `first` upwards end with the next program that this process becomes.
pub fn close_on_exec_from(first: i32) -> io::Result<()> {
    let (first, flags) = (first.cast_unsigned(), libc::CLOSE_RANGE_CLOEXEC);
    // SAFETY: no pointers, and no descriptor is closed before the process image is replaced.
    match unsafe { libc::syscall(libc::SYS_close_range, first, libc::c_uint::MAX, flags) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Moves a descriptor to `number` and closes all others of the process, whoever holds them.
/// The result is closed on exec. For a process that never returns to whoever held the others.
pub fn only_descriptor(descriptor: OwnedFd, number: RawFd) -> io::Result<OwnedFd> {
    let from = descriptor.into_raw_fd();
    if from != number {
        // SAFETY: no pointers; what `number` was is closed on purpose.
        if unsafe { libc::dup3(from, number, libc::O_CLOEXEC) } < 0 {
            return Err(io::Error::last_os_error());
        }
    }
    let below = number.cast_unsigned().wrapping_sub(1);
    if number > 0 {
        // SAFETY: no pointers; see above for what is closed.
        unsafe { libc::syscall(libc::SYS_close_range, 0, below, 0) };
    }
    close_from(number + 1)?;
    // SAFETY: `number` is open, and nothing else in the process owns it any more.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}

/// Sends a signal to the process behind a pidfd.
pub fn signal_process(process: BorrowedFd<'_>, signal: libc::c_int) -> io::Result<()> {
    let (fd, none) = (process.as_raw_fd(), std::ptr::null::<libc::siginfo_t>());
    // SAFETY: the information may be null; the descriptor is open.
    match unsafe { libc::syscall(libc::SYS_pidfd_send_signal, fd, signal, none, 0) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// A descriptor for a process by its number.
pub fn open_process(pid: i32) -> io::Result<OwnedFd> {
    // SAFETY: no pointers.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
    match i32::try_from(fd) {
        // SAFETY: the kernel has just made this descriptor for us alone.
        Ok(fd) if fd >= 0 => Ok(unsafe { OwnedFd::from_raw_fd(fd) }),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Sets the NIS domain name of the caller's UTS namespace.
pub fn set_domainname(name: &str) -> io::Result<()> {
    // SAFETY: the kernel reads exactly as many bytes as the length says.
    match unsafe { libc::setdomainname(name.as_ptr().cast(), name.len()) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Sets every signal to its default action (SIGCHLD to `child`), and unblocks all.
pub fn default_signals(child: DefaultChild) -> io::Result<()> {
    for signal in 1..=64 {
        let handler = match child {
            DefaultChild::Ignored if signal == libc::SIGCHLD => libc::SIG_IGN,
            _ => libc::SIG_DFL,
        };
        // SAFETY: SIG_DFL and SIG_IGN run no code of ours. It fails for SIGKILL, SIGSTOP and
        // the C library's own signals, which are at their defaults or do no harm.
        unsafe { libc::signal(signal, handler) };
    }
    let none = nix::sys::signal::SigSet::empty();
    Ok(nix::sys::signal::sigprocmask(nix::sys::signal::SigmaskHow::SIG_SETMASK, Some(&none), None)?)
}

/// What SIGCHLD does after [`default_signals`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DefaultChild {
    /// The default, too.
    Default,
    /// Ignored: children are reaped by the kernel.
    Ignored,
}

/// Makes a terminal the controlling terminal of the calling session leader.
pub fn take_terminal(terminal: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: TIOCSCTTY takes an integer; the descriptor is open.
    match unsafe { libc::ioctl(terminal.as_raw_fd(), libc::TIOCSCTTY, 0) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Opens the other end of a new terminal's master, after unlocking it.
pub fn open_terminal_peer(master: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    let unlocked: libc::c_int = 0;
    // SAFETY: TIOCSPTLCK reads one int, which lives through the call.
    if unsafe { libc::ioctl(master.as_raw_fd(), libc::TIOCSPTLCK, &raw const unlocked) } != 0 {
        return Err(io::Error::last_os_error());
    }
    let flags = libc::O_RDWR | libc::O_NOCTTY | libc::O_CLOEXEC;
    // SAFETY: TIOCGPTPEER takes open flags as an integer.
    match unsafe { libc::ioctl(master.as_raw_fd(), libc::TIOCGPTPEER, flags) } {
        // SAFETY: the kernel has just made this descriptor for us alone.
        fd if fd >= 0 => Ok(unsafe { OwnedFd::from_raw_fd(fd) }),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Gives one terminal the size of another.
pub fn copy_window_size(from: BorrowedFd<'_>, to: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: all zeros is a valid size.
    let mut size: libc::winsize = unsafe { std::mem::zeroed() };
    // SAFETY: TIOCGWINSZ fills in the structure, which lives through the call.
    if unsafe { libc::ioctl(from.as_raw_fd(), libc::TIOCGWINSZ, &raw mut size) } != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: TIOCSWINSZ reads the structure, which lives through the call.
    match unsafe { libc::ioctl(to.as_raw_fd(), libc::TIOCSWINSZ, &raw const size) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
