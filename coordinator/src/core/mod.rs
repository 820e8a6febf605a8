//! The pure core: a request in, an answer out. No clock, no socket, no file.

mod apply;
mod command;
mod ids;
#[cfg(test)]
mod invariants;
mod state;

pub(crate) use apply::Core;
pub use command::{
    Answer, Clash, Command, NodeFacts, Refused, Request, Response, VeBrought, VeFacts,
};
pub use ids::{BadId, Epoch, MigrationId, RequestId, VeId};
pub use state::{Desired, MigrationRecord, Stage, State, TokenRecord, VeRecord, Verdict};
