//! Looks at everything that could fail before anything has changed, and asks the target.

use std::{
    io,
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};

use ckpt_engine::{
    bits32,
    container::{self, Found, Spaces, cgroups, clock_offsets},
    files, huge, procfs,
    sys::netns::Netns,
    track::Tracker,
};
use ckpt_format::{blocker::Blocker, network::Network};
use coordinator::{Command, Coordinator, Epoch, MigrationId, ProposeError, Refused, VeId};
use tokio::task::spawn_blocking;
use transport::NodeId;

use super::{ANSWER, Begun, Context, Precopy, Session, Talk, Wish};
use crate::{
    api::Sink,
    migration::{
        blackout::{CopyError, Live},
        brake::Brake,
        check,
        error::MigrateError,
        facts,
        holders::Holders,
        journal::{Journal, Step},
        limiter::Pace,
        messages::{Item, Offer as Message, ToSource},
        pipe::Pipe,
        postcopy,
        rounds::Fixed,
        settle,
        standing::Standing,
        vain::VainStops,
        watchdog::Watchdog,
    },
    network::{
        Hold, Interface, NetworkError,
        state::{self, Expected},
    },
    storage::{self, FileTracker, SourceKind, source_trees},
    template::Digest,
    ve::{Handle, INTERFACE, Operation},
};

/// How long an earlier move of the VE may take to be cleared away.
const EARLIER_MOVE: Duration = Duration::from_secs(60);

/// Everything was looked at; nothing has changed yet.
pub(super) struct Offer {
    context: Context,
    operation: Operation,
    live: Live,
    message: Message,
    target: NodeId,
    /// This node's name and the target's.
    names: (String, String),
}

impl Offer {
    pub(super) async fn look(
        context: &Context,
        operation: Operation,
        target: &str,
    ) -> Result<Self, MigrateError> {
        let ve = operation.ve.clone();
        if ve.running().is_none() {
            return Err(MigrateError::NotRunning { ve: ve.id.number() });
        }
        let coordinator = context.coordinator();
        let state = coordinator.read().await?;
        let own = coordinator.node();
        let name = || target.to_owned();
        let target =
            state.node_named(target).ok_or_else(|| MigrateError::UnknownNode { name: name() })?;
        if target == own {
            return Err(MigrateError::SameNode { name: name() });
        }
        let number = VeId(ve.id.number());
        let record = state.ves.get(&number).ok_or(MigrateError::Unregistered { ve: number.0 })?;
        let handle = context.runtime.handle(&ve)?;
        let directory = ve.directory().to_owned();
        let looked = spawn_blocking(move || look_at(&handle, &directory, true));
        let (live, mut message) = looked.await??;
        message.epoch = record.epoch;
        let name = |node| state.node_name(node).unwrap_or("?").to_owned();
        let names = (name(own), name(target));
        Ok(Self { context: context.clone(), operation, live, message, target, names })
    }

    /// Asks the target whether it would take the VE.
    pub(super) async fn ask_only(mut self) -> Result<(), MigrateError> {
        let mut talk = Talk::open(&self.context, self.target, &self.names.1).await?;
        self.message.check_only = true;
        talk.sender.send(&self.message).await?;
        match talk.answer(ANSWER).await? {
            ToSource::Accepted { .. } => Ok(()),
            ToSource::Refused(failure) => Err(MigrateError::Refused(failure)),
            _ => Err(MigrateError::Protocol),
        }
    }

