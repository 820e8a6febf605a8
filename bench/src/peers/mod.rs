//! The limit of the machine itself, and the ways people do it today.

pub mod criu;
pub mod memory;
