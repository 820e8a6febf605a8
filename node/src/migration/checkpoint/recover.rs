//! Finishes or undoes checkpoints and restores that a daemon had under way when it died.

use std::sync::Arc;

use super::{
    discard_suspended,
    error::CheckpointError,
    journal::{Files, Journal, Step},
    restore,
};
use crate::{
    api::chain,
    migration::{recover::wake, source::Context},
    ve::{Operation, RECOVER, StopMode, Ve},
};

/// Looks at every VE of this node for something that was under way. Call once, when the runtime
/// has found the VEs that are here.
pub(in crate::migration) fn recover(context: &Context) {
    for ve in context.runtime.all() {
        let journal = Journal::new(ve.directory());
        let step = match journal.read() {
            Ok(Some(step)) => step,
            Ok(None) => {
                if ve.running().is_some() && ve.suspended_file().exists() {
                    // The last thing that a resume does.
                    discard_suspended(&ve);
                }
                continue;
            }
            Err(error) => {
                tracing::error!(id = %ve.id, "cannot read the journal of a checkpoint: {}", chain(&error));
                continue;
            }
        };
        let operation = match ve.operate(RECOVER) {
            Ok(operation) => operation,
            Err(error) => {
                tracing::error!(id = %ve.id, %error, "cannot recover a checkpoint");
                continue;
            }
        };
        tracing::info!(id = %ve.id, ?step, "a checkpoint or a restore was under way");
        let context = context.clone();
        tokio::spawn(async move {
            if let Err(error) = recover_one(&context, operation, step, &journal, &ve).await {
                tracing::error!(id = %ve.id, "cannot recover a checkpoint: {}", chain(&error));
            }
        });
    }
}

async fn recover_one(
    context: &Context,
    operation: Operation,
    step: Step,
    journal: &Journal,
    ve: &Arc<Ve>,
) -> Result<(), CheckpointError> {
    match step {
        Step::Dumping => {
            wake(context, ve).await?;
            // Complete or not: the VE went on.
            if ve.running().is_some() {
                discard_suspended(ve);
            }
        }
        Step::Stopping => {
            if ve.running().is_some() {
                context.runtime.stop(ve, StopMode::Fast).await?;
            }
        }
        Step::Restoring { files } => {
            let id = ve.id;
            restore::undo(context, operation, files, journal).await?;
            if files == Files::Arrived {
                context.runtime.disown(id).await;
            }
            return Ok(());
        }
        Step::Released { .. } => {
            wake(context, ve).await?;
            context.runtime.settle_files(ve)?;
            discard_suspended(ve);
            context.runtime.wants(ve.id, true).await?;
        }
    }
    journal.remove().map_err(CheckpointError::Journal)
}
