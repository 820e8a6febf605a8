//! Asynchronous input and output of the kernel (aio(7)): only what tells where its rings are.

use std::io;

use super::check;

/// A context of our own. Its number is the address of its ring.
#[derive(Debug)]
pub struct Context(u64);

impl Context {
    /// io_setup(2).
    pub fn new(requests: u32) -> io::Result<Self> {
        let mut context = 0u64;
        // SAFETY: the result is a live local variable, zero as the call wants it.
        check(unsafe { libc::syscall(libc::SYS_io_setup, requests, &raw mut context) })?;
        Ok(Self(context))
    }

    /// Where its ring is mapped.
    pub fn address(&self) -> u64 {
        self.0
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        // SAFETY: the context is ours, and nothing in Rust refers to its ring.
        unsafe { libc::syscall(libc::SYS_io_destroy, self.0) };
    }
}
