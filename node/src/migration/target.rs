//! Takes in a VE from another node.
//!
//! The mirror of the source: room is made, the copy grows, stands ready, and runs once the log
//! says that it is ours. Until then losing the link, or anything else, ends in nothing being
//! left here. The one proposal to change the owner is made here, and only after the source has
//! sealed its copy.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use ckpt_engine::{container::clock_offsets, sys::netns::Netns};
use ckpt_format::{codec, container::Container as Plan};
use coordinator::{Command, MigrationId, ProposeError, Stage};
use tokio::task::spawn_blocking;
use transport::{BulkReceiver, ControlReceiver, ControlSender, Link, LinkError, NodeId};

use super::{
    admit,
    builder::{BuildError, Builder, News, Order, Site},
    journal::{Journal, Step},
    messages::{Offer, ToSource, ToTarget},
    packing,
    postcopy::{fetch::Fetch, keeper::Kept},
    settle,
    source::Context,
};
use crate::{
    api::{Failure, Sink, chain},
    network::{
        Announcer, Hold,
        state::{self, Routes},
    },
    storage::{FileApplier, TreeError, target_trees},
    template::TemplateError,
    ve::{ARRIVE, INTERFACE, Prepared, Ve, VeError},
};

/// Why a VE was not taken in.
#[derive(Debug, thiserror::Error)]
pub(super) enum TakeInError {
    /// It was never wanted here.
    #[error("{0}")]
    Refused(Failure),
    /// The runtime could not make room.
    #[error(transparent)]
    Ve(#[from] VeError),
    /// The builder gave up.
    #[error(transparent)]
    Build(#[from] BuildError),
    /// The link broke.
    #[error("lost the link to the source")]
    Link(#[from] LinkError),
    /// The source changed its mind.
    #[error("the source called it off")]
    CalledOff,
    /// The log refused.
    #[error(transparent)]
    Log(#[from] ProposeError),
    /// The template could not be taken in.
    #[error(transparent)]
    Template(#[from] TemplateError),
    /// The host does not give what it takes.
    #[error("cannot start to build")]
    Thread(#[source] std::io::Error),
    /// What came is not what was announced.
    #[error("the source does not follow the protocol")]
    Protocol,
    /// A piece of the stream is damaged.
    #[error("a damaged piece in the stream")]
    Damaged(#[from] codec::DecodeError),
    /// A part of the daemon panicked.
    #[error("a part of the daemon failed")]
    Daemon(#[from] tokio::task::JoinError),
}

impl From<TakeInError> for Failure {
    fn from(error: TakeInError) -> Self {
        match error {
            TakeInError::Refused(failure) => failure,
            TakeInError::Ve(error) => error.into(),
            TakeInError::Build(BuildError::Files(error @ TreeError::Full { .. })) => {
                Self::new("no-space", 31, chain(&error))
            }
            other => Self::new("target-failed", 7, chain(&other)),
        }
    }
}

/// Serves one offer from its first message to its end.
pub(super) async fn serve(context: Context, peer: NodeId, link: Link) {
    let (mut sender, mut receiver) = link.control.split();
    let offer: Offer = match receiver.recv().await {
        Ok(offer) => offer,
        Err(error) => {
            tracing::warn!(%peer, %error, "an offer that cannot be read");
            return;
        }
    };
    let (ve, migration) = (offer.ve, offer.migration);
    if offer.check_only {
        let answer = match admit::check(&context, &offer) {
            Ok(template_missing) => ToSource::Accepted { template_missing },
            Err(failure) => ToSource::Refused(failure),
        };
        if let Err(error) = sender.send(&answer).await {
            tracing::debug!(%error, "nobody waits for the answer to an offer");
        }
        return;
    }
    tracing::info!(%ve, %migration, %peer, "taking in a VE");
    let bulk = link.bulk;
    let mut incoming = Incoming { context, peer, offer, sender, receiver, bulk, missing: None };
    match incoming.take_in().await {
        Ok(()) => tracing::info!(%ve, "runs here now"),
        Err(error) => {
            tracing::warn!(%ve, %migration, "did not take in a VE: {}", chain(&error));
            let failure = ToSource::Failed(error.into());
            // The source knows by the broken link, too.
            let _ = incoming.sender.send(&failure).await;
            incoming.give_up().await;
        }
    }
}

/// A VE on its way here.
struct Incoming {
    context: Context,
    /// The source.
    peer: NodeId,
    offer: Offer,
    sender: ControlSender,
    receiver: ControlReceiver,
    bulk: transport::Bulk,
    /// What is still to come of a VE that runs.
    missing: Option<Kept>,
}

impl Incoming {
    async fn take_in(&mut self) -> Result<(), TakeInError> {
        let template_missing =
            admit::admit(&self.context, &self.offer).await.map_err(TakeInError::Refused)?;
        self.sender.send(&ToSource::Accepted { template_missing }).await?;
        let mut stream = self.bulk.accept().await?;
        if template_missing {
            admit::receive_template(&self.context, &self.offer, &mut stream).await?;
        }
        let (prepared, site) = self.make_room().await?;
        let mut builder = Builder::start(site).map_err(TakeInError::Thread)?;
        // All that must be on the disk is written now, and not in the blackout; until the
        // journal says otherwise a daemon that finds it removes it.
        let ve = self.context.runtime.adopt(prepared).await?;
        let operation = ve.operate(ARRIVE)?;
        let done = async {
            if template_missing {
                self.sender.send(&ToSource::Accepted { template_missing: false }).await?;
            }
            self.grow(&mut builder, &mut stream).await?;
            self.switch(&mut builder).await
        };
        match done.await {
            Ok(running) => {
                let fetching = self.missing.take().map(|kept| self.fetch(&ve, kept)).is_some();
                // Before anybody hears of it: the VE may be moved on at once.
                drop(operation);
                if let Err(error) = self.sender.send(&running).await {
                    tracing::warn!(%error, "the source does not hear that its VE runs here");
                }
                self.after(builder, &Journal::new(ve.directory()), fetching).await;
                Ok(())
            }
            Err(error) => {
                spawn_blocking(move || builder.end()).await?;
                self.context.runtime.forget(operation).await?;
                Err(error)
            }
        }
    }

    /// Directories, cgroups, a container that waits, and a network that lets nothing pass.
    async fn make_room(&self) -> Result<(Prepared, Site), TakeInError> {
        let offer = &self.offer;
        let mut prepared = self
            .context
            .runtime
            .prepare(admit::arrival(offer).map_err(TakeInError::Refused)?, &Sink::nowhere())
            .await?;
        let journal = Journal::new(prepared.directory());
        journal.write(offer.migration, Step::Building).map_err(TakeInError::Thread)?;
        let (migration, source) = (offer.migration, self.peer);
        let (plan, network) = (offer.container.clone(), offer.network.clone());
        spawn_blocking(move || {
            let released = move |incomplete| match incomplete {
                true => journal.write_postcopy(migration, Step::Released, source),
                false => journal.write(migration, Step::Released),
            };
            let site = site(&mut prepared, plan, network, Box::new(released))?;
            Ok((prepared, site))
        })
        .await?
    }

    /// Feeds the builder until the VE stands ready.
    async fn grow(
        &mut self,
        builder: &mut Builder,
        stream: &mut BulkReceiver,
    ) -> Result<(), TakeInError> {
        loop {
            tokio::select! {
                piece = stream.recv() => {
                    let bytes = piece?.ok_or(TakeInError::Protocol)?;
                    let item = packing::unpack(bytes)?;
                    // A builder that has ended says why below.
                    let _ = builder.orders.send(Order::Item(item)).await;
                }
                news = builder.news.recv() => match news {
                    Some(News::Applied(barrier)) => {
                        self.sender.send(&ToSource::Applied { barrier }).await?;
                    }
                    Some(News::Ready(time)) => {
                        let restore_ms = time.as_secs_f64() * 1000.0;
                        self.sender.send(&ToSource::Ready { restore_ms }).await?;
                        return Ok(());
                    }
                    Some(News::Failed(error)) => return Err(error.into()),
                    Some(News::Running(..)) | None => return Err(TakeInError::Protocol),
                },
                message = self.receiver.recv::<ToTarget>() => match message? {
                    ToTarget::Abort => return Err(TakeInError::CalledOff),
                    _ => return Err(TakeInError::Protocol),
                },
            }
        }
    }

    /// The source seals, the log decides, the VE runs.
    async fn switch(&mut self, builder: &mut Builder) -> Result<ToSource, TakeInError> {
        let frames = match self.receiver.recv().await? {
            ToTarget::Sealed { frames } => frames,
            _ => return Err(TakeInError::CalledOff),
        };
        let start = Instant::now();
        let migration = self.offer.migration;
        self.commit().await?;
        let commit_ms = start.elapsed().as_secs_f64() * 1000.0;
        let release = builder.orders.send(Order::Release(frames)).await;
        let ran = match release {
            Ok(()) => builder.news.recv().await,
            Err(_) => None,
        };
        match ran {
            Some(News::Running(time, missing)) => {
                self.missing = missing;
                let release_ms = time.as_secs_f64() * 1000.0;
                tracing::info!(
                    "switch of a VE, ms: commit {commit_ms:.2}, release {release_ms:.2}"
                );
                Ok(ToSource::Running { commit_ms, release_ms })
            }
            other => {
                let returned = Command::ReturnVe { migration, epoch: self.offer.epoch.next() };
                self.context.coordinator().propose(returned).await?;
                match other {
                    Some(News::Failed(error)) => Err(error.into()),
                    _ => Err(TakeInError::Protocol),
                }
            }
        }
    }

    /// Makes this node the owner. An answer that was lost is asked for until it is known.
    async fn commit(&self) -> Result<(), TakeInError> {
        let migration = self.offer.migration;
        let switch = Command::Switch { migration, epoch: self.offer.epoch };
        loop {
            let error = match self.context.coordinator().propose(switch.clone()).await {
                Ok(_) => return Ok(()),
                Err(error @ ProposeError::Refused(_)) => return Err(error.into()),
                Err(error) => error,
            };
            match settle::stage(&self.context.coordinator(), migration).await {
                Some(Stage::Switched) => return Ok(()),
                Some(Stage::Begun) | None => tracing::warn!(%error, "asking the log again"),
                Some(_) => return Err(error.into()),
            }
        }
    }

    /// Fetches what is missing in the background; then the log is told.
    fn fetch(&self, ve: &Arc<Ve>, kept: Kept) {
        ve.set_missing(Some(kept.bytes));
        let (context, migration) = (self.context.clone(), self.offer.migration);
        let fetch = Fetch { context, migration, ve: ve.clone(), source: self.peer };
        tokio::spawn(fetch.run(kept));
    }

    /// The VE runs here: late frames, and the log.
    async fn after(&mut self, builder: Builder, journal: &Journal, fetching: bool) {
        if !fetching {
            let (coordinator, migration) = (self.context.coordinator(), self.offer.migration);
            let journal = journal.clone();
            tokio::spawn(async move { report_running(&coordinator, migration, &journal).await });
        }
        let end = tokio::time::sleep(Duration::from_secs(5));
        tokio::pin!(end);
        loop {
            tokio::select! {
                () = &mut end => break,
                message = self.receiver.recv::<ToTarget>() => match message {
                    Ok(ToTarget::Late { frames }) => {
                        let _ = builder.orders.send(Order::Late(frames)).await;
                    }
                    Ok(ToTarget::Costs { factors }) => {
                        self.context.experience().take_over(self.offer.ve.0, &factors);
                    }
                    _ => break,
                },
            }
        }
        let ended = spawn_blocking(move || builder.end()).await;
        if let Err(error) = ended {
            tracing::error!(%error, "the builder of a VE did not end well");
        }
    }

    /// Nothing is left here; the log should know.
    async fn give_up(&self) {
        let migration = self.offer.migration;
        match self.context.coordinator().propose(Command::AbortMigration { migration }).await {
            Ok(_) => settle::finish(&self.context.coordinator(), migration).await,
            Err(error) => tracing::debug!(%error, "the log was not told that we gave up"),
        }
    }
}

/// Tells the log that the VE runs here, until it knows.
pub(super) async fn report_running(
    coordinator: &coordinator::Coordinator,
    migration: MigrationId,
    journal: &Journal,
) {
    const PAUSE: Duration = Duration::from_millis(200);
    while let Err(error) = coordinator.propose(Command::ReportRunning { migration }).await {
        if matches!(error, ProposeError::Refused(_)) {
            tracing::debug!(%migration, %error, "the log knew already");
            break;
        }
        tokio::time::sleep(PAUSE).await;
    }
    if let Err(error) = journal.remove() {
        tracing::warn!(%migration, %error, "cannot remove the journal of a migration");
    }
}

/// Everything that the builder needs, from what the runtime has prepared.
pub(super) fn site(
    prepared: &mut Prepared,
    plan: Plan,
    network: ckpt_format::network::Network,
    released: Box<dyn Fn(bool) -> std::io::Result<()> + Send>,
) -> Result<Site, BuildError> {
    let init = prepared.container.init;
    let system = |what| move |source| BuildError::System { what, source };
    let netns = Netns::of_process(init).map_err(system("open the network of a VE"))?;
    let (mut namespaces, mut networks) = (vec![netns], vec![network]);
    let mut nested = std::mem::take(&mut prepared.container.nested);
    nested.cgroups.clone_from(&plan.nested.cgroups);
    for namespace in &nested.networks {
        let namespace = namespace.try_clone().map_err(system("open a network of a program"))?;
        namespaces.push(Netns::from_fd(namespace));
    }
    networks.extend(plan.nested.networks.iter().cloned());
    state::rebuild(&namespaces, &networks, prepared.id_base, Routes::ForRestore)?;
    state::check_filter(&namespaces, &networks)?;
    let hold = match &prepared.interface {
        Some(interface) => {
            let mut hold = Hold::prepare(interface, &format!("hold{}", prepared.id))?;
            hold.cut()?;
            Some(hold)
        }
        None => None,
    };
    let announcer = match &prepared.interface {
        Some(interface) => {
            let given = prepared.settings.addresses.iter();
            let addresses: Vec<_> = given.map(|cidr| cidr.address()).collect();
            Some(Announcer::prepare(&namespaces[0], INTERFACE, interface.mac, &addresses)?)
        }
        None => None,
    };
    let trees = target_trees(&plan, std::mem::take(&mut prepared.container.trees));
    let channel = prepared.container.channel.try_clone();
    Ok(Site {
        init,
        channel: channel.map_err(system("copy a descriptor"))?,
        id_base: prepared.id_base,
        nested,
        cgroups: prepared.cgroups().clone(),
        applier: Some(FileApplier::new(trees, prepared.id_base)?),
        clock_offsets: clock_offsets(init).map_err(system("read the clocks of a VE"))?,
        networks,
        namespaces,
        hold,
        announcer,
        released,
        directory: prepared.directory().to_owned(),
        ask_peers: false,
    })
}
