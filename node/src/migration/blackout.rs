//! The source's VE while it is copied, and while it stands still.
//!
//! [`Live`] runs; [`Live::freeze`] makes a [`Still`] of it, which runs again when it is dropped:
//! connections put back, processes let go, packets delivered, in this order. Only
//! [`Still::seal`] ends that, and [`SealedVe::resume`] is the way back once the log has said so.

use std::{
    collections::HashSet,
    os::fd::{AsFd, OwnedFd},
    path::PathBuf,
    time::{Duration, Instant},
};

use ckpt_engine::{
    capture::{self, CaptureError, IdMap},
    container::{ID_COUNT, host_clocks},
    files::{self, Holder, Undo},
    freeze::{FreezeError, Frozen, Sealed},
    procfs,
    sys::{netns::Netns, task},
    track::{Round, TrackError, Tracker},
};
use ckpt_format::{
    blocker::Blocker,
    container::Clocks,
    memory::Backing,
    network::{Frame, Network},
};

use super::{
    messages::{Item, State},
    pipe::Pipe,
    rounds::Fixed,
};
use crate::{
    network::{
        Hold, NetworkError,
        state::{self, Expected},
    },
    storage::{FileTracker, TreeError},
};

/// Why a VE could not be copied. It runs on.
#[derive(Debug, thiserror::Error)]
pub enum CopyError {
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
    /// A process could not be looked at.
    #[error("cannot look at process {pid}")]
    Process {
        /// The process, as numbered on the host.
        pid: i32,
        /// Why.
        source: std::io::Error,
    },
    /// The link to the target broke.
    #[error("the target does not take the data any more")]
    Link,
}

/// A running VE that is being copied.
pub(super) struct Live {
    pub(super) init: i32,
    pub(super) id_base: u32,
    pub(super) freezer: PathBuf,
    /// The raw upper layer of the VE's files.
    pub(super) upper: PathBuf,
    /// How far the clocks inside are ahead of ours.
    pub(super) clock_offsets: Clocks,
    pub(super) tracker: Tracker,
    pub(super) files: FileTracker,
    pub(super) netns: Netns,
    pub(super) expected: Vec<Expected>,
    /// The network as it was at the offer.
    pub(super) network: Network,
    pub(super) hold: Option<Hold>,
}

impl Live {
    /// One round of pre-copy, files first: the target maps them.
    pub(super) fn round(&mut self, number: u32, pipe: &Pipe) -> Result<Round, CopyError> {
        let dirty = self.shared_files();
        let mut sink = |record| pipe.item(&Item::File(record)).map_err(|_| crate::storage::SinkClosed);
        self.files.round(&dirty, false, &mut sink)?;
        let round = self.tracker.round(&mut pipe.clone())?;
        pipe.item(&Item::Barrier(number)).map_err(|_| CopyError::Link)?;
        Ok(round)
    }

    /// What a blackout costs however little memory is left.
    pub(super) fn fixed(&self) -> Fixed {
        let mut fixed = Fixed::default();
        for process in self.tracker.processes() {
            let count = |name: &str| {
                std::fs::read_dir(procfs::path(process.host(), name)).map_or(0, Iterator::count)
            };
            fixed.processes += 1;
            fixed.threads += count("task");
            fixed.descriptors += count("fd");
        }
        fixed
    }

    /// Files that processes can write without anybody noticing: they are mapped, shared and
    /// writable. By device and inode of the upper layer, where such a file always is.
    fn shared_files(&self) -> HashSet<(u64, u64)> {
        use std::os::linux::fs::MetadataExt;
        let mut all = HashSet::new();
        for process in self.tracker.processes() {
            for area in &process.space().areas {
                let Backing::File { path, .. } = &area.backing else { continue };
                if !area.shared || !area.may_write {
                    continue;
                }
                let upper = self.upper.join(path.trim_start_matches('/'));
                let inside = procfs::path(self.init, &format!("root{path}"));
                for path in [upper, inside] {
                    if let Ok(metadata) = std::fs::symlink_metadata(path) {
                        all.insert((metadata.st_dev(), metadata.st_ino()));
                    }
                }
            }
        }
        all
    }

