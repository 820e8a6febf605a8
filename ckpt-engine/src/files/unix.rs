//! Unix sockets.
//!
//! Who is connected to whom, and who waits to be accepted, is told by the kernel's socket
//! diagnosis; what is in the queues is read by peeking, which consumes nothing and hands out
//! the descriptors in flight.
//!
//! Names need care on the target: the accepted ends of a server all have the name of their
//! listener. A path can be bound any number of times in an empty file system that nobody sees;
//! an abstract name goes from a listener of the moment to the connections that it accepts.

mod accepted;
mod bind;
mod capture;
pub(super) mod diagnosis;
mod queue;
mod rebuild;
#[cfg(test)]
mod tests;
mod urgent;

pub(super) use capture::{capture, check, connect};
pub(super) use diagnosis::{Diagnosis, dump};
pub(super) use queue::fill;
pub(super) use rebuild::{finish, rebuild};
