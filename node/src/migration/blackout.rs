//! The source's VE while it is copied, and while it stands still.
//!
//! [`Live`] runs; [`Live::freeze`] makes a [`Still`] of it, which runs again when it is dropped:
//! connections put back, the way out opened, processes let go, packets delivered, in this order. Only
//! [`Still::seal`] ends that, and [`SealedVe::resume`] is the way back once the log has said so.

use std::{
    collections::HashMap,
    fs::File,
    os::fd::AsFd,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use ckpt_engine::{
    capture::{CaptureError, IdMap},
    container::{ID_COUNT, Spaces, cgroups, host_clocks},
    files::{self, Undo},
    freeze::{FreezeError, Frozen},
    ipc::detached_segments,
    procfs,
    sys::netns::Netns,
    track::{Round, TrackError, Tracked, Tracker},
    unnamed::find_large,
};
use ckpt_format::{
    blocker::Blocker,
    container::Clocks,
    memory::{Backing, SharedObject},
    network::{Network, Setting},
};

use super::{
    brake::Brake,
    contents,
    holders::{Holders, strangers},
    messages::{Item, State},
    parts::Parts,
    pipe::Pipe,
    postcopy::later::{KeptBack, Memory},
    rounds::Fixed,
    sealed::SealedVe,
    stopwatch::Stopwatch,
    watchdog::{Watchdog, WatchdogError},
};
use crate::{
    cgroup::CgroupError,
    network::{
        Hold, NetworkError,
        state::{self, Expected},
    },
    storage::{FileTracker, MappedFiles, TreeError},
};

/// Why a VE could not be copied. It runs on.
#[derive(Debug, thiserror::Error)]
pub(super) enum CopyError {
    /// Its memory.
    #[error(transparent)]
    Memory(#[from] TrackError),
    /// Its files.
    #[error(transparent)]
    Files(#[from] TreeError),
    /// Its processes.
    #[error(transparent)]
    Capture(#[from] CaptureError),
    /// Its network.
    #[error(transparent)]
    Network(#[from] NetworkError),
    /// It did not stop.
    #[error(transparent)]
    Freeze(#[from] FreezeError),
    /// The cgroups that it manages itself.
    #[error(transparent)]
    Cgroups(#[from] cgroups::CgroupError),
    /// Its CPU time.
    #[error(transparent)]
    Cpu(#[from] CgroupError),
    /// Nobody would end the freeze if we died in it.
    #[error(transparent)]
    Watchdog(#[from] WatchdogError),
    /// A process could not be looked at.
    #[error("cannot look at process {pid}")]
    Process {
        /// The process, as numbered on the host.
        pid: i32,
        /// Why.
        source: std::io::Error,
    },
    /// The host itself has processes in it.
    #[error("the host has processes in the VE: {}", list(.0))]
    Strangers(Vec<Blocker>),
    /// A process has gone into another namespace that the target knows.
    #[error("a process in the VE has changed its namespace just now")]
    Moved,
    /// A program has mounted or unmounted something, or made a namespace.
    #[error("a program in the VE has changed its mounts or namespaces while they were copied")]
    Rearranged,
    /// What the surgeon has told of processes cannot be read.
    #[error("what was captured of the processes of the VE is damaged")]
    Damaged,
    /// The link to the target broke.
    #[error("the target does not take the data any more")]
    Link,
}

fn list(blockers: &[Blocker]) -> String {
    blockers.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ")
}

impl CopyError {
    /// True for what passes by itself: a vfork(2), a process that ends, an exec from outside.
    pub(super) fn is_passing(&self) -> bool {
        use ckpt_engine::inject::InjectError;
        matches!(
            self,
            Self::Strangers(_)
                | Self::Moved
                | Self::Freeze(FreezeError::Timeout { .. })
                | Self::Memory(TrackError::Borrowed { .. })
                // What was not there when the VE was looked at may be gone in a moment.
                | Self::Capture(CaptureError::Blocked(_))
                | Self::Capture(CaptureError::Inject(
                    InjectError::Busy { .. } | InjectError::Ended { .. }
                ))
        )
    }
}

/// A running VE that is being copied.
pub(super) struct Live {
    pub(super) init: i32,
    pub(super) id_base: u32,
    pub(super) freezer: PathBuf,
    /// The top of the cgroups that the VE manages itself.
    pub(super) visible: PathBuf,
    /// How far the clocks inside are ahead of ours.
    pub(super) clock_offsets: Clocks,
    pub(super) tracker: Tracker,
    pub(super) files: FileTracker,
    /// How long the last look at the files took.
    pub(super) files_took: Duration,
    pub(super) spaces: Arc<Spaces>,
    /// The processes as they were in the last round.
    pub(super) holders: Holders,
    /// The connections that the target was told of.
    pub(super) resting: files::Resting,
    /// The network namespaces, the VE's own first.
    pub(super) networks: Vec<Netns>,
    pub(super) expected: Vec<Expected>,
    /// The settings of each network as they were at the offer.
    pub(super) settings: Vec<Vec<Setting>>,
    pub(super) hold: Option<Hold>,
    pub(super) brake: Brake,
    pub(super) watchdog: Watchdog,
    /// Which share of the pages of the last round could come after the switch.
    pub(super) plain: f64,
    /// What was there in the last round beside memory.
    pub(super) fixed: Fixed,
}

impl Live {
    /// One round of pre-copy, files first: the target maps them.
    pub(super) fn round(&mut self, number: u32, pipe: &Pipe) -> Result<Round, CopyError> {
        self.mounts()?;
        let (start, mapped) = (Instant::now(), self.mapped_files());
        contents::send_files(&mut self.files, &mapped, false, pipe)?;
        self.files_took = start.elapsed();
        self.holders = Holders::of(&self.freezer)?;
        let large = find_large(self.holders.hosts(), self.id_base);
        self.hold_contents(large)?;
        let round = self.tracker.round(&mut pipe.clone())?;
        self.learn();
        self.count_fixed();
        self.make_room(pipe)?;
        self.tell_connections(pipe)?;
        pipe.item(Item::Barrier(number)).map_err(|_| CopyError::Link)?;
        self.brake.look()?;
        self.plain = round.plain as f64 / round.pages.max(round.plain).max(1) as f64;
        Ok(round)
    }

    /// Asks now what would be asked in the freeze. What cannot be asked now can be then.
    fn learn(&self) {
        let patients = self.tracker.processes().map(Tracked::patient).collect();
        let ids = IdMap { base: self.id_base, count: ID_COUNT };
        if let Err(error) = self.watchdog.surgeon().learn(patients, ids) {
            tracing::info!(%error, "the processes of a VE are asked when they stand still");
        }
    }

    /// What travels with the memory although no process may map it.
    fn hold_contents(&mut self, mut all: Vec<(SharedObject, File)>) -> Result<(), CopyError> {
        for (number, namespace) in (0..).zip(self.spaces.ipc_namespaces()) {
            let segments = detached_segments(namespace.as_fd(), number, self.id_base)
                .map_err(|source| CopyError::Process { pid: self.init, source })?;
            all.extend(segments);
        }
        self.tracker.hold(all);
        Ok(())
    }

    /// The mounts of the VE, which must be those that the target has made.
    fn mounts(&self) -> Result<HashMap<u64, u32>, CopyError> {
        let mounts = self.spaces.mounts();
        let mounts = mounts.map_err(|source| CopyError::Process { pid: self.init, source })?;
        mounts.ok_or(CopyError::Rearranged)
    }

    /// True if every process is in the namespaces that the target was told of.
    fn are_in_place(&self) -> bool {
        // One that has just ended is nowhere.
        let now = |process: &Tracked| self.spaces.number(process.host()).ok();
        self.tracker
            .processes()
            .filter(|process| !process.is_in_place())
            .all(|process| now(process).is_none_or(|found| found == Some(process.namespaces())))
    }

    /// Sends files and memory of the VE that stands still, and reads everything else but its
    /// network. What was changed in it for that is undone by the first value.
    fn rest(
        &mut self,
        frozen: &Frozen,
        clocks: Clocks,
        memory: Memory,
        pipe: &Pipe,
        watch: &mut Stopwatch,
    ) -> (Option<Undo>, Result<(State, KeptBack), CopyError>) {
        let stopped_ns = clocks.monotonic_ns - self.clock_offsets.monotonic_ns;
        let (sent, captured) = self.send_contents_beside_descriptors(stopped_ns, memory, pipe);
        let mut captured = match (sent, captured) {
            (Ok(()), Ok(captured)) => captured,
            (Err(error), captured) => return (captured.ok().map(|it| it.undo), Err(error)),
            (Ok(()), Err(error)) => return (None, Err(error)),
        };
        watch.lap("contents and descriptors");
        let sets = captured.files.ipcs().map(|ipc| ipc.semaphores.clone()).collect();
        let rest = || {
            let surgeon = self.watchdog.surgeon();
            surgeon.read_letters(&captured.mailboxes, &mut captured.files)?;
            self.hold_contents(std::mem::take(&mut captured.contents))?;
            self.tracker.last_objects(&mut pipe.clone())?;
            watch.lap("objects");
            let strangers = strangers(self.tracker.strangers());
            if !strangers.is_empty() {
                return Err(CopyError::Strangers(strangers));
            }
            let ids = IdMap { base: self.id_base, count: ID_COUNT };
            let patients = self.tracker.processes().map(Tracked::patient).collect();
            let mut parts = Parts::new(pipe, memory);
            let taken = |some| parts.take(some);
            let rest = self.watchdog.surgeon().capture(frozen, patients, ids, sets, taken)?;
            let processes = parts.complete(rest)?;
            watch.lap("processes");
            let later = self.tell_later(&processes, pipe)?;
            Ok((processes, later))
        };
        let state = rest().map(|(processes, later)| {
            (
                State {
                    processes,
                    files: captured.files,
                    tables: captured.tables,
                    // What is around the processes is read beside this.
                    cgroups: Vec::new(),
                    network: Network::default(),
                    nested_networks: Vec::new(),
                    clocks,
                    clock_offsets: self.clock_offsets,
                },
                later,
            )
        });
        (Some(captured.undo), state)
    }

    /// Files and memory on the one hand, descriptors on the other: neither looks at what the other
    /// does.
    fn send_contents_beside_descriptors(
        &mut self,
        stopped_ns: i64,
        memory: Memory,
        pipe: &Pipe,
    ) -> (Result<(), CopyError>, Result<files::Captured, CopyError>) {
        let (init, id_base, spaces) = (self.init, self.id_base, self.spaces.clone());
        let holders = std::mem::take(&mut self.holders);
        let holders = holders.again(&self.freezer);
        let found = holders.and_then(|holders| Ok((holders, self.mounts()?)));
        let (holders, mounts) = match found {
            Ok(found) => found,
            Err(error) => return (Ok(()), Err(error)),
        };
        std::thread::scope(|scope| {
            let capturing = scope.spawn(|| {
                let _watch = Stopwatch::beside("descriptors");
                let (mounts, namespaces) = (Some(mounts), spaces.numbers());
                let networks = spaces.networks().iter().map(AsFd::as_fd).collect();
                let ipcs = spaces.ipcs().iter().map(AsFd::as_fd).collect();
                let source = holders.source(init, id_base);
                let stopped_ns = Some(stopped_ns);
                files::capture(&files::Source {
                    stopped_ns,
                    mounts,
                    namespaces,
                    networks,
                    ipcs,
                    ..source
                })
            });
            let sent = self.send_contents(memory, pipe);
            let captured =
                capturing.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
            (sent, captured.map_err(|blockers| CaptureError::Blocked(blockers).into()))
        })
    }

    fn send_contents(&mut self, memory: Memory, pipe: &Pipe) -> Result<(), CopyError> {
        let mapped = self.mapped_files();
        let Self { files, tracker, files_took, .. } = self;
        contents::send((files, &mapped), tracker, memory, *files_took, pipe)
    }

    /// Files that processes can write without anybody noticing: they are mapped, shared and
    /// writable.
    fn mapped_files(&self) -> MappedFiles {
        use std::os::linux::fs::MetadataExt;
        let mut all = MappedFiles::new();
        for process in self.tracker.processes() {
            for area in &process.space().areas {
                let Backing::File { path, .. } = &area.backing else { continue };
                if !area.shared || !area.may_write {
                    continue;
                }
                // In a namespace of its own, the path is one of that.
                let own = process.namespaces().mounts != 0;
                let seen_by = if own { process.host() } else { self.init };
                let inside = procfs::path(seen_by, &format!("root{path}"));
                if let Ok(metadata) = std::fs::symlink_metadata(inside) {
                    all.insert((metadata.st_dev(), metadata.st_ino()));
                }
            }
        }
        all
    }

    /// Stops the VE and holds its packets. On failure the VE runs on. If it is not sealed after
    /// `patience` its watchdog lets it go on.
    pub(super) fn freeze(mut self, patience: Duration) -> Result<Still, (Box<Self>, CopyError)> {
        super::unsent::wait(self.init, &self.spaces);
        let ready = self.brake.lift().map_err(CopyError::Cpu);
        let ready = ready.and_then(|()| Ok(self.watchdog.frozen(patience)?));
        if let Err(error) = ready {
            return Err((Box::new(self), error));
        }
        let start = Instant::now();
        let mut watch = Stopwatch::start("stop of a VE");
        let frozen = match Frozen::freeze(&self.freezer) {
            Ok(frozen) => frozen,
            Err(error) => return Err((Box::new(self), error.into())),
        };
        watch.lap("freeze");
        let clocks = match self.clocks() {
            Ok(clocks) => clocks,
            Err(source) => {
                let pid = self.init;
                return Err((Box::new(self), CopyError::Process { pid, source }));
            }
        };
        if let Some(hold) = &mut self.hold
            && let Err(error) = hold.cut()
        {
            let reopened = hold.reopen(&[]);
            drop(frozen);
            tracing::warn!(?reopened, "the packets of a VE could not be held");
            return Err((Box::new(self), error.into()));
        }
        watch.lap("cut");
        let (live, frozen) = (Some(self), Some(frozen));
        Ok(Still {
            live,
            undo: None,
            frozen,
            clocks,
            later: KeptBack::new(),
            watch,
            start,
            freeze: start.elapsed(),
        })
    }

    /// What the clocks of the VE show now.
    pub(super) fn clocks(&self) -> std::io::Result<Clocks> {
        let now = host_clocks()?;
        Ok(Clocks {
            monotonic_ns: now.monotonic_ns + self.clock_offsets.monotonic_ns,
            boottime_ns: now.boottime_ns + self.clock_offsets.boottime_ns,
        })
    }
}

/// A VE that stands still, and goes on when this is dropped.
pub(super) struct Still {
    /// Always there until the guard is taken apart.
    live: Option<Live>,
    undo: Option<Undo>,
    frozen: Option<Frozen>,
    clocks: Clocks,
    /// How much is to come after the switch.
    pub(super) later: KeptBack,
    /// Where the time goes.
    pub(super) watch: Stopwatch,
    /// When it stopped.
    pub(super) start: Instant,
    /// How long it took to stop.
    pub(super) freeze: Duration,
}

impl Still {
    /// Sends all that is left: files, memory, and the state of everything else.
    pub(super) fn send_rest(&mut self, memory: Memory, pipe: &Pipe) -> Result<(), CopyError> {
        let (Some(live), Some(frozen)) = (&mut self.live, &self.frozen) else {
            return Err(CopyError::Link);
        };
        let networks = live.networks.iter().map(Netns::try_clone).collect::<Result<Vec<_>, _>>();
        let networks = networks.map_err(|source| CopyError::Process { pid: live.init, source })?;
        let (expected, settings, id_base) =
            (live.expected.clone(), live.settings.clone(), live.id_base);
        let watch = &mut self.watch;
        std::thread::scope(|scope| {
            let visible = live.visible.clone();
            let around = scope.spawn(move || {
                let network = state::capture(&networks, &expected, id_base, Some(&settings));
                Ok::<_, CopyError>((network?, cgroups::capture(&visible, id_base)?))
            });
            watch.lap("threads");
            watch.turn("rest of a VE");
            let (undo, state) = live.rest(frozen, self.clocks, memory, pipe, watch);
            self.undo = undo;
            watch.turn("state of a VE");
            let around = around.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
            let (mut state, later) = state?;
            self.later = later;
            let (network, cgroups) = around?;
            if !live.are_in_place() {
                return Err(CopyError::Moved);
            }
            watch.lap("surroundings");
            state.cgroups = cgroups;
            if !network.blockers.is_empty() {
                return Err(CaptureError::Blocked(network.blockers).into());
            }
            let mut networks = network.networks;
            state.nested_networks = networks.split_off(1.min(networks.len()));
            state.network = networks.pop().unwrap_or_default();
            let sent = pipe.state(&state).map_err(|_| CopyError::Link);
            watch.lap("sent");
            watch.turn("answer of a VE");
            sent
        })
    }

    /// What the clocks of the VE showed then.
    pub(super) fn clocks(&self) -> Clocks {
        self.clocks
    }

    /// The cgroup that it stands still in.
    pub(super) fn freezer(&self) -> Option<&Path> {
        self.live.as_ref().map(|live| live.freezer.as_path())
    }

    /// The VE goes on, and is copied further.
    pub(super) fn back(mut self) -> Result<Live, CopyError> {
        self.wake();
        let mut live = self.live.take().ok_or(CopyError::Link)?;
        live.brake.again()?;
        Ok(live)
    }

    /// From here on only the log decides whether the VE may run here again.
    pub(super) fn seal(mut self) -> Result<(SealedVe, Stopwatch), CopyError> {
        let live = self.live.take().ok_or(CopyError::Link)?;
        if let Some(undo) = self.undo.take() {
            undo.seal();
        }
        let watch = std::mem::replace(&mut self.watch, Stopwatch::start("end of a VE"));
        Ok((SealedVe::new(live, self.frozen.take().map(Frozen::seal), self.start), watch))
    }

    /// Asks the watchdog whether this may be sealed. If not, drop it.
    pub(super) fn may_seal(&mut self) -> Result<(), CopyError> {
        let live = self.live.as_mut().ok_or(CopyError::Link)?;
        Ok(live.watchdog.seal()?)
    }

    /// Connections first, then the way out, then processes, then packets: what the VE sends when it
    /// wakes must get through.
    fn wake(&mut self) {
        let Some(live) = &mut self.live else { return };
        if let Some(undo) = self.undo.take()
            && !live.watchdog.reclaim()
        {
            undo.spare_connections();
        }
        if let Some(hold) = &mut live.hold
            && let Err(error) = hold.open_outgoing()
        {
            tracing::warn!(%error, "a VE that goes on cannot send yet");
        }
        if let Some(frozen) = self.frozen.take()
            && let Err(error) = live.watchdog.surgeon().hide_interruption(&frozen)
        {
            tracing::warn!(%error, "programs in the VE may notice that they stood still");
        }
        if let Some(hold) = &mut live.hold
            && let Err(error) = hold.reopen(&[])
        {
            // The watchdog opens the way, though what was held is lost.
            tracing::error!(%error, "cannot deliver the held packets of a VE");
            return;
        }
        if let Err(error) = live.watchdog.thawed() {
            tracing::warn!(%error, "a VE that goes on is not watched over any more");
        }
    }
}

impl Drop for Still {
    fn drop(&mut self) {
        self.wake();
    }
}
