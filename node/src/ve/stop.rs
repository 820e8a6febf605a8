//! Stopping VEs.

use std::{sync::Arc, time::Duration};

use serde::{Deserialize, Serialize};
use tokio::task::spawn_blocking;
use tracing::{info, warn};

use super::{Running, Runtime, Ve, VeError, exec::run_quietly};
use crate::api::chain;

/// How long the end of killed processes may take.
const KILL_MAX: Duration = Duration::from_secs(20);

/// How to stop a VE.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum StopMode {
    /// Let its init end everything; kill what is left after the VE's time for that.
    Orderly,
    /// Kill everything now.
    Fast,
}

impl Runtime {
    /// Stops a VE, whose lock the caller holds. Returns when nothing of it runs any more. Of a
    /// suspended one the checkpoint is thrown away, if that was asked for.
    pub async fn stop(self: &Arc<Self>, ve: &Arc<Ve>, mode: StopMode) -> Result<(), VeError> {
        if ve.is_suspended() {
            return match mode {
                StopMode::Orderly => Err(VeError::Suspended { id: ve.id }),
                StopMode::Fast => ve.discard_suspended(),
            };
        }
        let running = ve.must_run()?;
        ve.state().stopping = true;
        let mut ended = false;
        if mode == StopMode::Orderly {
            match halt(running.clone()).await {
                Ok(()) => {
                    let timeout = Duration::from_secs(ve.settings().stop_timeout_s);
                    ended = tokio::time::timeout(timeout, ve.stopped()).await.is_ok();
                }
                Err(problem) => {
                    warn!(id = %ve.id, "cannot halt it, killing it: {}", chain(&problem));
                }
            }
        }
        if !ended {
            info!(id = %ve.id, "killing all its processes");
            let cgroups = running.cgroups.clone();
            spawn_blocking(move || cgroups.kill_all()).await??;
            let killed = tokio::time::timeout(KILL_MAX, ve.stopped()).await;
            killed.map_err(|_| VeError::NotStopped { id: ve.id })?;
        }
        ve.settled().await;
        self.set_desired(ve.id, false).await?;
        info!(id = %ve.id, "stopped");
        Ok(())
    }

    /// Ends a VE that must not run any longer, whoever has its lock.
    pub async fn kill(self: &Arc<Self>, ve: &Arc<Ve>) -> Result<(), VeError> {
        let Some(running) = ve.running() else { return Ok(()) };
        spawn_blocking(move || running.cgroups.kill_all()).await??;
        let killed = tokio::time::timeout(KILL_MAX, ve.stopped()).await;
        killed.map_err(|_| VeError::NotStopped { id: ve.id })
    }
}

/// Tells the VE's init to end everything.
async fn halt(running: Running) -> Result<(), VeError> {
    run_quietly(running, &["/sbin/halt"]).await.map(drop)
}
