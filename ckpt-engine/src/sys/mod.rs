//! One wrapper per kernel interface: owned descriptors in and out, `io::Error` for every failure.
//!
//! This is the only place with `unsafe` in the whole project.

pub mod program;
