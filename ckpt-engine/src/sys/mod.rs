//! One wrapper per kernel interface: owned descriptors in and out, `io::Error` for every failure.
//!
//! This is the only place with `unsafe` in the whole project.
pub mod ancillary;
pub mod clone;
pub mod mount;
pub mod namespace;
