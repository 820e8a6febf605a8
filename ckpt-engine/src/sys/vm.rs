//! Memory of other processes, and shared mappings of our own.

use std::{fs::File, io, os::fd::AsRawFd};

use nix::fcntl::{FallocateFlags, fallocate};

use super::check;

/// The most pieces that one call takes (`UIO_MAXIOV`).
const PIECES_MAX: usize = 1024;

fn pieces(remote: &[(u64, usize)]) -> Vec<libc::iovec> {
    remote
        .iter()
        .map(|&(address, len)| libc::iovec { iov_base: address as *mut libc::c_void, iov_len: len })
        .collect()
}

/// Copies from another process (process_vm_readv(2)): the pieces of `remote`, given as address
/// and length, one after the other into `local`. Returns how many bytes were read; fewer than
/// asked for when a page of the process could not be read.
pub fn read_process(pid: i32, local: &mut [u8], remote: &[(u64, usize)]) -> io::Result<usize> {
    let local = libc::iovec { iov_base: local.as_mut_ptr().cast(), iov_len: local.len() };
    let remote = pieces(remote);
    // SAFETY: `local` describes a live, exclusively borrowed slice; the kernel checks the remote
    // addresses against the other process.
    let count = unsafe {
        libc::process_vm_readv(
            pid,
            &raw const local,
            1,
            remote.as_ptr(),
            remote.len() as libc::c_ulong,
            0,
        )
    };
    check(count as libc::c_long).map(|count| count as usize)
}

/// A copy of `len` bytes of another process; shorter where a page could not be read. Nothing is
/// written to it but that: memory that is copied by the gibibyte is not filled with zeros first.
pub fn copy_of_process(pid: i32, start: u64, len: usize) -> io::Result<Vec<u8>> {
    let mut bytes: Vec<u8> = Vec::with_capacity(len);
    let local = libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: len };
    let remote = pieces(&[(start, len)]);
    // SAFETY: `local` describes the vector's own capacity, which nobody else uses; the kernel
    // checks the remote address against the other process.
    let count = unsafe { libc::process_vm_readv(pid, &raw const local, 1, remote.as_ptr(), 1, 0) };
    let count = check(count as libc::c_long)? as usize;
    // SAFETY: the kernel has written the first `count` bytes, at most `len` of them.
    unsafe { bytes.set_len(count) };
    Ok(bytes)
}

/// Copies `local` to the pieces of another process, one after the other (process_vm_writev(2)).
/// Returns how many bytes were written; fewer than given when a page of the process may not be
/// written by itself.
pub fn write_process(pid: i32, local: &[u8], remote: &[(u64, usize)]) -> io::Result<usize> {
    let mut written = 0;
    for remote in remote.chunks(PIECES_MAX) {
        let len = remote.iter().map(|&(_, len)| len).sum::<usize>().min(local.len() - written);
        let piece = &local[written..written + len];
        let from = libc::iovec { iov_base: piece.as_ptr().cast_mut().cast(), iov_len: len };
        let remote = pieces(remote);
        // SAFETY: `from` describes a live slice, which the kernel only reads; it checks the
        // remote addresses against the other process.
        let count = unsafe {
            libc::process_vm_writev(
                pid,
                &raw const from,
                1,
                remote.as_ptr(),
                remote.len() as libc::c_ulong,
                0,
            )
        };
        match check(count as libc::c_long) {
            Ok(count) => written += count as usize,
            Err(_) if written > 0 => return Ok(written),
            Err(error) => return Err(error),
        }
        if count as usize != len {
            break;
        }
    }
    Ok(written)
}

/// A shared, writable mapping of a whole file; unmapped when dropped.
#[derive(Debug)]
pub struct SharedMapping {
    start: *mut u8,
    len: usize,
}

// SAFETY: the mapping is plain memory owned by this value; it is not tied to a thread.
unsafe impl Send for SharedMapping {}

impl SharedMapping {
    /// Maps the first `len` bytes of `file`.
    pub fn new(file: &impl AsRawFd, len: usize) -> io::Result<Self> {
        Self::map(len, libc::MAP_SHARED, file.as_raw_fd())
    }

    /// Maps new shared anonymous memory of `len` bytes.
    pub fn anonymous(len: usize) -> io::Result<Self> {
        Self::map(len, libc::MAP_SHARED | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE, -1)
    }

    /// The same of huge pages of this size in bytes.
    pub fn of_huge_pages(len: usize, page: u64) -> io::Result<Self> {
        let size = page.trailing_zeros().cast_signed() << libc::MAP_HUGE_SHIFT;
        let flags = libc::MAP_SHARED | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        Self::map(len, flags | libc::MAP_HUGETLB | size, -1)
    }

    fn map(len: usize, flags: i32, fd: i32) -> io::Result<Self> {
        Self::map_from(len, flags, fd, 0)
    }

    fn map_from(len: usize, flags: i32, fd: i32, offset: i64) -> io::Result<Self> {
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a new mapping at an address of the kernel's choice touches no existing memory.
        let start = unsafe { libc::mmap(std::ptr::null_mut(), len, protection, flags, fd, offset) };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok(Self { start: start.cast(), len })
    }

    /// The address range, as in `/proc/self/map_files`.
    pub fn range(&self) -> (u64, u64) {
        (self.start as u64, self.start as u64 + self.len as u64)
    }

    /// Writes `bytes` at `offset`. Panics when they do not fit: the caller sizes its data.
    pub fn write(&self, offset: usize, bytes: &[u8]) {
        assert!(offset + bytes.len() <= self.len, "write beyond the mapping");
        // SAFETY: the offset was checked to lie in the mapping.
        let target = unsafe { self.start.add(offset) };
        // SAFETY: source and target are valid for the length; the mapping is never borrowed as a
        // Rust reference, so other processes may share it.
        unsafe { target.copy_from_nonoverlapping(bytes.as_ptr(), bytes.len()) };
    }

    /// Reads `len` bytes at `offset`. Panics when they lie outside.
    pub fn read(&self, offset: usize, len: usize) -> Vec<u8> {
        assert!(offset + len <= self.len, "read beyond the mapping");
        let mut bytes = vec![0u8; len];
        // SAFETY: the offset was checked to lie in the mapping.
        let source = unsafe { self.start.add(offset) };
        // SAFETY: both sides are valid for the length, see `write`.
        unsafe { source.copy_to_nonoverlapping(bytes.as_mut_ptr(), len) };
        bytes
    }
}

/// Writes into a file of huge pages of this size in bytes, which takes no write(2).
pub fn write_huge(file: &File, page: u64, offset: u64, bytes: &[u8]) -> io::Result<()> {
    let start = offset / page * page;
    let len = (offset + bytes.len() as u64).next_multiple_of(page) - start;
    let (from, wide) = (start as i64, len as i64);
    // Without this a host without free pages would send a signal.
    fallocate(file, FallocateFlags::empty(), from, wide)?;
    let flags = libc::MAP_SHARED | libc::MAP_NORESERVE;
    let window = SharedMapping::map_from(len as usize, flags, file.as_raw_fd(), from)?;
    window.write((offset - start) as usize, bytes);
    Ok(())
}

impl Drop for SharedMapping {
    fn drop(&mut self) {
        // SAFETY: the range is the mapping that this value made and nobody else holds.
        unsafe { libc::munmap(self.start.cast(), self.len) };
    }
}
