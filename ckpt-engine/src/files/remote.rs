//! System calls made by a task of the VE, for what no other task may do.

use nix::errno::Errno;

/// One argument of a system call.
#[derive(Debug)]
pub enum Argument<'a> {
    /// An integer.
    Value(u64),
    /// The address of bytes that the call reads.
    In(&'a [u8]),
    /// The address of bytes that the call writes.
    Out(&'a mut [u8]),
}

/// Makes processes of the VE make system calls.
pub trait Remote {
    /// Makes the process with this number inside the VE call `number`.
    fn call(&mut self, pid: i32, number: i64, arguments: [Argument<'_>; 6]) -> Result<u64, Errno>;

    /// The number that a process sees for another one, a thread, a group or a session, whose number
    /// in the VE's pid namespace is `pid`; `None` if it has none for it.
    fn number(&self, _seen_by: i32, pid: i32) -> Option<i32> {
        Some(pid)
    }

    /// Whether this is where a process has the ring of a packet socket.
    fn has_frames(&self, _pid: i32, _start: u64, _length: u64) -> bool {
        true
    }

    /// A process in a mount namespace: its numbers in the VE's pid namespace and on the host.
    fn member(&self, _mounts: u32) -> Option<(i32, i32)> {
        None
    }
}
