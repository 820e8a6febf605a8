//! Finishes or undoes what a daemon had under way when it died.
//!
//! Read once when the daemon starts, after the runtime has found the VEs that are here. What
//! the log has to say may take until the cluster has a majority; that is waited for in the
//! background, and a VE whose owner is not known stands still meanwhile.

use std::sync::Arc;

use coordinator::{Command, Stage, Verdict};

use super::{
    blackout::CopyError,
    error::MigrateError,
    journal::{Entry, Journal, Step},
    postcopy::{fetch::Fetch, shelf::Shelf},
    settle,
    source::Context,
    standing::Standing,
    target::report_running,
    watchdog,
};
use crate::{
    api::chain,
    ve::{Operation, RECOVER, Ve},
};

/// Looks at every VE of this node for a migration that was under way.
pub(super) fn recover(context: &Context) {
    for ve in context.runtime.all() {
        let journal = Journal::new(ve.directory());
        let entry = match journal.read() {
            Ok(Some(entry)) => entry,
            Ok(None) => continue,
            Err(error) => {
                tracing::error!(id = %ve.id, %error, "cannot read the journal of a migration");
                continue;
            }
        };
        let operation = match ve.operate(RECOVER) {
            Ok(operation) => operation,
            Err(error) => {
                tracing::error!(id = %ve.id, %error, "cannot recover a migration");
                continue;
            }
        };
        tracing::info!(id = %ve.id, ?entry, "a migration was under way");
        if let Err(error) = take_up(context, &ve, &entry) {
            tracing::error!(id = %ve.id, "cannot give out its memory: {}", chain(&error));
        }
        let context = context.clone();
        tokio::spawn(async move {
            if let Err(error) = recover_one(&context, operation, entry, &journal).await {
                tracing::error!(id = %ve.id, "cannot recover a migration: {}", chain(&error));
            }
        });
    }
}

/// What must be so before anybody is served: what is still to come of a VE that runs, that one may run
/// elsewhere, and its pages.
fn take_up(context: &Context, ve: &Arc<Ve>, entry: &Entry) -> Result<(), MigrateError> {
    if entry.step == Step::Sealed {
        ve.set_leaving(true);
    }
    let (Some(other), Some(running)) = (entry.postcopy, ve.running()) else { return Ok(()) };
    match entry.step {
        Step::Sealed => {
            let shelf = Shelf::open(running.cgroups.freezer(), other);
            let shelf = Arc::new(shelf.map_err(MigrateError::Inside)?);
            context.shelves.put(entry.migration, shelf);
        }
        // How much the keeper says.
        Step::Released => ve.set_missing(Some(0)),
        Step::Copying | Step::Building => {}
    }
    Ok(())
}

async fn recover_one(
    context: &Context,
    operation: Operation,
    entry: Entry,
    journal: &Journal,
) -> Result<(), MigrateError> {
    let Entry { migration, step, postcopy } = entry;
    let coordinator = &context.coordinator();
    match step {
        Step::Copying => {
            wake(context, &operation.ve).await?;
            settle::abort(coordinator, migration, journal).await;
        }
        Step::Sealed => match settle::ask(coordinator, migration).await {
            Verdict::Moved => {
                context.shelves.clear(migration);
                context.runtime.forget(operation).await?;
                settle::finish(coordinator, migration).await;
            }
            Verdict::Stays => {
                context.shelves.clear(migration);
                wake(context, &operation.ve).await?;
                operation.ve.set_leaving(false);
                journal.remove().map_err(MigrateError::Inside)?;
            }
        },
        Step::Building => {
            context.runtime.forget(operation).await?;
            disown(context, entry).await;
        }
        Step::Released => {
            wake(context, &operation.ve).await?;
            let ve = operation.ve.clone();
            drop(operation);
            match postcopy {
                Some(source) if ve.missing().is_some() => {
                    Fetch { context: context.clone(), migration, ve, source }.resume().await;
                }
                _ => report_running(coordinator, migration, journal).await,
            }
        }
    }
    Ok(())
}

/// Nothing of the VE is here, and never ran here: the source may have it.
pub(super) async fn disown(context: &Context, entry: Entry) {
    let migration = entry.migration;
    let coordinator = &context.coordinator();
    loop {
        let command = match settle::stage(coordinator, migration).await {
            Some(Stage::Begun) => Command::AbortMigration { migration },
            Some(Stage::Switched) => {
                let state = coordinator.state();
                let Some(record) = state.migrations.get(&migration) else { return };
                Command::ReturnVe { migration, epoch: record.epoch.next() }
            }
            Some(_) => return,
            None => {
                tokio::time::sleep(settle::PAUSE).await;
                continue;
            }
        };
        if let Err(error) = coordinator.propose(command).await {
            tracing::debug!(%migration, %error, "asking again");
            tokio::time::sleep(settle::PAUSE).await;
        }
    }
}

/// Puts a VE right that was left standing, once the watchdog of the dead daemon has done its part.
pub(super) async fn wake(context: &Context, ve: &Arc<Ve>) -> Result<(), MigrateError> {
    let Some(running) = ve.running() else { return Ok(()) };
    let standing = Standing {
        freezer: running.cgroups.freezer().to_owned(),
        init: running.init,
        id_base: context.runtime.handle(ve)?.id_base,
        interface: running.interface,
        cpu: None,
    };
    let (limits, directory) = (ve.settings().limits, ve.directory().to_owned());
    tokio::task::spawn_blocking(move || {
        watchdog::wait_for_last(&directory).map_err(MigrateError::Inside)?;
        standing.put_right()?;
        // The VE may have been slowed down.
        Ok(running.cgroups.apply(&limits).map_err(CopyError::Cpu)?)
    })
    .await?
}
