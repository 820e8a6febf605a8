//! The node daemon `vzd` as a library: what runs Virtual Environments (VEs) on one host.
//!
//! One daemon per host. It creates and runs VEs ([`ve`]), keeps their files ([`storage`],
//! [`template`]), connects them ([`network`]), limits them ([`cgroup`]), moves them to other
//! nodes ([`migration`], which also checkpoints them into files, [`image`]) when the cluster's log
//! allows it ([`cluster`]), and takes orders from the vz programs over a unix socket ([`api`]). VEs
//! do not die with the daemon. What it tells monitoring systems is in [`metrics`] and [`scrape`].
#![forbid(unsafe_code)]

pub mod api;
pub mod cgroup;
pub mod cluster;
pub mod config;
pub mod daemon;
pub mod image;
pub mod metrics;
pub mod migration;
pub mod network;
pub mod program;
pub mod scrape;
pub mod storage;
pub mod template;
pub mod ve;
