//! What the state of a Virtual Environment looks like as data.
//!
//! Everything here is pure: no clock, no socket, no file. The engine fills these types on the
//! source and rebuilds from them on the target; the same types are the manifest of a checkpoint.
//! Process and thread numbers, user and group ids are always those *inside* the VE.
#![forbid(unsafe_code)]

pub mod blocker;
pub mod codec;
pub mod container;
pub mod controls;
pub mod files;
pub mod image;
pub mod ipc;
pub mod keys;
pub mod memory;
pub mod network;
pub mod process;
pub mod seccomp;
pub mod state;
pub mod stream;
pub mod tree;
