//! Virtual Environments on this node: their configuration, their life, and who may do what.
//!
//! [`Runtime`] knows all VEs of the node. What a VE is lies in `state_dir/ve/ID`: `ve.conf`
//! ([`config`], in OpenVZ's format), `place.json` (what ties it to this node), `running.json`
//! while it runs, and `store/` with its files. A running VE does not need the daemon; one that
//! starts finds the VEs that run and takes them over.
//!
//! Every operation that changes a VE holds its lock ([`Operation`]); a second one is refused, not
//! queued.

mod addresses;
pub mod config;
mod create;
mod error;
mod exec;
mod id;
mod list;
mod migrate;
mod place;
mod registry;
mod restore;
mod running;
mod runtime;
mod set;
mod settings;
mod start;
mod stop;

pub(crate) use self::place::{MOVE_JOURNAL, read as read_durable};
pub use self::{
    create::Created,
    error::VeError,
    exec::{Exec, Streams},
    id::VeId,
    list::{Listed, Status},
    migrate::{Arrival, Handle, Prepared},
    place::Place,
    registry::{Entry, Registry, RegistryError},
    running::Running,
    runtime::{ARRIVE, Operation, RECOVER, Runtime, SEED_ARGUMENT, Ve},
    settings::{Changes, Settings},
    start::INTERFACE,
    stop::StopMode,
};
