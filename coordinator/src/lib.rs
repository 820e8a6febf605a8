//! Who owns which Virtual Environment, and who belongs to the cluster.
//!
//! A pure core (`state`, `command`, `apply`: a request in, an answer out; no clock, no socket, no
//! file) behind a replicated, crash-safe log. The promises, each with a test of its own name:
//! *one owner* · *stages and epochs never go back* · *of switch and abort the first wins* ·
//! *a request sent twice has one effect and one answer*.
#![forbid(unsafe_code)]

mod apply;
mod command;
mod handle;
mod ids;
mod raft;
mod state;

pub use command::{
    Answer, Clash, Command, NodeFacts, Refused, Request, Response, VeBrought, VeFacts,
};
pub use handle::{Coordinator, CoordinatorConfig, Leadership, OpenError, ProposeError, ReadError};
pub use ids::{BadId, Epoch, MigrationId, RequestId, VeId};
pub use state::{Desired, MigrationRecord, Stage, State, TokenRecord, VeRecord};
