//! POSIX message queues: mq_open(3) and what can be done with its descriptors.

use std::{
    ffi::CStr,
    io, mem,
    os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
    ptr,
};

use super::check;

/// What mq_getattr(3) tells.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Attributes {
    /// How many messages fit.
    pub messages_max: i64,
    /// How long one may be, in bytes.
    pub size_max: i64,
    /// How many are in it.
    pub messages: i64,
}

/// mq_open(3) of something new; the name has no leading `/`. Does not block.
pub fn make(name: &CStr, messages_max: i64, size_max: i64) -> io::Result<OwnedFd> {
    // SAFETY: plain integers, for which all zero is a valid value.
    let mut attributes: libc::mq_attr = unsafe { mem::zeroed() };
    attributes.mq_maxmsg = messages_max;
    attributes.mq_msgsize = size_max;
    let flags = libc::O_RDWR | libc::O_CREAT | libc::O_EXCL | libc::O_CLOEXEC | libc::O_NONBLOCK;
    // SAFETY: the name is terminated, and both it and the attributes live through the call.
    let fd = check(unsafe {
        libc::syscall(libc::SYS_mq_open, name.as_ptr(), flags, 0o600, &raw const attributes)
    })?;
    // SAFETY: the kernel has just made this descriptor for us alone.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

/// mq_open(3) of one that is there, to read and write. Does not block.
pub fn open(name: &CStr) -> io::Result<OwnedFd> {
    let flags = libc::O_RDWR | libc::O_CLOEXEC | libc::O_NONBLOCK;
    // SAFETY: the name is terminated and lives through the call, which takes no attributes.
    let fd = check(unsafe { libc::syscall(libc::SYS_mq_open, name.as_ptr(), flags, 0, 0) })?;
    // SAFETY: the kernel has just made this descriptor for us alone.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

/// mq_unlink(3).
pub fn unlink(name: &CStr) -> io::Result<()> {
    // SAFETY: the name is terminated and lives through the call.
    check(unsafe { libc::syscall(libc::SYS_mq_unlink, name.as_ptr()) }).map(drop)
}

/// mq_getattr(3).
pub fn attributes(mailbox: BorrowedFd<'_>) -> io::Result<Attributes> {
    // SAFETY: plain integers, for which all zero is a valid value.
    let mut found: libc::mq_attr = unsafe { mem::zeroed() };
    let none = ptr::null::<libc::mq_attr>();
    let fd = mailbox.as_raw_fd();
    // SAFETY: nothing is set; the kernel writes one structure, which `found` is.
    check(unsafe { libc::syscall(libc::SYS_mq_getsetattr, fd, none, &raw mut found) })?;
    Ok(Attributes {
        messages_max: found.mq_maxmsg,
        size_max: found.mq_msgsize,
        messages: found.mq_curmsgs,
    })
}

/// mq_receive(3) on a descriptor that does not block: priority and text; `None` when empty.
pub fn receive(mailbox: BorrowedFd<'_>, size_max: usize) -> io::Result<Option<(u32, Vec<u8>)>> {
    let mut text = vec![0; size_max];
    let mut priority = 0u32;
    let none = ptr::null::<libc::timespec>();
    let fd = mailbox.as_raw_fd();
    // SAFETY: the buffer has the length given, and the priority lives through the call.
    let length = unsafe {
        libc::syscall(
            libc::SYS_mq_timedreceive,
            fd,
            text.as_mut_ptr(),
            size_max,
            &raw mut priority,
            none,
        )
    };
    match check(length) {
        Ok(length) => {
            text.truncate(length as usize);
            Ok(Some((priority, text)))
        }
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
        Err(error) => Err(error),
    }
}

/// mq_send(3) on a descriptor that does not block.
pub fn send(mailbox: BorrowedFd<'_>, priority: u32, text: &[u8]) -> io::Result<()> {
    let none = ptr::null::<libc::timespec>();
    let fd = mailbox.as_raw_fd();
    // SAFETY: the text has the length given.
    check(unsafe {
        libc::syscall(libc::SYS_mq_timedsend, fd, text.as_ptr(), text.len(), priority, none)
    })
    .map(drop)
}
