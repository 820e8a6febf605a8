//! What a checkpointed VE is, and what it needs to be restored.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::{container::Container, network::Network};

/// The longest manifest accepted, in bytes.
pub const MANIFEST_MAX: u64 = 64 << 20;

/// What a checkpointed VE is, and what it needs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    /// The number of the VE.
    pub ve: u32,
    /// The text of its configuration.
    pub configuration: String,
    /// The digest of the archive of its template, as hexadecimal digits.
    pub template: String,
    /// Names, file systems and mounts; the clocks as they were at the freeze.
    pub container: Container,
    /// Links, addresses and routes.
    pub network: Network,
    /// What it was captured on.
    pub host: Host,
    /// Where its own files are.
    pub own_files: OwnFiles,
    /// How much of everything there is.
    pub summary: Summary,
    /// The memory that it needs of huge pages, in bytes by the size of a page.
    #[serde(default)]
    pub huge_bytes: BTreeMap<u64, u64>,
    /// The BLAKE3 hash of the vdso that the kernel gave to programs of 32 bits, if the VE ran any: a
    /// restore needs the same.
    #[serde(default)]
    pub vdso_32: Option<[u8; 32]>,
}

/// The host on which a VE was captured, as far as that matters.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Host {
    /// The release of its kernel.
    pub kernel: String,
    /// The BLAKE3 hash of the kernel's vdso: a restore needs the same.
    pub vdso: [u8; 32],
    /// How many bytes the CPU saves of a thread's extended state: a restore needs as many.
    pub extended_state_len: u64,
    /// What the CPU can do, in the words of `/proc/cpuinfo`: programs may count on each.
    pub cpu_features: Vec<String>,
}

/// What a checkpoint has of the files that are the VE's own: what it has changed of its template.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum OwnFiles {
    /// A list of what they were, to compare: they stay with the VE.
    Listed,
    /// All of them.
    Included,
}

/// How much of everything a checkpoint has.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Summary {
    /// Processes, zombies included.
    pub processes: u64,
    /// Threads.
    pub threads: u64,
    /// Descriptors in all tables.
    pub descriptors: u64,
    /// Open files, each counted once.
    pub open_files: u64,
    /// Memory that was written, in bytes.
    pub memory_bytes: u64,
    /// Of that, zeros, in bytes.
    pub zero_bytes: u64,
    /// Of that, the same as something before, in bytes.
    pub repeated_bytes: u64,
    /// File data, in bytes.
    pub file_bytes: u64,
}
