//! What a checkpoint and its restore need of the runtime.
//!
//! A VE is *suspended* when it does not run and its checkpoint lies beside it. It is never started
//! afresh by mistake: either it is resumed, or its user throws the checkpoint away. When a
//! checkpoint has files of its own, those that the VE had are put aside until it runs.

use std::{
    fs,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    sync::Arc,
};

use ckpt_engine::container::{Container, Spec, host_clocks};
use ckpt_format::{container::Container as Plan, tree::Timestamp};
use tokio::task::spawn_blocking;
use tracing::{info, warn};

use super::{
    Operation, Prepared, Runtime, Settings, Ve, VeError, VeId,
    addresses::Question,
    config::ConfigFile,
    migrate::{Keeps, Remains},
    registry::Entry,
};
use crate::{
    api::{Sink, chain},
    network::{Gate, Interface},
};

impl Ve {
    /// Where the checkpoint of a suspended VE lies.
    pub fn suspended_file(&self) -> PathBuf {
        self.directory().join("suspended.ckpt")
    }

    /// Whether it is suspended.
    pub fn is_suspended(&self) -> bool {
        self.running().is_none() && self.suspended_file().exists()
    }

    /// An error if it runs.
    pub fn must_not_run(&self) -> Result<(), VeError> {
        match self.running() {
            Some(_) => Err(VeError::Running { id: self.id }),
            None => Ok(()),
        }
    }

    /// The files that are its own, with plain ids.
    pub fn upper(&self) -> PathBuf {
        self.paths.layers(PathBuf::new()).upper
    }

    fn undone_note(&self) -> PathBuf {
        self.directory().join("restore-undone")
    }

    /// Notes that a restore with the VE's own files was undone: it may have given some another
    /// time of their last change.
    pub fn note_undone_restore(&self) -> Result<(), VeError> {
        let path = self.undone_note();
        fs::write(&path, "").map_err(VeError::file("write", &path))
    }

    /// When that was, if the VE has not run since.
    pub fn undone_restore(&self) -> Option<Timestamp> {
        let metadata = fs::metadata(self.undone_note()).ok()?;
        let nanoseconds = u32::try_from(metadata.mtime_nsec()).ok()?;
        Some(Timestamp { seconds: metadata.mtime(), nanoseconds })
    }

    /// The VE runs: its files are its own affair again.
    pub(super) fn forget_undone_restore(&self) {
        // Where there is none, as nearly always, this fails.
        let _ = fs::remove_file(self.undone_note());
    }

    /// Throws the checkpoint of a suspended VE away.
    pub fn discard_suspended(&self) -> Result<(), VeError> {
        let path = self.suspended_file();
        match fs::remove_file(&path) {
            Err(source) if source.kind() != std::io::ErrorKind::NotFound => {
                Err(VeError::file("remove", &path)(source))
            }
            _ => Ok(()),
        }
    }

    fn store(&self) -> PathBuf {
        self.directory().join("store")
    }

    fn store_aside(&self) -> PathBuf {
        self.directory().join("store.before")
    }
}

impl Settings {
    /// Understands the text of a configuration file.
    pub fn of_text(text: &str) -> Self {
        Self::read(&ConfigFile::parse(text))
    }
}

impl Runtime {
    /// As [`Runtime::prepare`], for a VE that is here and does not run. With `replace` it gets
    /// files of its own anew; what it had is put aside.
    pub async fn prepare_again(
        self: &Arc<Self>,
        operation: &Operation,
        plan: Plan,
        replace: bool,
    ) -> Result<Prepared, VeError> {
        let (runtime, ve) = (self.clone(), operation.ve.clone());
        spawn_blocking(move || {
            let prepared = runtime.prepare_again_now(&ve, plan, replace);
            if prepared.is_err() && replace {
                runtime.put_files_back(&ve)?;
            }
            prepared
        })
        .await?
    }

