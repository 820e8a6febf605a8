//! This node's part in the cluster: membership, and who owns which VE.
//!
//! A daemon is always in a cluster, if only in one of its own: the same log, with itself as the
//! only voter and no open port. `vzcluster init` opens the port and makes the cluster's
//! authority; `vzcluster join` swaps the node's own log for the cluster's, in one step, and takes
//! the VEs of the node along.
//!
//! Other parts of the daemon use [`Cluster`]: the VE runtime enters its VEs ([`Cluster::adopt`]
//! and its neighbours), a migration talks to the log ([`Cluster::coordinator`]) and to the other
//! end ([`Cluster::peer`]; [`Cluster::serve_migrations`] for the end that is called).

mod admission;
mod doctor;
mod failure;
mod files;
mod joining;
mod registry;
mod service;
mod status;

pub use admission::JoinAnswer;
pub use coordinator::{Desired, VeFacts, VeId};
pub use doctor::{HostReport, Missing, obstacle};
pub use files::{FilesError, Member};
pub use service::{Cluster, ClusterError, InitOptions, JoinOptions};
pub use status::{ClusterStatus, NodeState, NodeView, VeView};
