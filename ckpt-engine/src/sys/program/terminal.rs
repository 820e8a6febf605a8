//! The window size of a terminal.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

/// Rows and columns.
pub fn window(terminal: BorrowedFd<'_>) -> io::Result<(u16, u16)> {
    let mut size = libc::winsize { ws_row: 0, ws_col: 0, ws_xpixel: 0, ws_ypixel: 0 };
    // SAFETY: the structure lives during the call and is what this request fills.
    let result = unsafe { libc::ioctl(terminal.as_raw_fd(), libc::TIOCGWINSZ, &raw mut size) };
    if result == 0 { Ok((size.ws_row, size.ws_col)) } else { Err(io::Error::last_os_error()) }
}
