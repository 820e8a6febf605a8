//! What a migration needs of the runtime, on both sides.
//!
//! The source reads a [`Handle`] and, when the VE runs elsewhere, calls [`Runtime::forget`]. The
//! target makes a [`Prepared`] from an [`Arrival`]; dropping that undoes everything,
//! [`Runtime::adopt`] makes it a VE of this node.

use std::{
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use ckpt_engine::container::{Container, Init, Spec, clocks_now, host_clocks};
use ckpt_format::container::Container as Plan;
use tokio::task::spawn_blocking;
use tracing::{info, warn};

use super::{
    Operation, Place, Running, Runtime, Settings, Ve, VeError, VeId,
    config::ConfigFile,
    place::{self, Paths},
    runtime::Reservation,
};
use crate::{
    api::{Sink, chain},
    cgroup::Cgroups,
    network::{Gate, Interface},
    template::Digest,
};

/// How long it is tried to remove a copy that is no longer wanted, and the longest time between two
/// attempts.
const FORGET_PATIENCE: Duration = Duration::from_secs(120);
const FORGET_PAUSE_MAX: Duration = Duration::from_secs(5);

/// A VE that runs here, as the source of a migration needs it.
#[derive(Clone, Debug)]
pub struct Handle {
    /// Its number.
    pub id: VeId,
    /// Its pid 1, as the host numbers it.
    pub init: i32,
    /// A descriptor for its pid 1.
    pub pidfd: Arc<OwnedFd>,
    /// The host id that root inside stands for.
    pub id_base: u32,
    /// Its cgroups.
    pub cgroups: Cgroups,
    /// The files that are its own, with plain ids.
    pub upper: PathBuf,
    /// The layer below them.
    pub template: Digest,
    /// The text of its configuration.
    pub config: String,
    /// Its interface.
    pub interface: Option<Interface>,
}

/// A VE that is to come from another node.
#[derive(Clone, Debug)]
pub struct Arrival {
    /// Its number.
    pub id: VeId,
    /// The text of its configuration.
    pub config: String,
    /// The layer below its files. It must be here ([`crate::template::Templates::has`]).
    pub template: Digest,
    /// What its container looked like a moment ago. Its clocks go on from there.
    pub plan: Plan,
}

/// A VE that is being put together here. Dropping it leaves nothing.
#[derive(Debug)]
pub struct Prepared {
    /// Its number.
    pub id: VeId,
    /// Its container, whose pid 1 waits.
    pub container: Container,
    /// The host id that root inside stands for.
    pub id_base: u32,
    /// Its interface; the gate is closed.
    pub interface: Option<Interface>,
    /// Its settings.
    pub settings: Settings,
    /// Dropped after the container, which must have ended.
    pub(super) remains: Remains,
}

impl Prepared {
    /// Its cgroups.
    pub fn cgroups(&self) -> &Cgroups {
        &self.remains.cgroups
    }

    /// Where what this node keeps of it lies.
    pub fn directory(&self) -> &Path {
        self.remains.ve.directory()
    }

    /// The files that are its own, with plain ids.
    pub fn upper(&self) -> PathBuf {
        self.remains.ve.paths.layers(PathBuf::new()).upper
    }
}

/// What a prepared VE leaves behind unless it is adopted.
#[derive(Debug)]
pub(super) struct Remains {
    pub(super) runtime: Arc<Runtime>,
    pub(super) ve: Arc<Ve>,
    pub(super) cgroups: Cgroups,
    pub(super) interface: Option<Interface>,
    pub(super) adopted: bool,
    pub(super) keeps: Keeps,
    /// Held for a VE that is not here yet.
    #[expect(dead_code, reason = "held for its end")]
    pub(super) reservation: Option<Reservation>,
}

/// What of a VE stays when nothing comes of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Keeps {
    /// Nothing: it was not here.
    Nothing,
    /// Its files: it was here.
    Files,
    /// Those that were put aside.
    FilesAside,
}

impl Drop for Remains {
    fn drop(&mut self) {
        if self.adopted {
            return;
        }
        let warn = |problem: &dyn std::error::Error| {
            warn!(id = %self.ve.id, "cannot tidy up: {}", chain(problem));
        };
        if let Err(problem) = self.cgroups.kill_all().and_then(|()| self.cgroups.remove()) {
            warn(&problem);
        }
        if let Some(Err(problem)) = self.interface.as_ref().map(Interface::detach) {
            warn(&problem);
        }
        let settled = match self.keeps {
            Keeps::Nothing => {
                self.ve.paths.remove().and_then(|()| self.runtime.give_back(&self.ve))
            }
            Keeps::Files => Ok(()),
            Keeps::FilesAside => self.runtime.put_files_back(&self.ve),
        };
        if let Err(problem) = settled {
            warn(&problem);
        }
    }
}

impl Runtime {
    /// A running VE as the source of a migration needs it.
    pub fn handle(&self, ve: &Ve) -> Result<Handle, VeError> {
        let running = ve.must_run()?;
        let place = ve.place();
        Ok(Handle {
            id: ve.id,
            init: running.init,
            pidfd: running.pidfd,
            id_base: place.id_base(self.config.ids.base),
            cgroups: running.cgroups,
            upper: ve.paths.layers(PathBuf::new()).upper,
            template: place.template,
            config: ve.config_text(),
            interface: running.interface,
        })
    }

    /// Makes everything that a VE from another node needs here: directories, cgroups with its
    /// limits, a container whose pid 1 waits, and an interface that lets nothing pass.
    pub async fn prepare(
        self: &Arc<Self>,
        arrival: Arrival,
        sink: &Sink,
    ) -> Result<Prepared, VeError> {
        let (runtime, sink) = (self.clone(), sink.clone());
        spawn_blocking(move || runtime.prepare_now(arrival, &sink)).await?
    }

