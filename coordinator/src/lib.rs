//! Who owns which Virtual Environment, and who belongs to the cluster.
//!
//! A pure core (a request in, an answer out; no clock, no socket, no file) behind a replicated,
//! crash-safe log. The promises, each with a test of its own name: *one owner* · *stages and
//! epochs never go back* · *of switch and abort the first wins* · *a request sent twice has one
//! effect and one answer*.
#![forbid(unsafe_code)]

mod core;
mod handle;
mod raft;

pub use core::{
    Answer, BadId, Clash, Command, Desired, Epoch, MigrationId, MigrationRecord, NodeFacts,
    Refused, Request, RequestId, Response, Stage, State, TokenRecord, VeBrought, VeFacts, VeId,
    VeRecord, Verdict,
};
pub use handle::{Coordinator, CoordinatorConfig, Leadership, OpenError, ProposeError, ReadError};