    fn prepare_again_now(
        self: &Arc<Self>,
        ve: &Arc<Ve>,
        plan: Plan,
        replace: bool,
    ) -> Result<Prepared, VeError> {
        ve.must_not_run()?;
        let settings = ve.settings();
        let question = Question::ask(&self.bridge, &settings.addresses);
        if replace {
            put_aside(&ve.store(), &ve.store_aside())?;
            ve.paths.make()?;
        }
        let place = ve.place();
        let id_base = place.id_base(self.config.ids.base);
        let cgroups = self.cgroups(ve.id, &settings, id_base)?;
        let mut remains = Remains {
            runtime: self.clone(),
            ve: ve.clone(),
            cgroups,
            interface: None,
            adopted: false,
            keeps: if replace { Keeps::FilesAside } else { Keeps::Files },
            reservation: None,
        };
        let lower = self.templates.take(&place.template, ve.id.number(), &Sink::nowhere())?;
        let now = host_clocks().map_err(VeError::file("read", "the clocks"))?;
        let spec = Spec {
            clock_offsets: Some(plan.clocks.since(now)),
            plan,
            links: Vec::new(),
            id_base,
            layers: ve.paths.layers(lower),
            cgroups: remains.cgroups.directories(),
        };
        let container = Container::create(&spec, Self::seed())?;
        question.answer()?;
        if let Some(config) = Self::interface_config(ve.id, &settings) {
            let netns = Interface::netns_of(container.init)?;
            let made = Interface::create(&netns, &self.bridge, &config, Gate::Closed)?;
            remains.interface = Some(made);
        }
        let interface = remains.interface.clone();
        Ok(Prepared { id: ve.id, container, id_base, interface, settings, remains })
    }

    /// Makes a VE that comes with a checkpoint one of this node's in the cluster, before anything
    /// of it is here.
    pub async fn own(self: &Arc<Self>, id: VeId, config: &str) -> Result<(), VeError> {
        let settings = Settings::of_text(config);
        if let Some(registry) = self.registry() {
            let addresses = settings.addresses.iter().map(|it| it.address()).collect();
            let (name, config) = (settings.name, config.to_owned());
            registry.register(Entry { id, name, addresses, config }).await?;
        }
        // Asked second: a VE of the cluster would be found as a host on the LAN.
        let unclaimed = self.check_unclaimed(settings.addresses).await;
        if unclaimed.is_err() {
            self.disown(id).await;
        }
        unclaimed
    }

    /// The opposite of [`Runtime::own`].
    pub async fn disown(&self, id: VeId) {
        if let Some(registry) = self.registry()
            && let Err(problem) = registry.unregister(id).await
        {
            warn!(%id, "cannot take it back from the cluster: {}", chain(&problem));
        }
    }

    /// Tells the cluster whether this VE is to run.
    pub async fn wants(&self, id: VeId, running: bool) -> Result<(), VeError> {
        self.set_desired(id, running).await
    }

    /// Ends what there is of a VE that was never let go.
    pub async fn end(self: &Arc<Self>, ve: &Arc<Ve>) -> Result<(), VeError> {
        let Some(running) = ve.running() else { return Ok(()) };
        ve.state().stopping = true;
        let cgroups = running.cgroups;
        spawn_blocking(move || cgroups.kill_all()).await??;
        ve.stopped().await;
        info!(id = %ve.id, "a restore was undone");
        Ok(())
    }

    /// The VE runs with the files of its checkpoint: those that it had are removed.
    pub fn settle_files(&self, ve: &Ve) -> Result<(), VeError> {
        remove(&ve.store_aside())
    }

    /// The VE gets the files back that were put aside, if any were.
    pub fn put_files_back(&self, ve: &Ve) -> Result<(), VeError> {
        let (store, aside) = (ve.store(), ve.store_aside());
        if !aside.exists() {
            return Ok(());
        }
        remove(&store)?;
        fs::rename(&aside, &store).map_err(VeError::file("move", &aside))
    }
}

/// What an earlier restore left aside was settled by the start of the daemon.
fn put_aside(store: &Path, aside: &Path) -> Result<(), VeError> {
    fs::rename(store, aside).map_err(VeError::file("move", store))
}

fn remove(directory: &Path) -> Result<(), VeError> {
    match fs::remove_dir_all(directory) {
        Err(source) if source.kind() != std::io::ErrorKind::NotFound => {
            Err(VeError::file("remove", directory)(source))
        }
        _ => Ok(()),
    }
}