    fn prepare_now(self: &Arc<Self>, arrival: Arrival, sink: &Sink) -> Result<Prepared, VeError> {
        let id = arrival.id;
        let reservation = self.reserve(id)?;
        let file = ConfigFile::parse(&arrival.config);
        self.check_unique(id, &file)?;
        let settings = Settings::read(&file);
        let place = Place { template: arrival.template, slot: reservation.slot };
        let id_base = place.id_base(self.config.ids.base);
        let ve = Ve::new(id, Paths::new(&self.config.state_dir, id), file, place);
        ve.paths.remove()?;
        let cgroups = self.cgroups(id, &settings, id_base)?;
        let mut remains = Remains {
            runtime: self.clone(),
            ve: ve.clone(),
            cgroups,
            interface: None,
            adopted: false,
            keeps: Keeps::Nothing,
            reservation: Some(reservation),
        };
        let lower = self.templates.take(&arrival.template, id.number(), sink)?;
        ve.paths.make()?;
        let then = clocks_now(&arrival.plan).map_err(VeError::file("read", "the clocks"))?;
        let now = host_clocks().map_err(VeError::file("read", "the clocks"))?;
        let spec = Spec {
            clock_offsets: Some(then.since(now)),
            plan: arrival.plan,
            links: Vec::new(),
            id_base,
            layers: ve.paths.layers(lower),
            cgroups: remains.cgroups.directories(),
        };
        let container = Container::create(&spec, Self::seed())?;
        if let Some(config) = Self::interface_config(id, &settings) {
            let netns = Interface::netns_of(container.init)?;
            let made = Interface::create(&netns, &self.bridge, &config, Gate::Closed)?;
            remains.interface = Some(made);
        }
        let interface = remains.interface.clone();
        Ok(Prepared { id, container, id_base, interface, settings, remains })
    }

    /// Makes a prepared VE one of this node, running. From here on its processes live on
    /// without the daemon.
    pub async fn adopt(self: &Arc<Self>, prepared: Prepared) -> Result<Arc<Ve>, VeError> {
        let runtime = self.clone();
        let (ve, running) = spawn_blocking(move || runtime.adopt_now(prepared)).await??;
        self.runs(&ve, running);
        info!(id = %ve.id, "adopted");
        Ok(ve)
    }

    fn adopt_now(&self, prepared: Prepared) -> Result<(Arc<Ve>, Running), VeError> {
        let Prepared { container, mut remains, interface, .. } = prepared;
        let ve = remains.ve.clone();
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let pidfd = container.pidfd.try_clone().map_err(VeError::file("watch", "init"))?;
        let running = Running {
            init: container.init,
            pidfd: Arc::new(pidfd),
            cgroups: remains.cgroups.clone(),
            interface,
            started_s: now.as_secs(),
        };
        let record = running.record().map_err(VeError::file("read", "/proc"))?;
        place::write(&ve.paths.running(), &record)?;
        place::write_bytes(&ve.paths.config(), ve.config_text().as_bytes())?;
        // Last: a VE without it is none.
        place::write(&ve.paths.place(), &ve.place())?;
        let Init { .. } = container.release()?;
        remains.adopted = true;
        self.insert(ve.clone());
        Ok((ve, running))
    }

    /// As [`Self::forget`], but with `keep` the files stay, under a name that no VE has.
    pub async fn leave(self: &Arc<Self>, operation: Operation, keep: bool) -> Result<(), VeError> {
        if keep {
            let directory = operation.ve.directory();
            keep_files(directory, &directory.with_extension("migrated"))?;
        }
        self.forget(operation).await
    }

    /// Removes the copy of a VE that runs on another node now. The cluster is not asked. What
    /// cannot be removed at once, on a host that is busy, is tried again for [`FORGET_PATIENCE`]:
    /// as long as it is there the VE cannot come back.
    pub async fn forget(self: &Arc<Self>, operation: Operation) -> Result<(), VeError> {
        let deadline = Instant::now() + FORGET_PATIENCE;
        let mut pause = Duration::from_millis(100);
        while let Err(error) = self.try_to_forget(&operation).await {
            if Instant::now() + pause > deadline {
                return Err(error);
            }
            let id = operation.ve.id;
            warn!(%id, "cannot remove the copy yet, trying again: {}", chain(&error));
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(FORGET_PAUSE_MAX);
        }
        info!(id = %operation.ve.id, "gone to another node");
        Ok(())
    }

    async fn try_to_forget(self: &Arc<Self>, operation: &Operation) -> Result<(), VeError> {
        let ve = operation.ve.clone();
        if let Some(running) = ve.running() {
            ve.state().stopping = true;
            let cgroups = running.cgroups;
            spawn_blocking(move || cgroups.kill_all()).await??;
            ve.stopped().await;
        }
        let runtime = self.clone();
        spawn_blocking(move || runtime.remove(&ve)).await?
    }
}

/// Puts the files and the configuration of a VE aside. The mount that shows them goes on.
fn keep_files(directory: &Path, kept: &Path) -> Result<(), VeError> {
    match std::fs::remove_dir_all(kept) {
        Err(source) if source.kind() != std::io::ErrorKind::NotFound => {
            return Err(VeError::file("remove", kept)(source));
        }
        _ => {}
    }
    std::fs::create_dir(kept).map_err(VeError::file("make", kept))?;
    for name in ["store", "ve.conf"] {
        let path = directory.join(name);
        std::fs::rename(&path, kept.join(name)).map_err(VeError::file("move", &path))?;
    }
    Ok(())
}
