//! eventfd(2), signalfd(2), timerfd_create(2) and epoll_create(2).

use std::{
    io,
    os::fd::{AsRawFd, BorrowedFd, OwnedFd},
    ptr,
};

use ckpt_format::files::BusyPoll;
use nix::{fcntl::OFlag, sys::stat::Mode};

use super::descriptor::own;

fn check(value: libc::c_int) -> io::Result<()> {
    if value < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// eventfd(2) with a counter of 0.
pub fn event(semaphore: bool) -> io::Result<OwnedFd> {
    let flags = libc::EFD_CLOEXEC | if semaphore { libc::EFD_SEMAPHORE } else { 0 };
    // SAFETY: the call takes two integers and touches no memory of ours.
    own(libc::c_long::from(unsafe { libc::eventfd(0, flags) }))
}

/// signalfd(2) for a mask in which bit 0 is signal 1.
pub fn signal(mask: u64) -> io::Result<OwnedFd> {
    let flags = libc::SFD_CLOEXEC;
    // SAFETY: the kernel reads the eight bytes of `mask`.
    own(unsafe { libc::syscall(libc::SYS_signalfd4, -1, &raw const mask, 8usize, flags) })
}

/// epoll_create1(2).
pub fn epoll() -> io::Result<OwnedFd> {
    // SAFETY: the call takes one integer and touches no memory of ours.
    own(libc::c_long::from(unsafe { libc::epoll_create1(libc::EPOLL_CLOEXEC) }))
}

const EPIOCSPARAMS: libc::c_ulong = 0x4008_8a01;
const EPIOCGPARAMS: libc::c_ulong = 0x8008_8a02;

/// `EPIOCGPARAMS`: how devices are polled for an epoll set (Linux 6.9); none if that is as with a
/// new one.
pub fn busy_poll(epoll: BorrowedFd<'_>) -> io::Result<Option<BusyPoll>> {
    // struct epoll_params: u32, u16, u8, and one byte of padding.
    let mut parameters = [0u32; 2];
    let buffer = parameters.as_mut_ptr();
    // SAFETY: the kernel writes one epoll_params, eight bytes, which `parameters` has.
    check(unsafe { libc::ioctl(epoll.as_raw_fd(), EPIOCGPARAMS, buffer) })?;
    let [microseconds, rest] = parameters;
    let [packets @ .., preferred, _] = rest.to_ne_bytes();
    let packets = u16::from_ne_bytes(packets);
    let found = BusyPoll { microseconds, packets, preferred: preferred != 0 };
    Ok((parameters != [0; 2]).then_some(found))
}

/// `EPIOCSPARAMS`.
pub fn set_busy_poll(epoll: BorrowedFd<'_>, wanted: BusyPoll) -> io::Result<()> {
    let [low, high] = wanted.packets.to_ne_bytes();
    let rest = u32::from_ne_bytes([low, high, u8::from(wanted.preferred), 0]);
    let parameters = [wanted.microseconds, rest];
    // SAFETY: the kernel reads one epoll_params, eight bytes, which `parameters` has.
    check(unsafe { libc::ioctl(epoll.as_raw_fd(), EPIOCSPARAMS, parameters.as_ptr()) })
}

/// timerfd_create(2).
pub fn timer(clock: i32) -> io::Result<OwnedFd> {
    // SAFETY: the call takes two integers and touches no memory of ours.
    own(libc::c_long::from(unsafe { libc::timerfd_create(clock, libc::TFD_CLOEXEC) }))
}

const SECOND: u64 = 1_000_000_000;

fn timespec(ns: u64) -> libc::timespec {
    // Both parts fit: a u64 of nanoseconds is 584 years.
    libc::timespec { tv_sec: (ns / SECOND).cast_signed(), tv_nsec: (ns % SECOND).cast_signed() }
}

fn nanoseconds(time: libc::timespec) -> u64 {
    let seconds = u64::try_from(time.tv_sec).unwrap_or(0);
    seconds.saturating_mul(SECOND).saturating_add(u64::try_from(time.tv_nsec).unwrap_or(0))
}

/// timerfd_gettime(2): nanoseconds until the next expiry, and the period.
/// The kernel also moves a periodic timer on to its next expiry.
pub fn timer_remaining(timer: BorrowedFd<'_>) -> io::Result<(u64, u64)> {
    let mut value = libc::itimerspec { it_interval: timespec(0), it_value: timespec(0) };
    // SAFETY: the kernel writes one itimerspec, which `value` is.
    check(unsafe { libc::timerfd_gettime(timer.as_raw_fd(), &raw mut value) })?;
    Ok((nanoseconds(value.it_value), nanoseconds(value.it_interval)))
}

/// timerfd_settime(2).
pub fn arm_timer(
    timer: BorrowedFd<'_>,
    flags: i32,
    value_ns: u64,
    interval_ns: u64,
) -> io::Result<()> {
    let value =
        libc::itimerspec { it_interval: timespec(interval_ns), it_value: timespec(value_ns) };
    // SAFETY: the kernel reads one itimerspec, which `value` is.
    check(unsafe {
        libc::timerfd_settime(timer.as_raw_fd(), flags, &raw const value, ptr::null_mut())
    })
}

/// `TFD_IOC_SET_TICKS`: expirations that were not read yet; not 0.
pub fn set_timer_ticks(timer: BorrowedFd<'_>, ticks: u64) -> io::Result<()> {
    const TFD_IOC_SET_TICKS: libc::c_ulong = 0x4008_5400;
    // SAFETY: the kernel reads the eight bytes of `ticks`.
    check(unsafe { libc::ioctl(timer.as_raw_fd(), TFD_IOC_SET_TICKS, &raw const ticks) })
}

/// Nanoseconds since a CLOCK_MONOTONIC of another host, which is `ahead_ns` ahead of ours,
/// showed `then_ns`.
pub fn elapsed(then_ns: i64, ahead_ns: i64) -> io::Result<i64> {
    let now = i64::try_from(now(libc::CLOCK_MONOTONIC)?).unwrap_or(i64::MAX);
    Ok(now.saturating_add(ahead_ns).saturating_sub(then_ns))
}

/// clock_gettime(2) in nanoseconds.
pub fn now(clock: i32) -> io::Result<u64> {
    let mut time = timespec(0);
    // SAFETY: the kernel writes one timespec, which `time` is.
    check(unsafe { libc::clock_gettime(clock, &raw mut time) })?;
    Ok(nanoseconds(time))
}

/// inotify_init1(2).
pub fn inotify() -> io::Result<OwnedFd> {
    // SAFETY: the call takes one integer and touches no memory of ours.
    own(libc::c_long::from(unsafe { libc::inotify_init1(libc::IN_CLOEXEC) }))
}

/// fanotify_mark(2): adds to the marks of a group on a path without symbolic links.
pub fn mark(group: BorrowedFd<'_>, how: u32, mask: u64, path: &[u8]) -> io::Result<()> {
    let path = std::ffi::CString::new(path).map_err(|_| io::ErrorKind::InvalidInput)?;
    let how = libc::FAN_MARK_ADD | libc::FAN_MARK_DONT_FOLLOW | how;
    let raw = group.as_raw_fd();
    // SAFETY: `path` is NUL-terminated and only read.
    check(unsafe { libc::fanotify_mark(raw, how, mask, libc::AT_FDCWD, path.as_ptr()) }).map(drop)
}

/// Takes out all events that wait in an inotify set or a fanotify group.
pub fn drain(watches: BorrowedFd<'_>) -> io::Result<()> {
    loop {
        let mut waiting: libc::c_int = 0;
        // SAFETY: the request writes one integer, which `waiting` is.
        check(unsafe { libc::ioctl(watches.as_raw_fd(), libc::FIONREAD, &raw mut waiting) })?;
        // Room for the largest event, which the kernel gives as a whole or not at all.
        let mut room = vec![0; usize::try_from(waiting).unwrap_or(0).clamp(4096, 1 << 20)];
        if waiting == 0 {
            return Ok(());
        }
        nix::unistd::read(watches, &mut room)?;
    }
}

/// inotify_add_watch(2) of a path without symbolic links, under this number.
pub fn watch(inotify: BorrowedFd<'_>, number: i32, path: &[u8], mask: u32) -> io::Result<()> {
    let path = std::ffi::CString::new(path).map_err(|_| io::ErrorKind::InvalidInput)?;
    add_watch(inotify, number, &path, mask | libc::IN_DONT_FOLLOW)
}

/// The same for what is open, and may have no path. `descriptors` is our own `/proc/self/fd`, which
/// the calling thread goes to for that long: there is no other way to name what is watched.
pub fn watch_open(
    inotify: BorrowedFd<'_>,
    number: i32,
    (descriptors, watched): (BorrowedFd<'_>, BorrowedFd<'_>),
    mask: u32,
) -> io::Result<()> {
    let name = std::ffi::CString::new(watched.as_raw_fd().to_string())?;
    let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    let before = nix::fcntl::open(".", flags, Mode::empty())?;
    nix::unistd::fchdir(descriptors)?;
    let added = add_watch(inotify, number, &name, mask);
    nix::unistd::fchdir(before)?;
    added
}

fn add_watch(
    inotify: BorrowedFd<'_>,
    number: i32,
    path: &std::ffi::CStr,
    mask: u32,
) -> io::Result<()> {
    const INOTIFY_IOC_SETNEXTWD: libc::c_ulong = 0x4004_4900;
    let raw = inotify.as_raw_fd();
    // SAFETY: the request takes the number by value.
    check(unsafe { libc::ioctl(raw, INOTIFY_IOC_SETNEXTWD, libc::c_long::from(number)) })?;
    // SAFETY: `path` is NUL-terminated and only read.
    let got = unsafe { libc::inotify_add_watch(raw, path.as_ptr(), mask) };
    check(got)?;
    if got == number { Ok(()) } else { Err(io::ErrorKind::AlreadyExists.into()) }
}
