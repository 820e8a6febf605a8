//! Requests about OS templates.

use serde::{Deserialize, Serialize};
use tokio::task::spawn_blocking;

use super::{Failure, Sink, server::to_value};
use crate::{daemon::Daemon, ve::VeError};

/// Requests about OS templates.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum TemplateRequest {
    /// All templates: [`crate::template::Listed`].
    List,
    /// Build the cache if it is missing: [`crate::template::Cache`].
    Create(String),
    /// Build the cache anew: [`crate::template::Cache`].
    Update(String),
    /// Forget the cache.
    Remove(String),
}

pub(super) async fn handle(
    daemon: &Daemon,
    request: TemplateRequest,
    sink: &Sink,
) -> Result<serde_json::Value, Failure> {
    let (runtime, sink) = (daemon.runtime.clone(), sink.clone());
    let work = spawn_blocking(move || -> Result<_, Failure> {
        let templates = runtime.templates();
        match request {
            TemplateRequest::List => to_value(templates.list().map_err(VeError::from)?),
            TemplateRequest::Create(name) => {
                to_value(templates.cached(&name, &sink).map_err(VeError::from)?)
            }
            TemplateRequest::Update(name) => {
                to_value(templates.update(&name, &sink).map_err(VeError::from)?)
            }
            TemplateRequest::Remove(name) => {
                to_value(templates.remove(&name).map_err(VeError::from)?)
            }
        }
    });
    work.await.map_err(VeError::from)?
}
