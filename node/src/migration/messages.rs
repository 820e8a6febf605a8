//! What source and target say to each other.
//!
//! Control messages are small and answered at once; everything of size travels as [`Item`]s on
//! one bulk stream, whose order is the order in which the target applies them.

use std::collections::BTreeMap;

use bytes::Bytes;
pub(super) use ckpt_format::state::State;
use ckpt_format::{
    container::Container,
    files::RestingConnections,
    memory::Run,
    network::{Frame, Network},
    stream::Record,
    tree::FileRecord,
};
use coordinator::{Epoch, MigrationId, VeId};
use serde::{Deserialize, Serialize};

use crate::{api::Failure, template::Digest};

/// The first message: all that the target needs to know to say yes or no, and to get ready.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Offer {
    /// The migration in the log.
    pub(super) migration: MigrationId,
    /// The VE.
    pub(super) ve: VeId,
    /// The epoch in which the source owns it.
    pub(super) epoch: Epoch,
    /// The text of the VE's configuration.
    pub(super) configuration: String,
    /// The archive of the template below the VE's files.
    pub(super) template: Digest,
    /// Names, file systems, mounts, and what the clocks show as this is sent.
    pub(super) container: Container,
    /// Links, addresses and routes.
    pub(super) network: Network,
    /// The hash of the kernel's vdso: both ends must have the same.
    pub(super) vdso: [u8; 32],
    /// The hash of the vdso that programs of 32 bits have, if the VE runs any: both ends must have
    /// the same.
    #[serde(default)]
    pub(super) vdso_32: Option<[u8; 32]>,
    /// The size of the extended CPU state, which the target's CPU must be able to hold.
    pub(super) extended_state_len: u64,
    /// The memory that the VE uses, in bytes.
    pub(super) memory_bytes: u64,
    /// The memory that it has of huge pages, or is promised, in bytes by the size of a page.
    pub(super) huge_bytes: BTreeMap<u64, u64>,
    /// The files that the VE has changed, in bytes.
    pub(super) disk_bytes: u64,
    /// Only look whether it would work.
    pub(super) check_only: bool,
}

/// From source to target, after the [`Offer`].
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) enum ToTarget {
    /// Everything is said; the source will not run the VE again unless the log says so.
    Sealed {
        /// The frames for the VE that were held so far.
        frames: Vec<Frame>,
    },
    /// More frames that still arrived at the source.
    Late {
        /// In the order of their arrival.
        frames: Vec<Frame>,
    },
    /// The move is off; the VE goes on at the source.
    Abort,
    /// The source has removed its copy.
    Finished,
    /// How many times as much as expected the last moves of the VE have cost.
    Costs {
        /// The latest last.
        factors: Vec<f64>,
    },
}

impl ToTarget {
    /// The version of the protocol from which on [`Self::Costs`] is known.
    pub(super) const COSTS_SINCE: u16 = 2;
}

/// From target to source.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) enum ToSource {
    /// The target is able and has made room.
    Accepted {
        /// The target lacks the template: send it first.
        template_missing: bool,
    },
    /// The target cannot take the VE.
    Refused(Failure),
    /// Everything up to this barrier is applied.
    Applied {
        /// The number in [`Item::Barrier`].
        barrier: u32,
    },
    /// The VE stands ready to run.
    Ready {
        /// How long the rebuild took after the last data had come, in milliseconds.
        restore_ms: f64,
    },
    /// The VE runs on the target.
    Running {
        /// How long the entry in the log took, in milliseconds.
        commit_ms: f64,
        /// From the commit to the moment at which the VE ran, in milliseconds.
        release_ms: f64,
    },
    /// The target gave up; the log knows who owns the VE.
    Failed(Failure),
}

/// One piece of the bulk stream.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) enum Item {
    /// A piece of the template's archive.
    Template(Bytes),
    /// The archive is complete.
    TemplateEnd,
    /// A change of the VE's files.
    File(FileRecord),
    /// A change of the VE's processes and memory.
    Memory(Record),
    /// To be answered with [`ToSource::Applied`].
    Barrier(u32),
    /// A piece of the encoded [`State`]; the last one completes it.
    State {
        /// The bytes.
        bytes: Bytes,
        /// Nothing follows.
        last: bool,
    },
    /// Post-copy is about to begin: get ready for it.
    Postcopy,
    /// These pages come when the VE runs already, in this order; what was sent for them before is
    /// void.
    Later {
        /// The process.
        pid: i32,
        /// Which pages.
        runs: Vec<Run>,
    },
    /// How many descriptors the target will need at once for what the VE has open.
    Descriptors(u32),
    /// Connections of the VE that rest while it runs, and those that do so no longer.
    Connections(RestingConnections),
    /// Processes of the state that follows, as a list; the last piece completes it.
    Processes {
        /// The bytes.
        bytes: Bytes,
        /// Nothing more of this list follows.
        last: bool,
    },
}

/// The most runs in one [`Item::Later`].
pub(super) const LATER_MAX: usize = 1 << 16;

/// The most bytes of a [`State`], or of a list of processes, in one [`Item`].
pub(super) const STATE_PIECE: usize = 1 << 20;

#[cfg(test)]
pub(super) mod tests {
    use ckpt_format::codec;
    use serde::de::DeserializeOwned;

    /// A value of which nothing is told: every number in it is zero, every list empty.
    pub(in crate::migration) fn plain<T: DeserializeOwned>() -> T {
        let zeros = (0..4096).find_map(|len| codec::decode(&vec![0; len]).ok());
        zeros.expect("zeros are a value")
    }
}
