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
}
