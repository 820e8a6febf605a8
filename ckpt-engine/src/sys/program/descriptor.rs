//! What fcntl(2), ioctl(2) and their like tell and change about a descriptor.

use std::ffi::CStr;
use std::io;
use std::mem::zeroed;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::ptr;

use super::map::PAGE_BYTES;

/// Commands of fcntl(2) that take an integer or none.
#[derive(Clone, Copy, Debug)]
#[expect(missing_docs, reason = "the names are those of the commands")]
pub enum Fcntl {
    SetLease(i32),
    GetLease,
    SetOwner(i32),
    GetOwner,
    SetSignal(i32),
    GetSignal,
    GetFlags,
    SetFlags(i32),
}

/// fcntl(2).
pub fn fcntl(fd: BorrowedFd<'_>, command: Fcntl) -> io::Result<i32> {
    let (command, argument) = match command {
        Fcntl::SetLease(kind) => (libc::F_SETLEASE, kind),
        Fcntl::GetLease => (libc::F_GETLEASE, 0),
        Fcntl::SetOwner(pid) => (libc::F_SETOWN, pid),
        Fcntl::GetOwner => (libc::F_GETOWN, 0),
        Fcntl::SetSignal(signal) => (10, signal),
        Fcntl::GetSignal => (11, 0),
        Fcntl::GetFlags => (libc::F_GETFL, 0),
        Fcntl::SetFlags(flags) => (libc::F_SETFL, flags),
    };
    // SAFETY: these commands take an integer.
    number(unsafe { libc::fcntl(fd.as_raw_fd(), command, argument) })
}

/// A lock on a part of a file: from where, and how many bytes (0 is to the end).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Range {
    /// The first byte.
    pub start: i64,
    /// How many.
    pub length: i64,
}

/// To whom a lock belongs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Owner {
    /// `F_SETLK`.
    Process,
    /// `F_OFD_SETLK`.
    Description,
}

/// Locks (`F_RDLCK`, `F_WRLCK`) or unlocks (`F_UNLCK`) without waiting.
pub fn lock(fd: BorrowedFd<'_>, owner: Owner, kind: i32, range: Range) -> io::Result<()> {
    let command = if owner == Owner::Process { libc::F_SETLK } else { libc::F_OFD_SETLK };
    let lock = describe(kind, range);
    // SAFETY: the structure lives during the call.
    number(unsafe { libc::fcntl(fd.as_raw_fd(), command, &raw const lock) }).map(drop)
}

/// The lock that stands in the way of one of ours: kind, range and process (-1 where a
/// description has it).
pub fn obstacle(
    fd: BorrowedFd<'_>,
    owner: Owner,
    kind: i32,
    range: Range,
) -> io::Result<Option<(i32, Range, i32)>> {
    let command = if owner == Owner::Process { libc::F_GETLK } else { libc::F_OFD_GETLK };
    let mut lock = describe(kind, range);
    // SAFETY: the structure lives during the call, which fills it.
    number(unsafe { libc::fcntl(fd.as_raw_fd(), command, &raw mut lock) })?;
    let found = Range { start: lock.l_start, length: lock.l_len };
    let kind = i32::from(lock.l_type);
    Ok((kind != libc::F_UNLCK).then_some((kind, found, lock.l_pid)))
}

fn describe(kind: i32, range: Range) -> libc::flock {
    // SAFETY: all bits zero is valid for this plain structure.
    let mut lock: libc::flock = unsafe { zeroed() };
    lock.l_type = kind as i16;
    lock.l_whence = libc::SEEK_SET as i16;
    lock.l_start = range.start;
    lock.l_len = range.length;
    lock
}

/// pidfd_open(2).
pub fn open_process(pid: i32, flags: u32) -> io::Result<OwnedFd> {
    // SAFETY: integers only.
    owned(unsafe { libc::syscall(libc::SYS_pidfd_open, pid, flags) })
}

