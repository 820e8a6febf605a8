//! Brings a VE back from a file.
//!
//! ```text
//! verify ──▶ room ──▶ Builder grows ──▶ ready ──▶ runs
//! ```
//! All of the file is verified before anything is touched. Any failure leaves the VE as it was:
//! stopped, or suspended, or not there.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
    time::Instant,
};

use ckpt_format::{
    codec,
    image::{Manifest, OwnFiles, Record},
    stream,
    tree::{self, Timestamp},
};
use tokio::task::spawn_blocking;

use super::{
    RestoreReport,
    error::CheckpointError,
    fit,
    journal::{Files, Journal, Step},
};
use crate::{
    api::{Sink, chain},
    image::{Image, ImageFileError},
    migration::{
        builder::{BuildError, Builder, News, Order, Site},
        messages::Item,
        pipe::in_pieces,
        source::Context,
        target,
    },
    storage::Comparison,
    template::Digest,
    ve::{Arrival, Operation, Prepared, Settings, Ve, VeError, VeId},
};

/// Brings a VE back; from the file that suspend has made if none is given.
pub(super) async fn restore(
    context: &Context,
    name: &str,
    file: Option<PathBuf>,
    sink: &Sink,
) -> Result<RestoreReport, CheckpointError> {
    let start = Instant::now();
    let resumes = file.is_none();
    let place = match context.runtime.find(name) {
        Ok(ve) => {
            let word = if resumes { "resume" } else { "restore" };
            Place::Here(ve.operate_for_user(word).await?)
        }
        // The checkpoint may have all that there is of it.
        Err(VeError::Unknown { .. }) if !resumes => Place::Nowhere(name.to_owned()),
        Err(error) => return Err(error.into()),
    };
    let path = match (&place, file) {
        (_, Some(file)) => file,
        (Place::Here(operation), None) => {
            operation.ve.must_not_run()?;
            if !operation.ve.is_suspended() {
                return Err(CheckpointError::NotSuspended { id: operation.ve.id });
            }
            operation.ve.suspended_file()
        }
        (Place::Nowhere(_), None) => return Err(VeError::Unknown { ve: name.to_owned() }.into()),
    };
    let room = verify(context, place, &path, resumes, sink).await?;
    let verify_ms = start.elapsed().as_secs_f64() * 1000.0;
    let (ve, processes) = (room.image.manifest().ve, room.image.manifest().summary.processes);
    let rebuild = Instant::now();
    room.build(context, sink).await?;
    Ok(RestoreReport {
        ve,
        processes,
        verify_ms,
        rebuild_ms: rebuild.elapsed().as_secs_f64() * 1000.0,
        total_ms: start.elapsed().as_secs_f64() * 1000.0,
    })
}

/// Whether the VE is here.
enum Place {
    /// It is, and we have its lock.
    Here(Operation),
    /// It is not: what it was asked for as.
    Nowhere(String),
}

/// A file that can be restored here.
struct Fitting {
    image: Arc<Image>,
    template: Digest,
    place: Place,
    files: Files,
    resumes: bool,
}

/// Looks at everything that could fail before anything has changed.
async fn verify(
    context: &Context,
    place: Place,
    path: &Path,
    resumes: bool,
    sink: &Sink,
) -> Result<Fitting, CheckpointError> {
    let path = path.to_owned();
    let image = Arc::new(spawn_blocking(move || Image::open(&path)).await??);
    let manifest = image.manifest();
    let listed = manifest.own_files == OwnFiles::Listed;
    let undone = match &place {
        Place::Here(operation) => operation.ve.undone_restore(),
        Place::Nowhere(_) => None,
    };
    let (upper, files) = match &place {
        Place::Here(operation) => {
            let ve = &operation.ve;
            ve.must_not_run()?;
            if ve.is_suspended() && !resumes {
                return Err(VeError::Suspended { id: ve.id }.into());
            }
            if manifest.ve != ve.id.number() {
                let asked = ve.id.to_string();
                return Err(CheckpointError::OtherVe { of: manifest.ve, asked });
            }
            fit::check_addresses(&Settings::of_text(&manifest.configuration), &ve.settings())?;
            let files = if listed { Files::Own } else { Files::Replaced };
            (listed.then(|| ve.upper()), files)
        }
        Place::Nowhere(asked) => {
            if listed {
                return Err(CheckpointError::FilesMissing { ve: manifest.ve });
            }
            if *asked != manifest.ve.to_string() {
                let asked = asked.clone();
                return Err(CheckpointError::OtherVe { of: manifest.ve, asked });
            }
            (None, Files::Arrived)
        }
    };
    let template = fit::check(context, manifest)?;
    let (whole, progress) = (image.clone(), sink.clone());
    spawn_blocking(move || read_all(&whole, upper.as_deref(), undone, &progress)).await??;
    if sink.is_closed() {
        return Err(CheckpointError::Cancelled);
    }
    Ok(Fitting { image, template, place, files, resumes })
}

