//! The source's part of post-copy: the decision for it, and what follows the switch.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use coordinator::Stage;
use tokio::task::spawn_blocking;

use super::{MigrateError, Session, ms};
use crate::{
    api::Sink,
    migration::{
        blackout::Still,
        journal::Step,
        messages::Item,
        postcopy::{
            PostcopyReport,
            later::Memory,
            shelf::{Outcome, Shelf},
        },
        rounds::Prediction,
        settle,
    },
};

/// The smallest share of the pages to come later that is worth the risk.
const WORTH_IT: f64 = 0.25;
/// Between two words about how far it is.
const PROGRESS: Duration = Duration::from_millis(200);
/// How often the log is asked although nothing is heard of the target.
const ASK: Duration = Duration::from_secs(2);

/// Decides what is sent while the VE stands still, and what that makes of the blackout. `plain` is
/// the share of the pages that could come later, if that is needed and allowed.
pub(super) fn choose(
    predicted: Prediction,
    plain: Option<f64>,
    sink: &Sink,
) -> (Prediction, Memory) {
    match plain {
        Some(plain) if plain >= WORTH_IT => {
            let without = predicted.without(plain);
            sink.log(format!(
                "the VE writes faster than it can be copied: it is moved by post-copy, with about \
                 {:.0} ms of blackout instead of {:.0} ms",
                ms(without.total),
                ms(predicted.total)
            ));
            (without, Memory::Later)
        }
        Some(plain) => {
            sink.log(format!(
                "post-copy would not help: only {:.0} % of what the VE writes is memory that can \
                 come later",
                plain * 100.0
            ));
            (predicted, Memory::Whole)
        }
        None => (predicted, Memory::Whole),
    }
}

/// What is to be given out after the switch.
pub(super) struct Left {
    shelf: Arc<Shelf>,
    bytes: u64,
}

impl Session {
    /// Has the target get ready while the VE still runs.
    pub(super) async fn announce_postcopy(&self) -> Result<(), MigrateError> {
        let pipe = self.pipe.clone();
        spawn_blocking(move || pipe.item(Item::Postcopy)).await?.map_err(|_| MigrateError::Broken)
    }

    /// Writes down that only the log knows whose the VE is, and prepares to give out what was kept
    /// back of its memory, if anything was.
    pub(super) fn shelve(&self, still: &Still) -> Result<Option<Left>, MigrateError> {
        let (journal, migration) = (&self.begun.journal, self.begun.migration);
        if still.later.is_empty() {
            journal.write(migration, Step::Sealed).map_err(MigrateError::Journal)?;
            return Ok(None);
        }
        let freezer = still.freezer().ok_or(MigrateError::Protocol)?;
        let shelf = Shelf::open(freezer, self.target)
            .and_then(|shelf| shelf.check(still.later.keys().copied()).map(|()| shelf));
        let shelf = Arc::new(shelf.map_err(MigrateError::Inside)?);
        journal
            .write_postcopy(migration, Step::Sealed, self.target)
            .map_err(MigrateError::Journal)?;
        self.begun.context.shelves.put(migration, shelf.clone());
        Ok(Some(Left { shelf, bytes: still.later.values().sum() }))
    }

    /// Gives out pages until the log says that the target needs none any more.
    pub(super) async fn give_out(
        &self,
        left: Left,
        switched: Instant,
        sink: &Sink,
    ) -> PostcopyReport {
        let Left { shelf, bytes } = left;
        let (migration, ve) = (self.begun.migration, self.operation.ve.id.number());
        let target = &self.names.1;
        sink.log(format!(
            "VE {ve} runs on {target}; {} MiB of its memory follow",
            bytes.div_ceil(1 << 20)
        ));
        let coordinator = self.begun.context.coordinator();
        let mut states = coordinator.watch();
        let mut outcome = shelf.outcome();
        let mut asked = Instant::now();
        let mut complete_ms = None;
        loop {
            tokio::select! {
                Ok(()) = states.changed() => asked = Instant::now() - ASK,
                Ok(()) = outcome.changed() => complete_ms = Some(ms(switched.elapsed())),
                () = tokio::time::sleep(PROGRESS) => {}
            }
            sink.progress("post-copy", shelf.given().min(bytes), Some(bytes), "bytes");
            if asked.elapsed() >= ASK {
                let stage = settle::stage(&coordinator, migration).await;
                if !matches!(stage, Some(Stage::Begun | Stage::Switched) | None) {
                    break;
                }
                asked = Instant::now();
            }
        }
        let outcome = *outcome.borrow();
        if !matches!(outcome, Some(Outcome::Complete { .. })) {
            sink.log(format!("VE {ve} ended on {target} before all its memory had come"));
        }
        self.begun.context.shelves.clear(migration);
        PostcopyReport {
            pages: shelf.pages(),
            bytes: shelf.bytes(),
            faults: match outcome {
                Some(Outcome::Complete { faults }) => faults,
                _ => 0,
            },
            ms: complete_ms.unwrap_or_else(|| ms(switched.elapsed())),
        }
    }
}
