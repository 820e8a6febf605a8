//! Requests about VEs.

use std::os::fd::OwnedFd;

use serde::{Deserialize, Serialize};

use super::{Failure, Sink, server::to_value};
use crate::{
    daemon::Daemon,
    ve::{Changes, Exec, StopMode, Streams, VeError, VeId},
};

/// Requests about VEs. A `ve` is a number or a name.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[expect(missing_docs, reason = "the fields are named as the options of vzctl")]
pub enum VeRequest {
    /// All VEs: a list of [`crate::ve::Listed`].
    List,
    /// Whether a VE is there and runs: [`crate::ve::Status`].
    Status { ve: String },
    /// Make one: [`crate::ve::Created`].
    Create { ve: String, changes: Changes },
    /// Start one, or resume it if it is suspended.
    Start { ve: String, force: bool, wait: bool },
    /// Stop one.
    Stop { ve: String, mode: StopMode },
    /// Stop and start one.
    Restart { ve: String, mode: StopMode, wait: bool },
    /// Change settings.
    Set { ve: String, changes: Changes, save: bool },
    /// Remove one.
    Destroy { ve: String },
    /// What would stop a move now: a list of [`ckpt_format::blocker::Blocker`].
    Check { ve: String },
    /// Run a program: its exit status.
    Exec(ExecRequest),
}

/// Runs a program in a VE. Without a terminal, three descriptors come with the request.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ExecRequest {
    /// The VE.
    pub ve: String,
    /// What to run.
    pub exec: Exec,
}

pub(super) async fn handle(
    daemon: &Daemon,
    request: VeRequest,
    descriptors: Vec<OwnedFd>,
    sink: &Sink,
) -> Result<serde_json::Value, Failure> {
    let runtime = &daemon.runtime;
    match request {
        VeRequest::List => to_value(runtime.list()),
        VeRequest::Status { ve } => to_value(runtime.status(&ve)),
        VeRequest::Create { ve, changes } => {
            let bad = || VeError::BadValue { option: "CTID", value: ve.clone() };
            let number: u32 = ve.parse().map_err(|_| bad())?;
            let id = VeId::try_from(number).map_err(|_| bad())?;
            to_value(runtime.create(id, &changes, sink).await?)
        }
        VeRequest::Start { ve, force, wait } => {
            let found = runtime.find(&ve)?;
            if found.is_suspended() && (force || !found.settings().disabled) {
                daemon.migrations.restore(&ve, None, sink).await?;
                return to_value(());
            }
            let operation = found.operate_for_user("start").await?;
            runtime.start(&operation.ve, force).await?;
            if wait {
                runtime.wait_booted(&operation.ve).await?;
            }
            to_value(())
        }
        VeRequest::Stop { ve, mode } => {
            let operation = runtime.find(&ve)?.operate_for_user("stop").await?;
            to_value(runtime.stop(&operation.ve, mode).await?)
        }
        VeRequest::Restart { ve, mode, wait } => {
            let operation = runtime.find(&ve)?.operate_for_user("restart").await?;
            if operation.ve.running().is_some() {
                runtime.stop(&operation.ve, mode).await?;
            }
            runtime.start(&operation.ve, false).await?;
            if wait {
                runtime.wait_booted(&operation.ve).await?;
            }
            to_value(())
        }
        VeRequest::Set { ve, changes, save } => {
            let operation = runtime.find(&ve)?.operate_for_user("set").await?;
            to_value(runtime.set(&operation.ve, &changes, save).await?)
        }
        VeRequest::Destroy { ve } => {
            let operation = runtime.find(&ve)?.operate_for_user("destroy").await?;
            to_value(runtime.destroy(operation).await?)
        }
        VeRequest::Check { ve } => to_value(daemon.migrations.blockers(&ve).await?),
        VeRequest::Exec(ExecRequest { ve, exec }) => {
            let ve = runtime.find(&ve)?;
            let streams = match <[OwnedFd; 3]>::try_from(descriptors) {
                Ok(streams) => Streams::Given(streams),
                Err(_) if exec.terminal.is_some() => Streams::Terminal,
                Err(_) => {
                    return Err(Failure::new("bad-request", 20, "no standard streams given"));
                }
            };
            to_value(runtime.exec(&ve, exec, streams, sink).await?)
        }
    }
}