    /// Enters the migration into the log, has the target make room, and opens the stream.
    pub(super) async fn propose(self, wish: &Wish, sink: &Sink) -> Result<Precopy, MigrateError> {
        let Self { context, operation, live, mut message, target, names } = self;
        if wish.postcopy {
            postcopy::ask_whether_able(&context, target, &names.1).await?;
            sink.log(postcopy::risk(message.ve.0, &names.0));
        }
        let mut talk = Talk::open(&context, target, &names.1).await?;
        let coordinator = context.coordinator();
        let migration = message.migration;
        let journal = Journal::new(operation.ve.directory());
        // The journal first: a daemon that dies in between calls off what may have begun.
        let limiter = context.limiter.clone();
        let begun = Begun { context, migration, journal, settled: false };
        begun.journal.write(migration, Step::Copying).map_err(MigrateError::Journal)?;
        message.epoch = begin(&coordinator, &message, target, sink).await?;
        message.container.clocks = live.clocks().map_err(MigrateError::Inside)?;
        message.container.date_ns = container::date().map_err(MigrateError::Inside)?;
        talk.sender.send(&message).await?;
        let template_missing = match talk.answer_or_cancel(ANSWER, sink).await? {
            ToSource::Accepted { template_missing } => template_missing,
            ToSource::Refused(failure) => return Err(MigrateError::Refused(failure)),
            _ => return Err(MigrateError::Protocol),
        };
        let pace = Pace::new(wish.bandwidth, limiter);
        let (pipe, pump) = Pipe::start(talk.bulk.open().await?, pace, talk.version);
        let vain = VainStops::default();
        let mut session = Session { begun, operation, talk, pipe, pump, target, names, vain };
        if template_missing {
            session.send_template(message.template, sink).await?;
        }
        Ok(Precopy { session, live })
    }
}

impl Session {
    /// The target lacks the template: it gets ours, and makes room with it.
    async fn send_template(&mut self, digest: Digest, sink: &Sink) -> Result<(), MigrateError> {
        let templates = self.begun.context.runtime.templates();
        let (mut archive, total) = templates.open_archive(&digest)?;
        let progress = sink.clone();
        let sending = self.fill(sink, move |pipe| {
            let mut sent = 0;
            loop {
                let mut bytes = vec![0; 1 << 20];
                let count =
                    io::Read::read(&mut archive, &mut bytes).map_err(MigrateError::Archive)?;
                bytes.truncate(count);
                let item =
                    if count == 0 { Item::TemplateEnd } else { Item::Template(bytes.into()) };
                pipe.item(item).map_err(|_| MigrateError::Broken)?;
                if count == 0 {
                    return Ok::<_, MigrateError>(());
                }
                sent += count as u64;
                progress.progress("sending the template", sent, Some(total), "bytes");
            }
        });
        sending.await??;
        match self.talk.answer_or_cancel(ANSWER, sink).await? {
            ToSource::Accepted { template_missing: false } => Ok(()),
            ToSource::Refused(failure) => Err(MigrateError::Refused(failure)),
            _ => Err(MigrateError::Protocol),
        }
    }
}

/// Enters the migration into the log, and returns the epoch that it begins in. An earlier move of
/// the VE whose ends have not told the log yet what became of it is waited for.
async fn begin(
    coordinator: &Coordinator,
    message: &Message,
    target: NodeId,
    sink: &Sink,
) -> Result<Epoch, MigrateError> {
    let deadline = Instant::now() + EARLIER_MOVE;
    let mut epoch = message.epoch;
    let mut told = false;
    loop {
        let (migration, ve, source) = (message.migration, message.ve, coordinator.node());
        let begin = Command::BeginMigration { migration, ve, epoch, source, target };
        let refused = match coordinator.propose(begin).await {
            Ok(_) => return Ok(epoch),
            Err(ProposeError::Refused(refused)) if Instant::now() < deadline => refused,
            Err(error) => return Err(error.into()),
        };
        let (Refused::Migrating { .. } | Refused::CopyLeft { .. } | Refused::StaleEpoch { .. }) =
            refused
        else {
            return Err(ProposeError::Refused(refused).into());
        };
        if !told {
            sink.log(format!("waiting for the end of an earlier move: {refused}"));
            told = true;
        }
        let mut states = coordinator.watch();
        tokio::select! {
            // A change that came before is seen by asking again after the pause.
            _ = tokio::time::timeout(settle::PAUSE, states.changed()) => {}
            () = sink.closed() => return Err(MigrateError::Cancelled),
        }
        if let Some(record) = coordinator.read().await?.ves.get(&ve) {
            epoch = record.epoch;
        }
    }
}

