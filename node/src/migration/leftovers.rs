//! Tells the log what is not here any more.
//!
//! The log lets no VE come back to a node on which an earlier copy of it may still lie. Usually
//! the end that removes its copy says so at once; but it may have died before, the log may have
//! had no leader just then, or an offer that was called off may never have arrived. So every
//! node looks through what the log still expects of it, and says what is done.

use std::time::Duration;

use coordinator::{MigrationId, Stage, State};

use super::{settle, source::Context};

/// Between two looks when nothing changes.
const INTERVAL: Duration = Duration::from_secs(1);

/// Watches the log for as long as the daemon runs.
pub(super) async fn watch(context: Context) {
    loop {
        let coordinator = context.coordinator();
        let mut states = coordinator.watch();
        let state = states.borrow_and_update().clone();
        for migration in gone(&context, &state) {
            settle::finish(&coordinator, migration).await;
        }
        // Not held while waiting: a node that joins a cluster gets another one.
        drop((coordinator, state));
        match tokio::time::timeout(INTERVAL, states.changed()).await {
            Ok(Ok(())) | Err(_) => {}
            Ok(Err(_)) => tokio::time::sleep(INTERVAL).await,
        }
    }
}

/// The migrations that ended with the VE elsewhere, and of whose copy nothing is here.
fn gone(context: &Context, state: &State) -> Vec<MigrationId> {
    let node = context.cluster.node();
    state
        .unfinished_on(node)
        .filter(|record| match record.stage {
            Stage::Aborted | Stage::Returned => record.target == node,
            Stage::Running => record.source == node,
            Stage::Begun | Stage::Switched | Stage::Finished => false,
        })
        .filter(|record| context.runtime.find(&record.ve.to_string()).is_err())
        .map(|record| record.id)
        .collect()
}