/// pidfd_send_signal(2).
pub fn signal_process(process: BorrowedFd<'_>, signal: i32) -> io::Result<()> {
    let (fd, none) = (process.as_raw_fd(), ptr::null::<libc::siginfo_t>());
    // SAFETY: there need be no information.
    let result = unsafe { libc::syscall(libc::SYS_pidfd_send_signal, fd, signal, none, 0) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Names in a directory from where its offset is, as many as fit a small buffer: each name with
/// the offset behind it.
pub fn some_entries(directory: BorrowedFd<'_>, bytes: usize) -> io::Result<Vec<(String, i64)>> {
    let mut buffer = vec![0u64; bytes.div_ceil(8)];
    let (fd, room) = (directory.as_raw_fd(), buffer.len() * 8);
    // SAFETY: the buffer has the size given.
    let filled = unsafe { libc::syscall(libc::SYS_getdents64, fd, buffer.as_mut_ptr(), room) };
    let filled = usize::try_from(filled).map_err(|_| io::Error::last_os_error())?;
    let bytes: Vec<u8> = buffer.iter().flat_map(|word| word.to_ne_bytes()).take(filled).collect();
    let mut rest = bytes.as_slice();
    let mut entries = Vec::new();
    // struct linux_dirent64: inode, offset, length, type, name.
    while let Some(head) = rest.first_chunk::<19>() {
        let offset = head[8..16].try_into().map_or(0, i64::from_ne_bytes);
        let length = usize::from(u16::from_ne_bytes([head[16], head[17]]));
        let entry = rest.get(..length).ok_or(io::ErrorKind::InvalidData)?;
        let name = CStr::from_bytes_until_nul(&entry[19..]).map_err(io::Error::other)?;
        entries.push((name.to_string_lossy().into_owned(), offset));
        rest = &rest[length..];
    }
    Ok(entries)
}

/// Maps a file from its start as a program or library is mapped.
pub fn map_program(fd: BorrowedFd<'_>, pages: usize) -> io::Result<ReadMap> {
    let length = pages * PAGE_BYTES;
    // SAFETY: no address is asked for, so no existing map is replaced.
    let start = unsafe {
        let (protection, flags) = (libc::PROT_READ | libc::PROT_EXEC, libc::MAP_PRIVATE);
        libc::mmap(ptr::null_mut(), length, protection, flags, fd.as_raw_fd(), 0)
    };
    match start {
        libc::MAP_FAILED => Err(io::Error::last_os_error()),
        start => Ok(ReadMap { start: start.expose_provenance(), length }),
    }
}

/// A map as programs and libraries are mapped: private, to be read and executed.
#[derive(Debug)]
pub struct ReadMap {
    start: usize,
    length: usize,
}

impl ReadMap {
    /// The byte at a place; the file must be long enough.
    pub fn byte(&self, place: usize) -> u8 {
        assert!(place < self.length, "byte {place} of {}", self.length);
        let at = ptr::with_exposed_provenance::<u8>(self.start + place);
        // SAFETY: the place lies in the map, which lives as long as `self`; the file may change
        // under us, so it is read as a volatile byte.
        unsafe { at.read_volatile() }
    }

    /// Gives its pages back: they are read from the file again.
    pub fn forget(&mut self) -> io::Result<()> {
        let start = ptr::with_exposed_provenance_mut(self.start);
        // SAFETY: the range is this map; its pages come back from the file.
        number(unsafe { libc::madvise(start, self.length, libc::MADV_DONTNEED) }).map(drop)
    }
}

impl Drop for ReadMap {
    fn drop(&mut self) {
        // SAFETY: the range is this map, and nothing borrows it any more.
        unsafe { libc::munmap(ptr::with_exposed_provenance_mut(self.start), self.length) };
    }
}

/// The kind of a namespace that is held open (`NS_GET_NSTYPE`).
pub fn namespace_kind(namespace: BorrowedFd<'_>) -> io::Result<i32> {
    const NS_GET_NSTYPE: libc::c_ulong = 0xb703;
    // SAFETY: this request takes no argument.
    number(unsafe { libc::ioctl(namespace.as_raw_fd(), NS_GET_NSTYPE) })
}

fn owned(result: libc::c_long) -> io::Result<OwnedFd> {
    match i32::try_from(result) {
        // SAFETY: the kernel has just made this descriptor for us alone.
        Ok(fd) if fd >= 0 => Ok(unsafe { OwnedFd::from_raw_fd(fd) }),
        _ => Err(io::Error::last_os_error()),
    }
}

fn number(result: libc::c_int) -> io::Result<i32> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}
