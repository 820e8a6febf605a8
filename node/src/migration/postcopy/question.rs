//! What the two nodes say to each other about missing pages.

use std::time::Duration;

use ckpt_format::memory::Run;
use coordinator::MigrationId;
use serde::{Deserialize, Serialize};

/// How long an answer may take.
pub(super) const ANSWER: Duration = Duration::from_secs(10);

/// From the node that asks.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(in crate::migration) enum Question {
    /// Could you take in a VE with missing pages?
    Able,
    /// I have taken over this VE: give me the pages that I ask for from now on.
    Fetch {
        /// Which one.
        migration: MigrationId,
    },
    /// These pages.
    Want {
        /// The process.
        pid: i32,
        /// The pages.
        run: Run,
        /// Somebody waits for them.
        urgent: bool,
    },
    /// Nothing is missing any more.
    Complete {
        /// How often somebody had to wait.
        faults: u64,
    },
    /// The VE has ended before.
    Ended,
}

/// From the node that is asked. Pages themselves come on the bulk stream.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(in crate::migration) enum Answer {
    /// Yes.
    Able,
    /// No.
    Unable {
        /// Why not.
        cause: String,
    },
    /// Ask.
    Serving,
    /// There is no such VE here, or not any more: what is missing will never come.
    Gone,
}
