//! How long each kind of object takes, as one line in the log.

use std::{collections::BTreeMap, time::Duration};

use ckpt_format::files::Kind;

/// Adds up times; tells them when it is dropped.
#[derive(Debug)]
pub(super) struct Spent {
    what: &'static str,
    kinds: BTreeMap<&'static str, (u32, Duration)>,
}

impl Spent {
    /// `what` is done with the objects.
    pub(super) fn new(what: &'static str) -> Self {
        Self { what, kinds: BTreeMap::new() }
    }

    /// One object was dealt with.
    pub(super) fn add(&mut self, kind: &Kind, time: Duration) {
        let (count, total) = self.kinds.entry(kind.name()).or_default();
        *count += 1;
        *total += time;
    }
}

impl Drop for Spent {
    fn drop(&mut self) {
        let told = self.kinds.iter().map(|(kind, (count, total))| {
            format!("{count} {kind} {:.2}", total.as_secs_f64() * 1000.0)
        });
        let told: Vec<String> = told.collect();
        tracing::info!("objects {} of a VE, in ms by kind: {}", self.what, told.join(", "));
    }
}