/// What would stop a move of the VE now, all of it. Changes nothing.
pub(in crate::migration) fn blockers(handle: &Handle) -> Result<Vec<Blocker>, MigrateError> {
    match survey(handle) {
        Ok(_) => Ok(Vec::new()),
        Err(MigrateError::Blocked(blockers)) => Ok(blockers),
        Err(other) => Err(other),
    }
}

/// The container and the network of a VE, seen from outside.
fn survey(handle: &Handle) -> Result<(Found, Network), MigrateError> {
    let init = handle.init;
    let freezer = handle.cgroups.freezer();
    let mut blockers = lasting_blockers(init, handle.id_base, freezer)?;
    let own = cgroups::check(&handle.cgroups.visible(), handle.id_base);
    blockers.extend(own.map_err(CopyError::Cgroups)?);
    let pids = procfs::cgroup_members(freezer).map_err(MigrateError::Inside)?;
    let mut found = match container::capture(init, &pids)? {
        Ok(found) => found,
        Err(found) => {
            blockers.extend(found);
            let own = Netns::of_process(init).map_err(MigrateError::Inside)?;
            blockers
                .extend(state::capture(&[own], &expected(handle), handle.id_base, None)?.blockers);
            return Err(MigrateError::Blocked(blockers));
        }
    };
    let namespaces = networks(init, &found.spaces).map_err(MigrateError::Inside)?;
    let state::Captured { mut networks, blockers: of_networks } =
        state::capture(&namespaces, &expected(handle), handle.id_base, None)?;
    blockers.extend(of_networks);
    if !blockers.is_empty() {
        return Err(MigrateError::Blocked(blockers));
    }
    found.plan.nested.networks = networks.split_off(1);
    Ok((found, networks.pop().unwrap_or_default()))
}

/// The network namespaces of a VE, its own first.
fn networks(init: i32, spaces: &Spaces) -> io::Result<Vec<Netns>> {
    let mut namespaces = vec![Netns::of_process(init)?];
    for namespace in spaces.networks() {
        namespaces.push(Netns::from_fd(namespace.try_clone()?));
    }
    Ok(namespaces)
}

/// Reads the VE from outside, and finds what would stop a move. Changes nothing. Without
/// `own_files` only what it keeps in memory is copied of its files.
pub(in crate::migration) fn look_at(
    handle: &Handle,
    directory: &Path,
    own_files: bool,
) -> Result<(Live, Message), MigrateError> {
    let (init, id_base) = (handle.init, handle.id_base);
    let freezer = handle.cgroups.freezer().to_owned();
    let (Found { plan, spaces }, network) = survey(handle)?;
    let namespaces = networks(init, &spaces).map_err(MigrateError::Inside)?;
    let nested = plan.nested.networks.iter();
    let settings = std::iter::once(&network).chain(nested).map(|it| it.settings.clone()).collect();
    let mut trees = source_trees(spaces.mount_namespaces(), &plan, &handle.upper, id_base)
        .map_err(CopyError::Files)?;
    trees.retain(|tree| own_files || !matches!(tree.kind, SourceKind::Own { .. }));
    let spaces = Arc::new(spaces);
    let disk_bytes = storage::size(&trees).map_err(CopyError::Files)?;
    let files = FileTracker::new(trees);
    let message = Message {
        migration: MigrationId(rand::random()),
        ve: VeId(handle.id.number()),
        epoch: Epoch(0),
        configuration: handle.config.clone(),
        template: handle.template,
        container: plan,
        network,
        vdso: facts::vdso_hash(),
        vdso_32: vdso_32(&freezer),
        extended_state_len: facts::extended_state_len(),
        memory_bytes: memory_bytes(&freezer),
        huge_bytes: huge_bytes(&freezer),
        disk_bytes,
        check_only: false,
    };
    let hold = match &handle.interface {
        Some(interface) => Some(prepare_hold(interface, &format!("hold{}", handle.id))?),
        None => None,
    };
    let brake = Brake::new(handle.cgroups.clone()).map_err(CopyError::Cpu)?;
    let standing = Standing {
        freezer: freezer.clone(),
        init,
        id_base,
        interface: handle.interface.clone(),
        cpu: brake.own().cloned(),
    };
    let watchdog = Watchdog::start(standing, directory).map_err(CopyError::Watchdog)?;
    let live = Live {
        init,
        id_base,
        tracker: Tracker::new(&freezer, id_base, watchdog.surgeon().clone())
            .with_spaces(spaces.clone()),
        spaces,
        holders: Holders::default(),
        resting: files::Resting::default(),
        freezer,
        visible: handle.cgroups.visible(),
        clock_offsets: clock_offsets(init).map_err(MigrateError::Inside)?,
        files,
        files_took: Duration::MAX,
        networks: namespaces,
        expected: expected(handle),
        settings,
        hold,
        brake,
        watchdog,
        plain: 0.0,
        fixed: Fixed::default(),
    };
    Ok((live, message))
}

