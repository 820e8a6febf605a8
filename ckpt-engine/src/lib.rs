//! Freezes, tracks, captures and rebuilds the process tree of a Virtual Environment.
//!
//! The engine knows no cluster and no network between hosts: it turns processes into the types
//! of `ckpt_format` and back. Everything that talks to the kernel directly is in [`sys`].

mod aio;
pub mod areas;
mod beside;
pub mod bits32;
mod btf;
pub mod capture;
pub mod container;
mod direct_map;
mod due;
mod errno;
mod eye;
pub mod files;
pub mod freeze;
pub mod host;
pub mod huge;
pub mod inject;
pub mod ipc;
mod keys;
mod kin;
mod layered;
pub mod lazy;
mod look;
mod message;
mod momentary;
pub mod procfs;
pub mod ranges;
pub mod rebuild;
pub mod surgeon;
#[expect(unsafe_code, reason = "the only module that talks to the kernel directly")]
pub mod sys;
pub mod track;
pub mod unnamed;
pub mod writers;
