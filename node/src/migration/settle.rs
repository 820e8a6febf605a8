//! What the log says of a migration, asked as often as it takes.
//!
//! A lost answer decides nothing. Whoever does not know what became of a migration asks here:
//! the source whose target fell silent, and either daemon after it was restarted.

use std::time::Duration;

use coordinator::{
    Command, Coordinator, MigrationId, MigrationRecord, ProposeError, Stage, Verdict,
};

use super::journal::Journal;

/// Between two attempts while the cluster has no majority.
pub(super) const PAUSE: Duration = Duration::from_millis(200);

/// Asks until the migration is settled. One that has not switched yet is called off first, so
/// that the answer cannot change afterwards; one that has switched is waited for: its target
/// either runs the VE or gives it back.
pub(super) async fn ask(coordinator: &Coordinator, migration: MigrationId) -> Verdict {
    loop {
        if let Ok(state) = coordinator.read().await {
            if let Some(verdict) = state.verdict(migration) {
                return verdict;
            }
            let begun = |record: &MigrationRecord| record.stage == Stage::Begun;
            if state.migrations.get(&migration).is_some_and(begun) {
                let abort = Command::AbortMigration { migration };
                match coordinator.propose(abort).await {
                    Ok(_) => continue,
                    Err(error) => {
                        tracing::debug!(%migration, %error, "the migration was not called off");
                    }
                }
            }
        }
        tokio::time::sleep(PAUSE).await;
    }
}

/// The confirmed stage of a migration; none while the cluster cannot confirm anything.
pub(super) async fn stage(coordinator: &Coordinator, migration: MigrationId) -> Option<Stage> {
    let state = coordinator.read().await.ok()?;
    // A migration that the log has forgotten was over long ago, and one that it never heard of
    // never switched: either way nothing waits for it.
    let record = state.migrations.get(&migration);
    Some(record.map_or(Stage::Aborted, |record| record.stage))
}

/// Tells the log that nothing is left of a migration. It may be told once only: the log forgets
/// ended migrations by itself, and nothing depends on this.
pub(super) async fn finish(coordinator: &Coordinator, migration: MigrationId) {
    if let Err(error) = coordinator.propose(Command::FinishMigration { migration }).await {
        tracing::debug!(%migration, %error, "the log was not told that a migration has ended");
    }
}

/// Tells the log that a migration that never came to its seal is off. The VE runs on meanwhile.
pub(super) async fn abort(coordinator: &Coordinator, migration: MigrationId, journal: &Journal) {
    while let Err(error) = coordinator.propose(Command::AbortMigration { migration }).await {
        if let ProposeError::Refused(refused) = error {
            tracing::debug!(%migration, %refused, "the migration was over already");
            break;
        }
        tokio::time::sleep(PAUSE).await;
    }
    if let Err(error) = journal.remove() {
        tracing::warn!(%migration, %error, "cannot remove the journal of a migration");
    }
}