/// Verifies the whole file, and that the VE's own files are those that it lists.
fn read_all(
    image: &Image,
    upper: Option<&Path>,
    undone: Option<Timestamp>,
    sink: &Sink,
) -> Result<(), CheckpointError> {
    let mut comparison = upper.map(|upper| Comparison::with(upper, undone)).transpose()?;
    let mut told = 0;
    image.verify(
        &mut |done, total| {
            if done >= told {
                sink.progress("verifying the checkpoint", done, Some(total), "bytes");
                told = done + (4 << 20);
            }
        },
        &mut |record| {
            if let (Record::Own(file), Some(comparison)) = (record, &mut comparison) {
                comparison.expect(file);
            }
            Ok(())
        },
    )?;
    comparison.map_or(Ok(()), Comparison::finish).map_err(CheckpointError::FilesChanged)
}

impl Fitting {
    /// Makes the VE again. From here on the journal tells what to undo.
    async fn build(self, context: &Context, sink: &Sink) -> Result<(), CheckpointError> {
        let Self { image, template, place, files, resumes } = self;
        let manifest = image.manifest();
        let (operation, prepared, journal) = match place {
            Place::Here(operation) => {
                let journal = Journal::new(operation.ve.directory());
                journal.write(Step::Restoring { files }).map_err(CheckpointError::Journal)?;
                let replace = files == Files::Replaced;
                let plan = manifest.container.clone();
                match context.runtime.prepare_again(&operation, plan, replace).await {
                    Ok(prepared) => (Some(operation), prepared, journal),
                    Err(error) => {
                        journal.remove().map_err(CheckpointError::Journal)?;
                        return Err(error.into());
                    }
                }
            }
            Place::Nowhere(_) => {
                let prepared = arrive(context, manifest, template, sink).await?;
                let journal = Journal::new(prepared.directory());
                (None, prepared, journal)
            }
        };
        let attempt = Attempt { context, image: image.clone(), files, journal: journal.clone() };
        let id = prepared.id;
        // Nothing runs that the cluster has not agreed to.
        let done = match context.runtime.wants(id, true).await {
            Ok(()) => attempt.run(operation, prepared, sink).await,
            Err(error) => {
                drop(prepared);
                journal.remove().map_err(CheckpointError::Journal)?;
                Err(error.into())
            }
        };
        match done {
            Ok(ve) => {
                context.runtime.settle_files(&ve)?;
                if resumes {
                    super::discard_suspended(&ve);
                }
                journal.remove().map_err(CheckpointError::Journal)
            }
            Err(error) => {
                if files == Files::Arrived {
                    context.runtime.disown(id).await;
                    return Err(error);
                }
                if let Err(second) = context.runtime.wants(id, false).await {
                    tracing::warn!(%id, "cannot take its start back: {}", chain(&second));
                }
                let runs =
                    context.runtime.find(&id.to_string()).is_ok_and(|ve| ve.running().is_some());
                if !runs {
                    journal.remove().map_err(CheckpointError::Journal)?;
                }
                Err(error)
            }
        }
    }
}

/// Makes room for a VE that is not here.
async fn arrive(
    context: &Context,
    manifest: &Manifest,
    template: Digest,
    sink: &Sink,
) -> Result<Prepared, CheckpointError> {
    let id = VeId::try_from(manifest.ve)
        .map_err(|_| CheckpointError::OtherVe { of: manifest.ve, asked: "a VE".to_owned() })?;
    let (config, plan) = (manifest.configuration.clone(), manifest.container.clone());
    let arrival = Arrival { id, config, template, plan };
    context.runtime.own(id, &manifest.configuration).await?;
    match context.runtime.prepare(arrival, sink).await {
        Ok(prepared) => Ok(prepared),
        Err(error) => {
            context.runtime.disown(id).await;
            Err(error.into())
        }
    }
}

/// One try to build a VE for which there is room.
struct Attempt<'a> {
    context: &'a Context,
    image: Arc<Image>,
    files: Files,
    journal: Journal,
}

