//! What an ordinary program asks of the kernel, in safe form.
//!
//! The engine uses none of it. Programs that are to be moved do: the self-checking workloads hold
//! maps, signals, timers and registers of every kind through these types.

pub mod advice;
pub mod aio;
pub mod bits32;
pub mod control;
pub mod descriptor;
pub mod dispatch;
pub mod filter;
pub mod fork;
pub mod futex;
pub mod keys;
pub mod map;
pub mod message;
pub mod mutex;
pub mod registers;
pub mod signal;
pub mod sysv;
pub mod terminal;
pub mod watch;
