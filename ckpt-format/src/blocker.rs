//! An object in the VE that cannot be moved, found before anything starts.

use serde::{Deserialize, Serialize};

/// One reason why a VE cannot be captured now, with what the operator needs to act on it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Blocker {
    /// The process that holds the object, as numbered inside the VE.
    pub pid: i32,
    /// The command name of that process.
    pub command: String,
    /// The file descriptor, where the object is one.
    pub fd: Option<i32>,
    /// What it is, e.g. `io_uring ring` or `process traced by pid 77`.
    pub object: String,
    /// What the operator can do about it.
    pub hint: String,
}

impl std::fmt::Display for Blocker {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "pid {} ({})", self.pid, self.command)?;
        if let Some(fd) = self.fd {
            write!(f, " fd {fd}")?;
        }
        write!(f, ": {}; {}", self.object, self.hint)
    }
}
