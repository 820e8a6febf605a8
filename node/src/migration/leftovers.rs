//! Tells the log what is not here any more.
//!
//! The log lets no VE come back to a node on which an earlier copy of it may still lie. Usually
//! the end that removes its copy says so at once; but it may have died before, the log may have
//! had no leader just then, or an offer that was called off may never have arrived. So every
//! node looks through what the log still expects of it, and says what is done.

use std::time::Duration;

use coordinator::{Command, MigrationRecord, Stage, State};

use super::{settle, source::Context};

/// Between two looks when nothing changes.
const INTERVAL: Duration = Duration::from_secs(1);

/// Watches the log for as long as the daemon runs.
pub(super) async fn watch(context: Context) {
    loop {
        let coordinator = context.coordinator();
        let mut states = coordinator.watch();
        let state = states.borrow_and_update().clone();
        for record in nothing_here(&context, &state) {
            let migration = record.id;
            match record.stage {
                Stage::Switched => {
                    tracing::warn!(ve = %record.ve, %migration, "nothing is here of a VE: giving it back");
                    let epoch = record.epoch.next();
                    let returned = Command::ReturnVe { migration, epoch };
                    if let Err(error) = coordinator.propose(returned).await {
                        tracing::debug!(%migration, %error, "asking again");
                    }
                }
                _ => settle::finish(&coordinator, migration).await,
            }
        }
        // Not held while waiting: a node that joins a cluster gets another one.
        drop((coordinator, state));
        match tokio::time::timeout(INTERVAL, states.changed()).await {
            Ok(Ok(())) | Err(_) => {}
            Ok(Err(_)) => tokio::time::sleep(INTERVAL).await,
        }
    }
}

/// The migrations that wait for a word of this node, where nothing of the VE is: those that ended
/// with it elsewhere, and those that brought it here. A copy is here from before the switch on.
fn nothing_here<'a>(
    context: &Context,
    state: &'a State,
) -> impl Iterator<Item = &'a MigrationRecord> {
    let node = context.cluster.node();
    state
        .unfinished_on(node)
        .filter(move |record| match record.stage {
            Stage::Aborted | Stage::Returned | Stage::Switched => record.target == node,
            Stage::Running => record.source == node,
            Stage::Begun | Stage::Finished => false,
        })
        .filter(|record| context.runtime.find(&record.ve.to_string()).is_err())
}
