//! Moves running VEs between nodes.
//!
//! [`source`] and [`target`] are the two halves of one story, each readable from top to bottom;
//! [`rounds`] decides when to freeze and when to step on the [`brake`], [`blackout`] is the source's VE while it stands still,
//! [`builder`] the target's thread that rebuilds it, [`settle`] asks the log what has become of
//! a migration, and [`recover`] does so after a daemon has died half way. [`watchdog`] ends a
//! freeze without it, and [`vain`] says when one that was in vain is tried again. [`leftovers`] tells the log what has been cleared away. [`checkpoint`] puts a
//! file in the place of the link. [`postcopy`] lets a VE run before all its memory is there.

mod admit;
mod blackout;
mod brake;
mod builder;
mod check;
mod checkpoint;
mod connections;
mod contents;
mod error;
mod experience;
pub(crate) mod facts;
mod fixed;
mod holders;
mod journal;
mod leftovers;
mod limiter;
mod messages;
mod packing;
mod parts;
mod pipe;
mod postcopy;
mod recover;
mod repeats;
mod report;
mod rounds;
mod sealed;
mod settle;
mod share;
mod source;
mod squeeze;
mod standing;
mod stopwatch;
mod target;
mod unsent;
mod vain;
mod watchdog;

use std::{process::ExitCode, sync::Arc, time::Duration};

use ckpt_engine::sys::heap;
use ckpt_format::blocker::Blocker;
use futures_util::future::BoxFuture;
use serde::{Deserialize, Serialize};
use tokio::task::spawn_blocking;
use transport::{Link, LinkHandler, PeerInfo};

pub use self::{
    checkpoint::{CheckpointReport, CheckpointRequest, DumpRequest, RestoreReport},
    postcopy::{PostcopyReport, keeper::KEEPER_ARGUMENT},
    report::{Downtime, Report, RoundReport},
    watchdog::WATCHDOG_ARGUMENT,
};
use self::{
    error::MigrateError,
    source::{Context, Wish},
};
use crate::{
    api::{Failure, Sink, chain},
    cluster::Cluster,
    metrics::Metrics,
    ve::{Operation, Runtime, VeError},
};

/// The blackout that a user accepts who says nothing.
pub const MAX_DOWNTIME_DEFAULT_MS: u64 = 100;

/// How often a move of a VE that changes its mounts meanwhile is begun.
const ATTEMPTS_MAX: u32 = 5;

/// What vzmigrate asks for.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct MigrateRequest {
    /// The VE, by number or name.
    pub ve: String,
    /// The name of the target.
    pub node: String,
    /// Only look whether it would work.
    pub check_only: bool,
    /// The blackout that the user accepts, in milliseconds.
    pub max_downtime_ms: u64,
    /// Keep the files at the source, without the right to run them.
    pub keep: bool,
    /// Rather leave the VE where it is than stop it for longer than `max_downtime_ms`.
    #[serde(default)]
    pub strict: bool,
    /// The most that is sent while the VE runs, in bytes per second.
    #[serde(default)]
    pub bandwidth: Option<u64>,
    /// Freeze at once, so that everything is copied while the VE stands still.
    #[serde(default)]
    pub no_precopy: bool,
    /// If nothing else meets `max_downtime_ms`, let the VE run on the target before all its memory
    /// is there.
    #[serde(default)]
    pub postcopy: bool,
}

/// What a process that was started with [`WATCHDOG_ARGUMENT`] does.
pub fn watchdog_main() -> ExitCode {
    watchdog::main()
}

/// What a process that was started with [`KEEPER_ARGUMENT`] does.
pub fn keeper_main() -> ExitCode {
    postcopy::keeper::main()
}

/// The migrations of this node. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Migrations {
    context: Context,
    metrics: Arc<Metrics>,
}

