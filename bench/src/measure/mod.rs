//! Numbers from repeated measurements, and the machine that they are from.

pub mod machine;
pub mod process;
pub mod statistics;