/// The vdso of programs of 32 bits, if the VE runs any.
fn vdso_32(freezer: &Path) -> Option<[u8; 32]> {
    let runs = bits32::any(&procfs::cgroup_members(freezer).unwrap_or_default());
    runs.then(facts::vdso_32_hash).flatten()
}

/// What a VE needs of huge pages, in bytes by their size.
fn huge_bytes(freezer: &Path) -> huge::Sizes {
    huge::needed(&procfs::cgroup_members(freezer).unwrap_or_default())
}

/// A VE that has just come here may still have the hold of its arrival, which waits a little for
/// late frames.
fn prepare_hold(interface: &Interface, name: &str) -> Result<Hold, NetworkError> {
    const PAUSE: Duration = Duration::from_millis(20);
    let deadline = Instant::now() + EARLIER_MOVE;
    loop {
        match Hold::prepare(interface, name) {
            Err(error) if error.is_busy() && Instant::now() < deadline => std::thread::sleep(PAUSE),
            other => return other,
        }
    }
}

/// What stands in the way for more than a moment: a VE that runs shows half of what it does, such
/// as a pipe whose other end is already in a child that was not looked at.
fn lasting_blockers(init: i32, id_base: u32, freezer: &Path) -> Result<Vec<Blocker>, CopyError> {
    const LOOKS: usize = 4;
    const PAUSE: Duration = Duration::from_millis(50);
    let mut lasting = check::blockers(init, id_base, freezer)?;
    for _ in 1..LOOKS {
        if lasting.is_empty() {
            break;
        }
        std::thread::sleep(PAUSE);
        let again = check::blockers(init, id_base, freezer)?;
        lasting.retain(|blocker| again.contains(blocker));
    }
    Ok(lasting)
}

/// The interfaces that the VE was given.
fn expected(handle: &Handle) -> Vec<Expected> {
    let given = handle.interface.iter();
    given.map(|interface| Expected { name: INTERFACE.to_owned(), mac: interface.mac }).collect()
}

/// The memory that all processes of a cgroup have in use, counted for each of them.
pub(super) fn memory_bytes(freezer: &Path) -> u64 {
    let pids = procfs::cgroup_members(freezer).unwrap_or_default();
    let resident = |pid| {
        let statm = procfs::read_text(pid, "statm").ok()?;
        statm.split_whitespace().nth(1)?.parse::<u64>().ok()
    };
    pids.into_iter().filter_map(resident).sum::<u64>() * ckpt_format::memory::PAGE
}
