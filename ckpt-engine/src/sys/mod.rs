//! One wrapper per kernel interface: owned descriptors in and out, `io::Error` for every failure.
//!
//! This is the only place with `unsafe` in the whole project.

pub mod aio;
pub mod ancillary;
pub mod bpf;
pub mod children;
pub mod clone;
pub mod descriptor;
pub mod ethtool;
pub mod event;
pub mod handle;
pub mod heap;
pub mod identity;
pub mod ipc;
pub mod keys;
pub mod mailbox;
pub mod missing;
pub mod mount;
pub mod namespace;
pub mod netns;
pub mod packet;
pub mod pagemap;
pub mod pids;
pub mod program;
pub mod ptrace;
pub mod ring;
pub mod seccomp;
pub mod socket;
pub mod tap;
pub mod task;
#[cfg(test)]
pub(crate) mod testing;
pub mod tty;
pub mod tun;
pub mod userfault;
pub mod users;
pub mod vm;
pub mod writeback;
pub mod xattr;
pub mod xtables;

use std::io;

/// Turns the C convention of -1 and errno into a result.
fn check(value: libc::c_long) -> io::Result<libc::c_long> {
    if value == -1 { Err(io::Error::last_os_error()) } else { Ok(value) }
}