    /// Stops the VE and holds its packets. On failure the VE runs on.
    pub(super) fn freeze(mut self) -> Result<Still, (Box<Self>, CopyError)> {
        let start = Instant::now();
        let frozen = match Frozen::freeze(&self.freezer) {
            Ok(frozen) => frozen,
            Err(error) => return Err((Box::new(self), error.into())),
        };
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
        let frozen = Some(frozen);
        let freeze = start.elapsed();
        Ok(Still { live: self, undo: None, frozen, frames: Vec::new(), clocks, start, freeze })
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
    live: Live,
    undo: Option<Undo>,
    frozen: Option<Frozen>,
    frames: Vec<Frame>,
    clocks: Clocks,
    /// When it stopped.
    pub(super) start: Instant,
    /// How long it took to stop.
    pub(super) freeze: Duration,
}

impl Still {
    /// Sends all that is left: files, memory, and the state of everything else.
    pub(super) fn send_rest(&mut self, pipe: &Pipe) -> Result<(), CopyError> {
        let dirty = self.live.shared_files();
        let mut sink = |record| pipe.item(&Item::File(record)).map_err(|_| crate::storage::SinkClosed);
        self.live.files.round(&dirty, true, &mut sink)?;
        let holders = Holders::of(&self.live.freezer)?;
        let captured = files::capture(&holders.source(self.live.init, self.live.id_base))
            .map_err(CaptureError::Blocked)?;
        self.undo = Some(captured.undo);
        for (object, file) in holders.memfds(&captured.files, &captured.tables)? {
            self.live.tracker.add_memfd(object, file);
        }
        self.live.tracker.last_round(&mut pipe.clone())?;
        let Some(frozen) = &self.frozen else { return Err(CopyError::Link) };
        let ids = IdMap { base: self.live.id_base, count: ID_COUNT };
        let processes = capture::capture(frozen, self.live.tracker.processes(), ids)?;
        let known = Some(self.live.network.settings.as_slice());
        let network = state::capture(&self.live.netns, &self.live.expected, known)?;
        if !network.blockers.is_empty() {
            return Err(CaptureError::Blocked(network.blockers).into());
        }
        let network = network.network;
        let state = State {
            processes,
            files: captured.files,
            tables: captured.tables,
            network,
            clocks: self.clocks,
        };
        pipe.state(&state).map_err(|_| CopyError::Link)
    }

    /// From here on only the log decides whether the VE may run here again.
    pub(super) fn seal(mut self) -> SealedVe {
        if let Some(undo) = self.undo.take() {
            undo.seal();
        }
        let sealed = self.frozen.take().map(Frozen::seal);
        let hold = self.live.hold.take();
        let frames = std::mem::take(&mut self.frames);
        SealedVe {
            sealed,
            hold,
            frames,
            freezer: self.live.freezer.clone(),
            init: self.live.init,
            id_base: self.live.id_base,
            start: self.start,
        }
    }
}

impl Drop for Still {
    fn drop(&mut self) {
        drop(self.undo.take());
        drop(self.frozen.take());
        if let Some(mut hold) = self.live.hold.take() {
            if let Err(error) = hold.reopen(&self.frames) {
                tracing::error!(%error, "cannot deliver the held packets of a VE");
            }
            if let Err(error) = hold.remove() {
                tracing::warn!(%error, "cannot remove the hold on the packets of a VE");
            }
        }
    }
}

/// A VE that stands still until the log says who owns it.
pub(super) struct SealedVe {
    sealed: Option<Sealed>,
    hold: Option<Hold>,
    frames: Vec<Frame>,
    freezer: PathBuf,
    init: i32,
    id_base: u32,
    /// When it stopped.
    pub(super) start: Instant,
}

impl SealedVe {
    /// Takes the frames that were held since the last call.
    pub(super) fn drain(&mut self) -> Vec<Frame> {
        let Some(hold) = &mut self.hold else { return Vec::new() };
        match hold.drain() {
            Ok(drained) => {
                if drained.lost > 0 {
                    tracing::warn!(lost = drained.lost, "frames for a VE did not fit the hold");
                }
                // Kept as well: they are due here if the VE comes back.
                self.frames.extend(drained.frames.iter().cloned());
                drained.frames
            }
            Err(error) => {
                tracing::warn!(%error, "cannot read the held packets of a VE");
                Vec::new()
            }
        }
    }