impl Migrations {
    /// For this node's VEs and cluster. Call inside a runtime; takes up what was under way.
    pub fn new(runtime: Arc<Runtime>, cluster: Arc<Cluster>, metrics: Arc<Metrics>) -> Self {
        let context = Context {
            runtime,
            cluster,
            experience: Arc::default(),
            limiter: Arc::default(),
            shelves: Arc::default(),
        };
        recover::recover(&context);
        checkpoint::recover(&context);
        tokio::spawn(leftovers::watch(context.clone()));
        tokio::spawn(limiter::follow(context.clone()));
        Self { context, metrics }
    }

    /// Accepts VEs from other nodes.
    pub fn serve(&self) {
        let pages = Arc::new(Pages(self.context.clone()));
        self.context.cluster.serve_migrations(Arc::new(self.clone()), pages);
    }

    /// Everything in a VE that would stop a move of it now.
    pub async fn blockers(&self, ve: &str) -> Result<Vec<Blocker>, Failure> {
        let operation = self.context.runtime.find(ve)?.operate_for_user("check").await?;
        source::blockers(&self.context, operation).await.map_err(Failure::from)
    }

    /// Moves a VE, or looks whether it could be moved: then there is no report.
    pub async fn migrate(
        &self,
        request: &MigrateRequest,
        sink: &Sink,
    ) -> Result<Option<Report>, Failure> {
        if request.check_only {
            let operation = self.begin(&request.ve).await?;
            source::check(&self.context, operation, &request.node).await.map_err(Failure::from)?;
            return Ok(None);
        }
        let moving = self.metrics.begin_move();
        let moved = self.move_away(request, sink).await;
        drop(moving);
        self.metrics.end_move(moved.as_ref());
        moved.map(Some)
    }

    async fn begin(&self, ve: &str) -> Result<Operation, Failure> {
        let find = |error: VeError| match error {
            VeError::Unknown { .. } => Failure::new("ve-unknown", 10, error.to_string()),
            VeError::Locked { .. } => Failure::new("ve-locked", 20, error.to_string()),
            VeError::Incomplete { .. } => Failure::new("ve-incomplete", 20, error.to_string()),
            other => other.into(),
        };
        let operation = self.context.runtime.find(ve).map_err(find)?;
        let operation = operation.operate_for_user("migrate").await.map_err(find)?;
        operation.ve.must_be_whole().map_err(find)?;
        Ok(operation)
    }

    async fn move_away(&self, request: &MigrateRequest, sink: &Sink) -> Result<Report, Failure> {
        let mut operation = self.begin(&request.ve).await?;
        let wish = Wish {
            target: request.node.clone(),
            max_downtime: Duration::from_millis(request.max_downtime_ms),
            keep: request.keep,
            strict: request.strict,
            bandwidth: request.bandwidth,
            precopy: !request.no_precopy,
            postcopy: request.postcopy,
        };
        let mut attempt = 0;
        let moved = loop {
            attempt += 1;
            let (context, wish, sink) = (self.context.clone(), wish.clone(), sink.clone());
            let log = sink.clone();
            // In a task of its own: a client that goes away cancels by `sink.closed()`, in an
            // orderly way, and never by dropping the work half way.
            let moving = async move { source::migrate(&context, operation, &wish, &sink).await };
            let moved = tokio::spawn(moving).await.map_err(MigrateError::Daemon)?;
            match moved {
                Err(error) if error.is_about_arrangement() && attempt < ATTEMPTS_MAX => {
                    log.log(format!("beginning again: {}", chain(&error)));
                    operation = self.begin(&request.ve).await?;
                }
                moved => break moved,
            }
        };
        spawn_blocking(heap::give_back);
        moved.map_err(Failure::from)
    }
}

/// Serves links for pages that a VE misses. Cheap to clone.
#[derive(Clone, Debug)]
struct Pages(Context);

impl LinkHandler for Pages {
    fn serve(&self, peer: PeerInfo, link: Link) -> BoxFuture<'static, ()> {
        Box::pin(postcopy::serve(self.0.clone(), peer, link))
    }
}

impl LinkHandler for Migrations {
    fn serve(&self, peer: PeerInfo, link: Link) -> BoxFuture<'static, ()> {
        let context = self.context.clone();
        Box::pin(async move {
            target::serve(context, peer.node, link).await;
            spawn_blocking(heap::give_back);
        })
    }
}
