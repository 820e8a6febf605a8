//! How a workload ends.

use std::fmt;
use std::io;
use std::panic::Location;

/// What a workload found wrong, and where it looked.
#[derive(Clone, Debug)]
pub struct Failure {
    what: String,
    place: &'static Location<'static>,
}

impl Failure {
    /// A failed check.
    #[track_caller]
    pub fn new(what: impl Into<String>) -> Self {
        Self { what: what.into(), place: Location::caller() }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let file = self.place.file().rsplit('/').next().unwrap_or_default();
        write!(f, "{} ({file}:{})", self.what, self.place.line())
    }
}

impl From<io::Error> for Failure {
    #[track_caller]
    fn from(error: io::Error) -> Self {
        Self::new(format!("a call failed: {error}"))
    }
}

impl From<nix::Error> for Failure {
    #[track_caller]
    fn from(error: nix::Error) -> Self {
        Self::new(format!("a call failed: {error}"))
    }
}

/// Fails with the message unless the condition holds.
#[track_caller]
pub fn ensure(holds: bool, what: impl FnOnce() -> String) -> Result<(), Failure> {
    if holds { Ok(()) } else { Err(Failure::new(what())) }
}

/// Fails unless both are equal, and tells both.
#[track_caller]
pub fn same<T: PartialEq + fmt::Debug>(what: &str, found: T, expected: T) -> Result<(), Failure> {
    if found == expected {
        return Ok(());
    }
    Err(Failure::new(format!("{what}: found {found:?}, expected {expected:?}")))
}

/// How much later than asked a timer may come or a wait may end. A move may stop a program for a
/// moment, and waits without an absolute end begin again on the other host; a timer that was lost
/// is later than any of that.
pub const LATE: std::time::Duration = std::time::Duration::from_secs(5);