    /// The log says that the VE is ours: it goes on here.
    pub(super) fn resume(&mut self) -> Result<(), CopyError> {
        let holders = Holders::of(&self.freezer)?;
        files::mend(&holders.source(self.init, self.id_base)).map_err(CaptureError::Blocked)?;
        if let Some(sealed) = self.sealed.take() {
            sealed.unseal().thaw()?;
        }
        if let Some(mut hold) = self.hold.take() {
            hold.reopen(&self.frames)?;
            hold.remove()?;
        }
        Ok(())
    }
}

/// The processes of a VE with descriptors for them.
pub(super) struct Holders(Vec<(i32, i32, String, OwnedFd)>);

impl Holders {
    /// All that live in a cgroup now.
    pub(super) fn of(cgroup: &std::path::Path) -> Result<Self, CopyError> {
        let list = |source| CopyError::Process { pid: 0, source };
        let mut all = Vec::new();
        for host in procfs::cgroup_processes(cgroup).map_err(list)? {
            let Ok(status) = procfs::Status::read(host) else { continue };
            let (Ok(inner), Ok(name)) = (status.innermost("NSpid"), status.text("Name")) else {
                continue;
            };
            if status.text("State").is_ok_and(|state| state.starts_with('Z')) {
                continue;
            }
            let pidfd =
                task::pidfd_open(host).map_err(|source| CopyError::Process { pid: host, source })?;
            all.push((host, inner, name.to_owned(), pidfd));
        }
        Ok(Self(all))
    }

    pub(super) fn source(&self, init: i32, id_base: u32) -> files::Source<'_> {
        let processes = self
            .0
            .iter()
            .map(|(host, inner, command, pidfd)| Holder {
                host_pid: *host,
                pid: *inner,
                command: command.clone(),
                pidfd: pidfd.as_fd(),
            })
            .collect();
        files::Source { processes, init, id_base }
    }

    /// Opens the memfds that descriptors refer to.
    fn memfds(
        &self,
        captured: &ckpt_format::files::Files,
        tables: &std::collections::BTreeMap<i32, Vec<ckpt_format::process::Descriptor>>,
    ) -> Result<Vec<(ckpt_format::memory::SharedObject, std::fs::File)>, CopyError> {
        let mut all = Vec::new();
        for memfd in &captured.memfds {
            let refers = |descriptor: &&ckpt_format::process::Descriptor| {
                captured.get(descriptor.file).is_some_and(|file| {
                    matches!(file.kind, ckpt_format::files::Kind::Memfd { object, .. } if object == memfd.id)
                })
            };
            let held = tables.iter().find_map(|(pid, table)| {
                let descriptor = table.iter().find(refers)?;
                let (host, ..) = self.0.iter().find(|(_, inner, ..)| inner == pid)?;
                Some((*host, descriptor.fd))
            });
            let Some((host, fd)) = held else { continue };
            let path = procfs::path(host, &format!("fd/{fd}"));
            let file = std::fs::File::open(path)
                .map_err(|source| CopyError::Process { pid: host, source })?;
            all.push((memfd.clone(), file));
        }
        Ok(all)
    }
}

/// Everything that would stop a move of this VE now; disturbs nothing.
pub(super) fn blockers(
    init: i32,
    id_base: u32,
    freezer: &std::path::Path,
) -> Result<Vec<Blocker>, CopyError> {
    let list = |source| CopyError::Process { pid: init, source };
    let mut all = capture::check(freezer).map_err(list)?;
    let holders = Holders::of(freezer)?;
    all.extend(files::check(&holders.source(init, id_base)));
    Ok(all)
}
