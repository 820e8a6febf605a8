//! Asynchronous input and output (aio(7)), with maps as buffers.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::time::Duration;

use super::map::Map;

/// A context. Requests under way keep their buffers' pages, not the maps.
#[derive(Debug)]
pub struct Queue(u64);

/// What is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Act {
    /// pread(2).
    Read = 0,
    /// pwrite(2).
    Write = 1,
    /// fsync(2).
    Sync = 2,
    /// poll(2) for something to be read.
    Poll = 5,
}

/// What an event says: the number given with the request, and the result of it.
pub type Event = (u64, i64);

/// `struct iocb`.
#[repr(C)]
struct Request {
    data: u64,
    key: u32,
    flags: i32,
    act: u16,
    priority: i16,
    fd: u32,
    buffer: u64,
    length: u64,
    offset: i64,
    reserved: u64,
    more_flags: u32,
    event_fd: u32,
}

impl Queue {
    /// For so many requests.
    pub fn new(requests: u32) -> io::Result<Self> {
        let mut number = 0u64;
        // SAFETY: the result is a live local variable, zero as the call wants it.
        done(unsafe { libc::syscall(libc::SYS_io_setup, requests, &raw mut number) })?;
        Ok(Self(number))
    }

    /// The number by which the kernel knows it.
    pub fn number(&self) -> u64 {
        self.0
    }

    /// Asks for something about `length` bytes at this offset of a file, and as many at `place` in
    /// the map.
    pub fn submit(
        &self,
        act: Act,
        fd: BorrowedFd<'_>,
        map: &Map,
        (place, length, offset): (usize, usize, i64),
        data: u64,
    ) -> io::Result<()> {
        assert!(place + length <= map.words() * 8, "behind the end of the map");
        let (buffer, length) = match act {
            Act::Read | Act::Write => ((map.address() + place) as u64, length as u64),
            Act::Sync => (0, 0),
            Act::Poll => (libc::POLLIN as u64, 0),
        };
        let mut request = Request {
            data,
            key: 0,
            flags: 0,
            act: act as u16,
            priority: 0,
            fd: fd.as_raw_fd().cast_unsigned(),
            buffer,
            length,
            offset,
            reserved: 0,
            more_flags: 0,
            event_fd: 0,
        };
        let list = [&raw mut request];
        // SAFETY: the list holds one live request, which the kernel has copied when the call
        // returns; its buffer lies in the map, as checked, whose words are only used as atomics.
        done(unsafe { libc::syscall(libc::SYS_io_submit, self.0, 1, list.as_ptr()) }).map(drop)
    }

    /// What has come: at most `count` events, and without a timeout at least one.
    pub fn events(&self, count: usize, timeout: Option<Duration>) -> io::Result<Vec<Event>> {
        let mut events = vec![[0u64; 4]; count];
        let time = timeout.map(|timeout| libc::timespec {
            tv_sec: timeout.as_secs().cast_signed(),
            tv_nsec: timeout.subsec_nanos().into(),
        });
        let time = time.as_ref().map_or(std::ptr::null(), std::ptr::from_ref);
        // SAFETY: the events are a live array of this many, and the time is a live variable or none.
        let found = done(unsafe {
            libc::syscall(libc::SYS_io_getevents, self.0, 1, count, events.as_mut_ptr(), time)
        })?;
        events.truncate(usize::try_from(found).map_err(io::Error::other)?);
        Ok(events.iter().map(|event| (event[0], event[2].cast_signed())).collect())
    }
}

impl Drop for Queue {
    fn drop(&mut self) {
        // SAFETY: nothing refers to the ring.
        unsafe { libc::syscall(libc::SYS_io_destroy, self.0) };
    }
}

fn done(result: libc::c_long) -> io::Result<libc::c_long> {
    if result >= 0 { Ok(result) } else { Err(io::Error::last_os_error()) }
}
