//! Filters on system calls that programs have installed themselves.

use serde::{Deserialize, Serialize};

/// The most instructions of a filter that the kernel takes (`BPF_MAXINSNS`).
pub const INSTRUCTIONS_MAX: usize = 4096;

/// One filter. Threads refer to it by its place in
/// [`Processes::filters`](crate::process::Processes::filters).
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Filter {
    /// The classic BPF program, as `struct sock_filter`s of eight bytes each.
    #[serde(with = "serde_bytes")]
    pub program: Vec<u8>,
    /// `SECCOMP_FILTER_FLAG_LOG`.
    pub logs: bool,
}
