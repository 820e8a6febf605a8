//! TCP sockets.
//!
//! Connections are read and made in the kernel's repair mode, in which nothing that is done to
//! a socket is told to its peer. A captured connection stays in repair mode: either
//! [`super::Undo`] ends it and the connection goes on here, or the socket is closed in it, which
//! the peer does not notice.

mod alike;
mod capture;
mod early;
mod fin;
mod layout;
mod look;
mod orphan;
mod proof;
mod queue;
mod rebuild;
mod record;
mod resting;
mod signature;
#[cfg(test)]
mod tests;
#[cfg(test)]
mod tests_alike;
#[cfg(test)]
mod tests_early;
#[cfg(test)]
mod tests_orphan;
#[cfg(test)]
mod tests_queue;
#[cfg(test)]
mod tests_signature;
mod told;
mod unsent;

pub(super) use alike::{Alike, Seen, Told, prepare};
pub(super) use capture::{Held, Repaired, capture, capture_alike, check, check_multipath, mend};
pub use early::Early;
pub(super) use early::Made;
pub(super) use orphan::{orphans, prepare as prepare_for_orphans};
pub(super) use queue::{Door, Taken};
pub(super) use rebuild::{Connection, Usual, bind, complete, connect, make};
pub use resting::Resting;
pub(super) use signature::{Ends, Signatures, of_connection};
pub(super) use unsent::unsent;

use alike::Group;
use capture::Info;

use std::{io, os::fd::BorrowedFd};

use super::options;

const TCP: i32 = libc::IPPROTO_TCP;

const ESTABLISHED: u8 = 1;
const SYN_SENT: u8 = 2;
const SYN_RECEIVED: u8 = 3;
const FIN_WAIT1: u8 = 4;
const FIN_WAIT2: u8 = 5;
const CLOSE: u8 = 7;
const CLOSE_WAIT: u8 = 8;
const LAST_ACK: u8 = 9;
const LISTEN: u8 = 10;
const CLOSING: u8 = 11;

/// `TCP_REPAIR`: on, off with a window probe, and off without.
const REPAIR_ON: i32 = 1;
const REPAIR_OFF: i32 = 0;
const REPAIR_OFF_UNHEARD: i32 = -1;

/// `TCP_REPAIR_QUEUE`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Queue {
    None = 0,
    Receive = 1,
    Send = 2,
}

fn set_repair(fd: BorrowedFd<'_>, value: i32) -> io::Result<()> {
    options::set(fd, TCP, libc::TCP_REPAIR, value)
}

fn select(fd: BorrowedFd<'_>, queue: Queue) -> io::Result<()> {
    options::set(fd, TCP, libc::TCP_REPAIR_QUEUE, queue as i32)
}
