//! Pseudo terminals whose both sides are in the VE.
//!
//! What is written and not yet read cannot be peeked at, so it is looked at where the kernel keeps
//! it. Where that cannot be, it is read out, and put back when the originals are to run on. Putting
//! back must not pass through the terminal's own processing a second time, so the settings change
//! for that moment. Canonical mode is never switched over a buffer that holds something, because
//! that joins its lines.

mod buffers;
mod capture;
mod look;
mod rebuild;
#[cfg(test)]
mod tests;

pub(super) use buffers::Drained;
pub(super) use capture::{Side, capture, check, side};
pub(super) use rebuild::{Terminals, finish, rebuild, settle};
