//! The daemon: everything one node runs, started in order.

use std::{path::PathBuf, sync::Arc};

use ckpt_engine::sys::{children, task};
use tokio::signal::unix::{SignalKind, signal};
use tracing::{info, warn};

use crate::{
    api::{self, ServeError},
    cluster::{Cluster, ClusterError},
    config::Config,
    metrics::Metrics,
    migration::Migrations,
    scrape::{self, ScrapeError},
    ve::{Runtime, VeError},
};

/// Why the daemon cannot run.
#[derive(Debug, thiserror::Error)]
pub enum DaemonError {
    /// A directory of its own cannot be made.
    #[error("cannot make {path}")]
    Directory {
        /// The directory.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The cluster's log cannot be taken up.
    #[error("cannot take part in the cluster")]
    Cluster(#[from] ClusterError),
    /// Signals cannot be received.
    #[error("cannot wait for signals")]
    Signals(#[source] std::io::Error),
    /// The VEs cannot be managed.
    #[error("cannot manage VEs")]
    Runtime(#[source] VeError),
    /// The API cannot be served.
    #[error("cannot serve the API")]
    Serve(#[from] ServeError),
    /// A monitoring system cannot be served.
    #[error("cannot serve metrics")]
    Scrape(#[from] ScrapeError),
}

/// The parts of a running daemon.
#[derive(Debug)]
pub struct Daemon {
    /// The settings.
    pub config: Config,
    /// This node's part in the cluster.
    pub cluster: Arc<Cluster>,
    /// The VEs.
    pub runtime: Arc<Runtime>,
    /// The VEs on their way.
    pub migrations: Migrations,
    /// What is told to monitoring systems.
    metrics: Arc<Metrics>,
}

impl Daemon {
    /// All figures, as OpenMetrics text.
    pub fn metrics(&self) -> String {
        self.metrics.text(&self.runtime, &self.cluster)
    }
}

/// Runs the daemon until SIGTERM or SIGINT. VEs go on without it.
pub async fn run(config: Config) -> Result<(), DaemonError> {
    // A VE that is copied takes some for each process.
    if let Err(source) = task::raise_descriptor_limit() {
        warn!(%source, "cannot raise the limit of descriptors (RLIMIT_NOFILE)");
    }
    for path in [&config.state_dir, &config.run_dir] {
        std::fs::create_dir_all(path)
            .map_err(|source| DaemonError::Directory { path: path.clone(), source })?;
    }
    let mut terminate = signal(SignalKind::terminate()).map_err(DaemonError::Signals)?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(DaemonError::Signals)?;
    // The handler stays from now on. To build a VE is to stop its processes again and again.
    drop(signal(SignalKind::child()).map_err(DaemonError::Signals)?);
    children::stop_without_signal().map_err(DaemonError::Signals)?;
    let socket = config.socket();
    let cluster = Cluster::open(&config.state_dir).await?;
    let runtime = Runtime::open(&config).map_err(DaemonError::Runtime)?;
    runtime.set_registry(cluster.clone());
    let metrics = Arc::<Metrics>::default();
    let migrations = Migrations::new(runtime.clone(), cluster.clone(), metrics.clone());
    migrations.serve();
    let daemon = Arc::new(Daemon {
        config,
        cluster: cluster.clone(),
        runtime: runtime.clone(),
        migrations: migrations.clone(),
        metrics,
    });
    if let Some(address) = daemon.config.metrics.listen {
        let served = daemon.clone();
        let address = scrape::serve(address, move || served.metrics()).await?;
        info!(%address, "metrics are served");
    }
    api::serve(daemon, &socket)?;
    info!(socket = %socket.display(), "ready");
    if let Err(source) = sd_notify::notify(&[sd_notify::NotifyState::Ready]) {
        warn!(%source, "cannot tell the service manager that we are ready");
    }
    tokio::spawn(enter_and_boot(cluster.clone(), runtime, migrations));
    tokio::select! {
        _ = terminate.recv() => info!("stopping on SIGTERM"),
        _ = interrupt.recv() => info!("stopping on SIGINT"),
    }
    let _ = std::fs::remove_file(&socket);
    cluster.close().await;
    Ok(())
}

/// Makes sure that the cluster knows the VEs of this node, and starts those that boot with it.
async fn enter_and_boot(cluster: Arc<Cluster>, runtime: Arc<Runtime>, migrations: Migrations) {
    // After a power cut the others may come back later. Nothing starts before the cluster has
    // said whose it is.
    while let Err(problem) = cluster.coordinator().read().await {
        warn!("VEs wait for a majority of the cluster: {}", api::chain(&problem));
    }
    for ve in runtime.all() {
        let running = ve.running().is_some();
        if let Err(problem) = cluster.adopt(ve.own_entry(), running).await {
            warn!(id = %ve.id, "the cluster does not take the VE: {}", api::chain(&problem));
        }
    }
    runtime.boot().await;
    migrations.resume_on_boot().await;
}