impl Attempt<'_> {
    async fn run(
        &self,
        operation: Option<Operation>,
        prepared: Prepared,
        sink: &Sink,
    ) -> Result<Arc<Ve>, CheckpointError> {
        let runtime = &self.context.runtime;
        let (prepared, site) = self.site(prepared).await?;
        self.journal
            .write(Step::Restoring { files: self.files })
            .map_err(CheckpointError::Journal)?;
        let builder = Builder::start(site);
        let mut builder =
            builder.map_err(|source| BuildError::System { what: "start to build", source })?;
        let ve = runtime.adopt(prepared).await?;
        let operation = match operation {
            Some(operation) => operation,
            None => ve.operate("restore")?,
        };
        let built = self.grow(&mut builder, sink).await;
        let ran = match built {
            Ok(()) => run(&mut builder).await,
            Err(error) => Err(error),
        };
        spawn_blocking(move || builder.end()).await?;
        if let Err(error) = ran {
            if let Err(second) = undo(self.context, operation, self.files, &self.journal).await {
                tracing::error!(id = %ve.id, "cannot undo a restore: {}", chain(&second));
            }
            return Err(error);
        }
        Ok(ve)
    }

    async fn site(&self, mut prepared: Prepared) -> Result<(Prepared, Site), CheckpointError> {
        let manifest = self.image.manifest();
        let (plan, network) = (manifest.container.clone(), manifest.network.clone());
        let (journal, files) = (self.journal.clone(), self.files);
        let released = Box::new(move |_| journal.write(Step::Released { files }));
        let made = spawn_blocking(move || {
            let mut site = target::site(&mut prepared, plan, network, released)?;
            site.ask_peers = true;
            Ok::<_, BuildError>((prepared, site))
        });
        Ok(made.await??)
    }

    /// Feeds the builder until the VE stands ready.
    async fn grow(&self, builder: &mut Builder, sink: &Sink) -> Result<(), CheckpointError> {
        let (image, orders, progress) = (self.image.clone(), builder.orders.clone(), sink.clone());
        let feeding = spawn_blocking(move || {
            feed(&image, &progress, |item| {
                orders.blocking_send(Order::Item(item)).map_err(|_| Unfed::Builder)
            })
        });
        match feeding.await? {
            Ok(()) | Err(Unfed::Builder) => {}
            Err(Unfed::Image(error)) => return Err(error.into()),
            Err(Unfed::User) => return Err(CheckpointError::Cancelled),
        }
        loop {
            match builder.news.recv().await {
                Some(News::Applied(_)) => {}
                Some(News::Ready(_)) => return Ok(()),
                Some(News::Failed(error)) => return Err(error.into()),
                Some(News::Running(..)) | None => return Err(ended()),
            }
        }
    }
}

/// Lets the VE run.
async fn run(builder: &mut Builder) -> Result<(), CheckpointError> {
    if builder.orders.send(Order::Release(Vec::new())).await.is_err() {
        return Err(ended());
    }
    match builder.news.recv().await {
        Some(News::Running(..)) => Ok(()),
        Some(News::Failed(error)) => Err(error.into()),
        _ => Err(ended()),
    }
}

fn ended() -> CheckpointError {
    let source = std::io::Error::other("its thread has ended");
    BuildError::System { what: "build the VE", source }.into()
}

/// Nothing of the VE runs; it is what it was before.
pub(super) async fn undo(
    context: &Context,
    operation: Operation,
    files: Files,
    journal: &Journal,
) -> Result<(), VeError> {
    let runtime = &context.runtime;
    if files == Files::Arrived {
        return runtime.forget(operation).await;
    }
    runtime.end(&operation.ve).await?;
    runtime.put_files_back(&operation.ve)?;
    operation.ve.note_undone_restore()?;
    journal.remove().map_err(VeError::file("remove", "the journal of a restore"))
}

/// Why the builder did not get all.
enum Unfed {
    /// It wants no more, and has told why.
    Builder,
    /// The file cannot be read any more.
    Image(ImageFileError),
    /// The user changed their mind.
    User,
}

impl From<ImageFileError> for Unfed {
    fn from(error: ImageFileError) -> Self {
        Self::Image(error)
    }
}

/// All of the file, as a source would have sent it.
fn feed(
    image: &Image,
    sink: &Sink,
    mut take: impl FnMut(Item) -> Result<(), Unfed>,
) -> Result<(), Unfed> {
    let (mut records, mut contents) = (image.records(), image.contents());
    let (mut done, total) = (0, image.manifest().summary.memory_bytes);
    while let Some(record) = records.next()? {
        if sink.is_closed() {
            return Err(Unfed::User);
        }
        take(match record {
            Record::Memory(record) => Item::Memory(record),
            Record::Pages { space, runs, data } => {
                let data = contents.get(&data)?;
                done += data.len() as u64;
                sink.progress("restoring memory", done, Some(total), "bytes");
                Item::Memory(stream::Record::Pages { space, runs, data: data.into() })
            }
            Record::File(record) => Item::File(record),
            Record::FileData { tree, path, offset, data } => {
                let data = contents.get(&data)?.into();
                Item::File(tree::FileRecord { tree, step: tree::Step::Data { path, offset, data } })
            }
            Record::State(state) => {
                let state = codec::encode(&state);
                in_pieces(state, |bytes, last| take(Item::State { bytes, last }))?;
                continue;
            }
            Record::Own(_) | Record::End => continue,
        })?;
    }
    Ok(())
}
