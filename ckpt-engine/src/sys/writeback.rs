//! Files on their way to the disk.

use std::{
    io,
    os::fd::{AsRawFd, BorrowedFd},
};

use super::check;

/// Begins to write a part of a file to the disk (sync_file_range(2)), and does not wait for it. It
/// is no promise: that is fsync(2).
pub fn start_writeback(file: BorrowedFd<'_>, offset: u64, len: u64) -> io::Result<()> {
    let (offset, len) = (offset.cast_signed(), len.cast_signed());
    let flags = libc::SYNC_FILE_RANGE_WRITE;
    // SAFETY: the call takes four integers and touches no memory of ours.
    let done = unsafe { libc::sync_file_range(file.as_raw_fd(), offset, len, flags) };
    match check(done.into()) {
        // Not every file system can.
        Err(error) if matches!(error.raw_os_error(), Some(libc::ESPIPE | libc::EINVAL)) => Ok(()),
        other => other.map(drop),
    }
}
