//! How the vz programs talk to the daemon: a unix socket for root.
//!
//! A connection carries one request: one line of JSON, [`Request`], with file descriptors beside
//! it where a request takes some. The answer is a line of JSON for each [`Event`], the last one a
//! result or an error. Whoever closes the connection early asks for the request to be given up.
//!
//! To add a group of requests: a file here with its enum and `handle`, a variant in [`Request`],
//! and an arm in [`server`].

mod client;
mod cluster;
mod node;
mod server;
mod template;
mod ve;
mod wire;

pub use client::{Canceller, Client};
pub use cluster::{ClusterRequest, MemberView};
pub use node::{NodeRequest, NodeStatus};
pub use server::{ServeError, Sink, serve};
pub use template::TemplateRequest;
pub use ve::{ExecRequest, VeRequest};
pub use wire::{Event, Failure, Progress, Request, chain};
