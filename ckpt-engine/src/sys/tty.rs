//! Requests to pseudo terminals.

use std::{
    io,
    os::fd::{AsRawFd, BorrowedFd, OwnedFd},
};

use super::descriptor::own;

fn check(value: libc::c_int) -> io::Result<()> {
    if value < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// `struct termios2` as bytes.
pub type Settings = [u8; 44];

const TCGETS2: libc::c_ulong = 0x802C_542A;
const TCSETS2: libc::c_ulong = 0x402C_542B;

/// `TCGETS2`.
pub fn settings(tty: BorrowedFd<'_>) -> io::Result<Settings> {
    let mut settings = [0; 44];
    // SAFETY: the kernel writes one termios2, 44 bytes, which `settings` is.
    check(unsafe { libc::ioctl(tty.as_raw_fd(), TCGETS2, settings.as_mut_ptr()) })?;
    Ok(settings)
}

/// `TCSETS2`.
pub fn set_settings(tty: BorrowedFd<'_>, settings: &Settings) -> io::Result<()> {
    // SAFETY: the kernel reads one termios2, 44 bytes, which `settings` is.
    check(unsafe { libc::ioctl(tty.as_raw_fd(), TCSETS2, settings.as_ptr()) })
}

/// `TIOCGWINSZ`: rows, columns, and the size in pixels.
pub fn window(tty: BorrowedFd<'_>) -> io::Result<[u16; 4]> {
    let mut window = [0u16; 4];
    // SAFETY: the kernel writes one winsize, four u16, which `window` is.
    check(unsafe { libc::ioctl(tty.as_raw_fd(), libc::TIOCGWINSZ, window.as_mut_ptr()) })?;
    Ok(window)
}

/// `TIOCSWINSZ`.
pub fn set_window(tty: BorrowedFd<'_>, window: &[u16; 4]) -> io::Result<()> {
    // SAFETY: the kernel reads one winsize, four u16, which `window` is.
    check(unsafe { libc::ioctl(tty.as_raw_fd(), libc::TIOCSWINSZ, window.as_ptr()) })
}

/// The requests that write one integer.
#[derive(Clone, Copy, Debug)]
pub enum Query {
    /// `TIOCGPTN`, of a master.
    Index,
    /// `TIOCGDEV`: the device that `/dev/tty` stands for.
    Device,
    /// `TIOCGPKT`, of a master.
    PacketMode,
    /// `TIOCGEXCL`.
    Exclusive,
    /// `TIOCGPTLCK`, of a master.
    Locked,
    /// `TIOCGSID`.
    Session,
    /// `TIOCGPGRP`.
    Foreground,
}

/// Asks for one integer.
pub fn query(tty: BorrowedFd<'_>, query: Query) -> io::Result<i32> {
    let request: libc::c_ulong = match query {
        Query::Index => libc::TIOCGPTN,
        Query::Device => 0x8004_5432,
        Query::PacketMode => 0x8004_5438,
        Query::Exclusive => 0x8004_5440,
        Query::Locked => 0x8004_5439,
        Query::Session => libc::TIOCGSID,
        Query::Foreground => libc::TIOCGPGRP,
    };
    let mut value = 0i32;
    // SAFETY: these requests write one i32, which `value` is.
    check(unsafe { libc::ioctl(tty.as_raw_fd(), request, &raw mut value) })?;
    Ok(value)
}

/// `TIOCSPTLCK`, of a master.
pub fn set_locked(master: BorrowedFd<'_>, locked: bool) -> io::Result<()> {
    let value = i32::from(locked);
    // SAFETY: the request reads one i32, which `value` is.
    check(unsafe { libc::ioctl(master.as_raw_fd(), libc::TIOCSPTLCK, &raw const value) })
}

/// `TIOCPKT`, of a master.
pub fn set_packet_mode(master: BorrowedFd<'_>, on: bool) -> io::Result<()> {
    let value = i32::from(on);
    // SAFETY: the request reads one i32, which `value` is.
    check(unsafe { libc::ioctl(master.as_raw_fd(), libc::TIOCPKT, &raw const value) })
}

/// tcflow(3): stops what is written to this side, or lets it go on.
pub fn set_flow(tty: BorrowedFd<'_>, on: bool) -> io::Result<()> {
    let action = if on { libc::TCOON } else { libc::TCOOFF };
    // SAFETY: the call takes integers only.
    check(unsafe { libc::tcflow(tty.as_raw_fd(), action) })
}

/// tcflush(3): `TCIFLUSH` or `TCOFLUSH`.
pub fn flush(tty: BorrowedFd<'_>, which: i32) -> io::Result<()> {
    // SAFETY: the call takes integers only.
    check(unsafe { libc::tcflush(tty.as_raw_fd(), which) })
}

/// `TIOCEXCL`.
pub fn set_exclusive(tty: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: the request takes no argument.
    check(unsafe { libc::ioctl(tty.as_raw_fd(), libc::TIOCEXCL) })
}

/// `TIOCGPTPEER`: the slave of a master, opened without its name.
pub fn slave(master: BorrowedFd<'_>, flags: i32) -> io::Result<OwnedFd> {
    const TIOCGPTPEER: libc::c_ulong = 0x5441;
    let flags = flags | libc::O_NOCTTY | libc::O_CLOEXEC;
    // SAFETY: the request takes an integer and returns a new descriptor.
    own(libc::c_long::from(unsafe { libc::ioctl(master.as_raw_fd(), TIOCGPTPEER, flags) }))
}
