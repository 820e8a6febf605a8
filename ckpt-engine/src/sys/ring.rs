//! Memory that a packet socket shares with the kernel.

use std::{
    io,
    os::fd::{AsRawFd, BorrowedFd},
    ptr::NonNull,
    sync::atomic::{AtomicU32, Ordering},
};

/// The whole ring of a socket, mapped into this process.
#[derive(Debug)]
pub struct Ring {
    start: NonNull<u8>,
    length: usize,
}

impl Ring {
    /// Maps the ring of a socket, which has this length.
    pub fn map(socket: BorrowedFd<'_>, length: usize) -> io::Result<Self> {
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        let (fd, shared) = (socket.as_raw_fd(), libc::MAP_SHARED);
        // SAFETY: the kernel chooses the place, so nothing of ours is replaced.
        let start = unsafe { libc::mmap(std::ptr::null_mut(), length, protection, shared, fd, 0) };
        match NonNull::new(start.cast()) {
            Some(start) if start.as_ptr() as isize != -1 => Ok(Self { start, length }),
            _ => Err(io::Error::last_os_error()),
        }
    }

    fn place(&self, at: usize, length: usize) -> io::Result<*mut u8> {
        match at.checked_add(length) {
            // SAFETY: the result lies within the map, or right behind it.
            Some(end) if end <= self.length => Ok(unsafe { self.start.as_ptr().add(at) }),
            _ => Err(io::ErrorKind::InvalidInput.into()),
        }
    }

    /// The number of 32 bits at a place, which the kernel may change at any time.
    pub fn word(&self, at: usize) -> io::Result<u32> {
        Ok(self.shared(at)?.load(Ordering::Acquire))
    }

    /// Sets it.
    pub fn set_word(&self, at: usize, value: u32) -> io::Result<()> {
        self.shared(at)?.store(value, Ordering::Release);
        Ok(())
    }

    fn shared(&self, at: usize) -> io::Result<&AtomicU32> {
        let place = self.place(at, size_of::<u32>())?;
        if !at.is_multiple_of(align_of::<u32>()) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        // SAFETY: the place is in the map, which lives as long as `self`; it is aligned, because
        // maps begin at a page; and everybody in this process accesses it atomically or through
        // copies of raw bytes below, which no reference is held to.
        Ok(unsafe { AtomicU32::from_ptr(place.cast()) })
    }

    /// A copy of what is there.
    pub fn read(&self, at: usize, length: usize) -> io::Result<Vec<u8>> {
        let place = self.place(at, length)?;
        let mut bytes = vec![0; length];
        // SAFETY: `length` bytes from `place` are in the map, and `bytes` is memory of our own.
        unsafe { std::ptr::copy_nonoverlapping(place, bytes.as_mut_ptr(), length) };
        Ok(bytes)
    }

    /// Writes over what is there.
    pub fn write(&self, at: usize, bytes: &[u8]) -> io::Result<()> {
        let place = self.place(at, bytes.len())?;
        // SAFETY: as many bytes from `place` are in the map, and `bytes` is not.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), place, bytes.len()) };
        Ok(())
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        // SAFETY: the map was made for this value alone, and nothing refers to it any more.
        unsafe { libc::munmap(self.start.as_ptr().cast(), self.length) };
    }
}
