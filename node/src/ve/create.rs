//! Making and destroying VEs.

use std::{fs, sync::Arc};

use ckpt_format::network::Mac;
use serde::{Deserialize, Serialize};
use tokio::task::spawn_blocking;
use tracing::{info, warn};

use super::{
    Changes, Operation, Place, Runtime, Settings, Ve, VeError, VeId,
    config::ConfigFile,
    place::{self, Paths},
    runtime::Reservation,
};
use crate::{
    api::{Sink, chain},
    template::Digest,
};

/// What was created.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Created {
    /// Its number.
    pub id: VeId,
    /// The digest of the template cache that it was made from.
    pub template: Digest,
}

impl Runtime {
    /// Makes a VE. Builds its template's cache if that is missing.
    pub async fn create(
        self: &Arc<Self>,
        id: VeId,
        changes: &Changes,
        sink: &Sink,
    ) -> Result<Created, VeError> {
        let reservation = self.reserve(id)?;
        let mut file = Settings::change(&ConfigFile::default(), changes, &self.networks())?;
        let template = Settings::read(&file).ostemplate.ok_or(VeError::NoTemplate)?;
        Settings::give_interface(&mut file, id, Mac::local(rand::random()));
        self.check_unique(id, &file)?;
        // Known before anything is built for nothing.
        self.templates.metadata(&template)?;
        self.check_unclaimed(Settings::read(&file).addresses).await?;
        let (runtime, events) = (self.clone(), sink.clone());
        let cache = spawn_blocking(move || runtime.templates.cached(&template, &events)).await??;
        let paths = Paths::new(&self.config.state_dir, id);
        let place = Place { template: cache.digest, slot: reservation.slot };
        let ve = Ve::new(id, paths, file.clone(), place);
        if let Some(registry) = self.registry() {
            registry.register(ve.entry(&file)).await?;
        }
        let (runtime, events, new) = (self.clone(), sink.clone(), ve.clone());
        let made = spawn_blocking(move || runtime.make(&new, reservation, &events)).await;
        if let Err(problem) = made.map_err(VeError::from).and_then(|made| made) {
            self.unregister(&ve).await;
            return Err(problem);
        }
        info!(%id, "created");
        Ok(Created { id, template: cache.digest })
    }

    fn make(
        self: &Arc<Self>,
        ve: &Arc<Ve>,
        reservation: Reservation,
        sink: &Sink,
    ) -> Result<(), VeError> {
        let place = ve.place();
        let make = || -> Result<(), VeError> {
            // What a daemon left that died here.
            ve.paths.remove()?;
            self.templates.take(&place.template, ve.id.number(), sink)?;
            ve.paths.make()?;
            place::write_bytes(&ve.paths.config(), ve.config_text().as_bytes())?;
            // Last: a VE without it is none.
            place::write(&ve.paths.place(), &place)
        };
        let made = make();
        if made.is_err() {
            if let Err(problem) = ve.paths.remove().and_then(|()| self.give_back(ve)) {
                warn!(id = %ve.id, "cannot undo: {}", chain(&problem));
            }
        } else {
            self.insert(ve.clone());
        }
        drop(reservation);
        made
    }

    /// Removes a VE that does not run, with all its files.
    pub async fn destroy(self: &Arc<Self>, operation: Operation) -> Result<(), VeError> {
        let ve = operation.ve.clone();
        if ve.running().is_some() {
            return Err(VeError::Running { id: ve.id });
        }
        if let Some(registry) = self.registry() {
            registry.unregister(ve.id).await?;
        }
        let runtime = self.clone();
        spawn_blocking(move || runtime.remove(&operation.ve)).await??;
        info!(id = %ve.id, "destroyed");
        Ok(())
    }

    /// Removes what there is of a VE that an operation holds and that does not run.
    pub(super) fn remove(&self, ve: &Ve) -> Result<(), VeError> {
        let path = ve.paths.place();
        // First: what is left after a crash is removed at the next start.
        match fs::remove_file(&path) {
            // An earlier attempt has come so far.
            Err(source) if source.kind() == std::io::ErrorKind::NotFound => {}
            removed => removed.map_err(VeError::file("remove", &path))?,
        }
        ve.paths.remove()?;
        // As long as it is known here nobody says that its copy is gone.
        self.take(ve.id);
        self.give_back(ve)
    }

    pub(super) fn give_back(&self, ve: &Ve) -> Result<(), VeError> {
        Ok(self.templates.give_back(&ve.place().template, ve.id.number())?)
    }

    async fn unregister(&self, ve: &Ve) {
        if let Some(registry) = self.registry()
            && let Err(problem) = registry.unregister(ve.id).await
        {
            warn!(id = %ve.id, "cannot take it back from the cluster: {}", chain(&problem));
        }
    }
}
