//! Processes for tests that hold descriptors, or wait, and do nothing else.

use std::{
    io,
    os::fd::{AsRawFd, BorrowedFd, RawFd},
    sync::atomic::AtomicU32,
    time::Duration,
};

use super::program::futex;

/// Forks a process that keeps the given descriptors under their numbers, closes all others and
/// waits to be killed; it is killed when the calling thread ends.
pub(crate) fn fork_holder(keep: &[BorrowedFd<'_>]) -> io::Result<i32> {
    let mut numbers: Vec<RawFd> = keep.iter().map(AsRawFd::as_raw_fd).collect();
    numbers.sort_unstable();
    numbers.dedup();
    // SAFETY: the child makes system calls only, which is allowed after a fork of a process
    // with several threads.
    match unsafe { libc::fork() } {
        -1 => Err(io::Error::last_os_error()),
        0 => hold(&numbers),
        pid => Ok(pid),
    }
}

/// Forks a process that waits for a word of memory, with a timeout, until it is killed; it is
/// killed when the calling thread ends.
pub(crate) fn fork_waiter() -> io::Result<i32> {
    // SAFETY: the child makes system calls only, which is allowed after a fork of a process
    // with several threads.
    match unsafe { libc::fork() } {
        -1 => Err(io::Error::last_os_error()),
        0 => {
            die_with_parent();
            let word = AtomicU32::new(1);
            loop {
                let _ = futex::wait(&word, 1, Duration::from_secs(1000));
            }
        }
        pid => Ok(pid),
    }
}

/// Forks a process that ignores some signals and blocks some, and waits until it is killed; it is
/// killed when the calling thread ends.
pub(crate) fn fork_signals(ignored: &[i32], blocked: &[i32]) -> io::Result<i32> {
    // SAFETY: all bits zero is a valid set of signals.
    let mut mask: libc::sigset_t = unsafe { std::mem::zeroed() };
    for &signal in blocked {
        // SAFETY: the set is a live local variable.
        unsafe { libc::sigaddset(&raw mut mask, signal) };
    }
    // SAFETY: the child makes system calls only, which is allowed after a fork of a process
    // with several threads.
    match unsafe { libc::fork() } {
        -1 => Err(io::Error::last_os_error()),
        0 => {
            die_with_parent();
            for &signal in ignored {
                // SAFETY: nothing of the program's own runs for an ignored signal.
                unsafe { libc::signal(signal, libc::SIG_IGN) };
            }
            // SAFETY: the set is a live local variable, and the old one is not wanted.
            unsafe { libc::sigprocmask(libc::SIG_SETMASK, &raw const mask, std::ptr::null_mut()) };
            loop {
                // SAFETY: the call takes nothing.
                unsafe { libc::pause() };
            }
        }
        pid => Ok(pid),
    }
}

fn die_with_parent() {
    // SAFETY: the call takes integers only.
    unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) };
}

fn hold(numbers: &[RawFd]) -> ! {
    die_with_parent();
    let mut from = 0;
    for &number in numbers {
        if number > from {
            // SAFETY: this process uses none of the descriptors that it closes.
            unsafe { libc::syscall(libc::SYS_close_range, from, number - 1, 0) };
        }
        from = number + 1;
    }
    // SAFETY: as above.
    unsafe { libc::syscall(libc::SYS_close_range, from, u32::MAX, 0) };
    loop {
        // SAFETY: the call takes no argument.
        unsafe { libc::pause() };
    }
}

/// Any system call, for stand-ins of remote calls.
pub(crate) fn call(number: i64, arguments: [u64; 6]) -> io::Result<u64> {
    let [a, b, c, d, e, f] = arguments;
    // SAFETY: the tests pass integers and the addresses of buffers that live across the call.
    let value = unsafe { libc::syscall(number, a, b, c, d, e, f) };
    u64::try_from(value).map_err(|_| io::Error::last_os_error())
}

/// Brings the loopback interface of this thread's network up.
pub(crate) fn loopback_up() -> io::Result<()> {
    set_loopback(libc::IFF_UP as u16)
}

/// Takes it down.
pub(crate) fn loopback_down() -> io::Result<()> {
    set_loopback(0)
}

fn set_loopback(flags: u16) -> io::Result<()> {
    let socket = super::socket::socket(libc::AF_INET, libc::SOCK_DGRAM, 0)?;
    // struct ifreq: the name, then the flags.
    let mut request = [0u8; 40];
    request[..2].copy_from_slice(b"lo");
    request[16..18].copy_from_slice(&flags.to_ne_bytes());
    // SAFETY: the kernel reads one ifreq, 40 bytes, which `request` is.
    let done = unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS, request.as_ptr()) };
    if done < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
