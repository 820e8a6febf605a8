//! Pre-copy: sends the memory of a running VE in rounds, each what was written since the last.
//!
//! Writes are tracked by userfaultfd's asynchronous write protection and found by
//! `PAGEMAP_SCAN`: the kernel resolves the faults by itself, so a dead daemon never blocks the
//! VE. What tracking cannot see is listed here, and is always treated as written:
//!
//! - new and moved areas (not registered yet), new processes, and programs just executed;
//! - shared memory, which any holder of a descriptor can write: compared by content;
//! - pages that could not be read when they were due.
//!
//! What vanished is told by [`Record::Drop`], so that the target never keeps stale pages.

mod process;
mod shared;

use std::{
    collections::{BTreeMap, HashMap},
    fs::File,
    io,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use ckpt_format::{
    memory::{Area, Backing, PAGE, Run, SharedObject, Space},
    process::{Layout, Shape},
    stream::Record,
};

pub use self::process::Tracked;
use self::shared::TrackedObject;
use crate::{
    inject::InjectError,
    procfs::{self, ProcError, Stat, Status},
    surgeon::Surgeon,
};

/// Why a round could not be done.
#[derive(Debug, thiserror::Error)]
pub enum TrackError {
    /// The VE's processes could not be listed.
    #[error("cannot list the processes in {}", cgroup.display())]
    List {
        /// The VE's cgroup.
        cgroup: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The VE has no init any more.
    #[error("the VE has ended")]
    Ended,
    /// A file of `/proc` was not readable.
    #[error(transparent)]
    Proc(#[from] ProcError),
    /// A process could not be told to start tracking.
    #[error("cannot track process {pid}")]
    Arm {
        /// The process, as numbered in the VE.
        pid: i32,
        /// Why.
        source: InjectError,
    },
    /// The memory of a process could not be scanned or read.
    #[error("cannot read the memory of process {pid}")]
    Memory {
        /// The process, as numbered in the VE.
        pid: i32,
        /// Why.
        source: io::Error,
    },
    /// The process has the memory of its parent, which waits for it: it is about to execute a
    /// program.
    #[error("process {pid} is about to execute a program")]
    Borrowed {
        /// The process, as numbered in the VE.
        pid: i32,
    },
    /// A shared object could not be read.
    #[error("cannot read shared memory object {object}")]
    Shared {
        /// The object.
        object: u64,
        /// Why.
        source: io::Error,
    },
    /// Nobody takes the records any more.
    #[error("the receiver of the memory stream is gone")]
    Sink,
}

/// How long a process may take to die, in a VE that stands still.
const DYING: Duration = Duration::from_secs(1);

/// Where records go. `Err` means that nobody takes them any more.
pub trait Sink {
    /// Takes one record; may block, so that memory stays bounded.
    fn record(&mut self, record: Record) -> Result<(), SinkClosed>;
}

/// The receiving side of a [`Sink`] is gone.
#[derive(Debug)]
pub struct SinkClosed;

impl<F: FnMut(Record) -> Result<(), SinkClosed>> Sink for F {
    fn record(&mut self, record: Record) -> Result<(), SinkClosed> {
        self(record)
    }
}

/// What one round sent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Round {
    /// Pages with contents.
    pub pages: u64,
    /// Pages that hold zeros or have vanished.
    pub dropped: u64,
    /// Processes seen.
    pub processes: usize,
}

/// One process seen in the cgroup.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Seen {
    host: i32,
    start_time: u64,
    inner: i32,
    parent: i32,
    zombie: Option<i32>,
    exit_signal: i32,
    group: i32,
    session: i32,
    /// Does not come to a stop of ours, or would show it: stopped by a signal.
    blocked: bool,
}

/// Tracks the memory of one VE.
#[derive(Debug)]
pub struct Tracker {
    cgroup: PathBuf,
    id_base: u32,
    surgeon: Surgeon,
    processes: BTreeMap<i32, Tracked>,
    shared: HashMap<u64, TrackedObject>,
    /// Objects that are only open, not mapped.
    open: HashMap<u64, SharedObject>,
    /// Processes that hang outside the tree of the VE's init, as numbered on the host.
    strangers: Vec<i32>,
    lives: u64,
    frozen: bool,
}

impl Tracker {
    /// For the VE whose processes live in `cgroup` (cgroup v2) and whose ids start at `id_base`.
    /// `surgeon` starts the tracking of each process.
    pub fn new(cgroup: &Path, id_base: u32, surgeon: Surgeon) -> Self {
        Self {
            cgroup: cgroup.to_owned(),
            id_base,
            surgeon,
            processes: BTreeMap::new(),
            shared: HashMap::new(),
            open: HashMap::new(),
            strangers: Vec::new(),
            lives: 0,
            frozen: false,
        }
    }

    /// Sends what was written since the last round; the first time, everything.
    pub fn round(&mut self, sink: &mut impl Sink) -> Result<Round, TrackError> {
        let layout = self.refresh()?;
        let mut round = Round { processes: layout.processes.len(), ..Round::default() };
        sink.record(Record::Layout(layout)).map_err(|SinkClosed| TrackError::Sink)?;
        let mut output = Output { sink, round: &mut round };
        for object in self.shared.values_mut() {
            object.send_changes(&mut output)?;
        }
        for tracked in self.processes.values_mut() {
            tracked.send_written(self.frozen, &mut output)?;
        }
        Ok(round)
    }

    /// Says which objects travel although no process maps them, in place of what was said before:
    /// open memfds and files without a name, segments that nobody has attached. The files are
    /// open for reading.
    pub fn hold(&mut self, objects: Vec<(SharedObject, File)>) {
        self.open.clear();
        for (object, file) in objects {
            self.open.insert(object.id, object.clone());
            self.shared.entry(object.id).or_insert_with(|| TrackedObject::new(file, object));
        }
    }

    /// As [`Self::round`] for a VE whose processes are frozen: nothing is armed any more, and
    /// every page that could not be read is an error.
    pub fn last_round(&mut self, sink: &mut impl Sink) -> Result<Round, TrackError> {
        let start = Instant::now();
        loop {
            self.frozen = true;
            let result = self.round(sink);
            self.frozen = false;
            match result {
                // What was dying when the VE stopped goes on to die: nothing can freeze it.
                Err(error) if error.is_transient() && start.elapsed() < DYING => {}
                other => return other,
            }
        }
    }

    /// The processes of the last round that are not zombies: number in the VE and on the host.
    pub fn processes(&self) -> impl Iterator<Item = &Tracked> {
        self.processes.values()
    }

    /// The processes of the last round that the host has put into the VE (`vzctl exec`), as
    /// numbered on the host: they are not part of its tree, and cannot move with it.
    pub fn strangers(&self) -> &[i32] {
        &self.strangers
    }

    /// Brings the list of processes up to date and arms the new ones.
    fn refresh(&mut self) -> Result<Layout, TrackError> {
        let seen = list(&self.cgroup, self.frozen)?;
        let order = in_tree_order(&seen);
        self.strangers = seen
            .iter()
            .filter(|process| order.iter().all(|known| known.host != process.host))
            .map(|process| process.host)
            .collect();
        self.processes.retain(|host, tracked| {
            seen.iter().any(|seen| {
                seen.host == *host
                    && seen.start_time == tracked.start_time()
                    && seen.zombie.is_none()
            })
        });
        let mut layout = Layout::default();
        let mut objects = HashMap::new();
        let frozen = self.frozen;
        for seen in order {
            let (life, areas) = match seen.zombie {
                Some(_) => (seen.start_time, Vec::new()),
                None => match self.refresh_process(&seen) {
                    Ok(tracked) => {
                        objects.extend(
                            tracked
                                .space()
                                .shared
                                .iter()
                                .map(|(&object, &range)| (object, (tracked.host(), range))),
                        );
                        (tracked.life(), tracked.space().areas.clone())
                    }
                    Err(error) if !frozen && error.is_transient() => continue,
                    Err(error) => return Err(error),
                },
            };
            layout.processes.push(Shape {
                pid: seen.inner,
                life,
                parent: seen.parent,
                group: seen.group,
                session: seen.session,
                exit_signal: seen.exit_signal,
                zombie: seen.zombie,
                areas,
            });
        }
        if layout.processes.first().is_none_or(|init| init.pid != 1) {
            return Err(TrackError::Ended);
        }
        self.refresh_shared(&objects, &mut layout)?;
        Ok(layout)
    }

    fn refresh_process(&mut self, seen: &Seen) -> Result<&Tracked, TrackError> {
        let tracked = self
            .processes
            .entry(seen.host)
            .or_insert_with(|| Tracked::new(seen.host, seen.inner, seen.start_time));
        let surgeon = (!self.frozen && !seen.blocked).then_some(&self.surgeon);
        tracked.refresh(&mut self.lives, surgeon)?;
        Ok(tracked)
    }

    fn refresh_shared(
        &mut self,
        objects: &HashMap<u64, (i32, (u64, u64))>,
        layout: &mut Layout,
    ) -> Result<(), TrackError> {
        self.shared.retain(|id, _| objects.contains_key(id) || self.open.contains_key(id));
        for (&object, &(host, range)) in objects {
            let tracked = match self.shared.entry(object) {
                std::collections::hash_map::Entry::Occupied(entry) => entry.into_mut(),
                std::collections::hash_map::Entry::Vacant(entry) => {
                    match TrackedObject::open(host, range, object, self.id_base) {
                        Ok(tracked) => entry.insert(tracked),
                        Err(source) if self.frozen => {
                            return Err(TrackError::Shared { object, source });
                        }
                        Err(_) => continue,
                    }
                }
            };
            layout.shared.push(tracked.describe()?);
        }
        for object in self.open.keys().filter(|object| !objects.contains_key(object)) {
            if let Some(tracked) = self.shared.get_mut(object) {
                layout.shared.push(tracked.describe()?);
            }
        }
        layout.shared.sort_by_key(|object| object.id);
        // An object that is gone again already: its area comes, or not, with the next round.
        let known = |area: &Area| match area.backing {
            Backing::Shared { object } => {
                layout.shared.binary_search_by_key(&object, |shared| shared.id).is_ok()
            }
            _ => true,
        };
        for shape in &mut layout.processes {
            shape.areas.retain(known);
        }
        Ok(())
    }
}

impl TrackError {
    /// True for what a running VE may cause at any moment by ending or executing a program.
    fn is_transient(&self) -> bool {
        match self {
            Self::Proc(error) => error.is_gone(),
            Self::Memory { source, .. } => source.raw_os_error() == Some(libc::ESRCH),
            _ => false,
        }
    }
}

/// Lists the processes in a cgroup as they are numbered inside the VE. Zombies are in no cgroup
/// any more: they are looked for, as children of the others, when it counts.
fn list(cgroup: &Path, zombies: bool) -> Result<Vec<Seen>, TrackError> {
    let mut hosts = procfs::cgroup_processes(cgroup)
        .map_err(|source| TrackError::List { cgroup: cgroup.to_owned(), source })?;
    if zombies {
        for index in 0..hosts.len() {
            let children = procfs::children(hosts[index])?;
            let new = children.into_iter().filter(|child| !hosts.contains(child));
            hosts.extend(new.collect::<Vec<_>>());
        }
    }
    let mut inner_by_host = HashMap::new();
    let mut seen = Vec::with_capacity(hosts.len());
    for host in hosts {
        match see(host, zombies) {
            Ok((process, parent_host)) => {
                inner_by_host.insert(host, process.inner);
                seen.push((process, parent_host));
            }
            Err(error) if error.is_gone() => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(seen
        .into_iter()
        .map(|(process, parent)| Seen {
            parent: inner_by_host.get(&parent).copied().unwrap_or(0),
            ..process
        })
        .collect())
}

/// A process as it is; one that is dying has no memory any more, and is waited for until it shows
/// as dead if `settled` is asked for.
fn stat_of(host: i32, settled: bool) -> Result<Stat, ProcError> {
    let start = Instant::now();
    loop {
        let stat = Stat::read(host)?;
        let dead = matches!(stat.state, 'Z' | 'X');
        if !settled || dead || stat.field::<u64>(23, "vsize")? > 0 || start.elapsed() > DYING {
            return Ok(stat);
        }
        std::thread::yield_now();
    }
}

fn see(host: i32, settled: bool) -> Result<(Seen, i32), ProcError> {
    let stat = stat_of(host, settled)?;
    let status = Status::read(host)?;
    let zombie = match stat.state {
        'Z' | 'X' => Some(stat.field(52, "exit_code")?),
        _ => None,
    };
    let seen = Seen {
        host,
        start_time: stat.field(22, "starttime")?,
        inner: status.innermost("NSpid")?,
        parent: 0,
        zombie,
        exit_signal: stat.field(38, "exit_signal")?,
        group: status.innermost("NSpgid")?,
        session: status.innermost("NSsid")?,
        blocked: matches!(stat.state, 'D' | 'T'),
    };
    Ok((seen, stat.field(4, "ppid")?))
}

/// Parents before children, from the VE's init on; what hangs outside its tree is left out.
fn in_tree_order(seen: &[Seen]) -> Vec<Seen> {
    let mut children: HashMap<i32, Vec<Seen>> = HashMap::new();
    let mut order: Vec<Seen> = Vec::with_capacity(seen.len());
    for process in seen {
        if process.inner == 1 {
            order.push(*process);
        } else if process.parent != 0 {
            children.entry(process.parent).or_default().push(*process);
        }
    }
    let mut next = 0;
    while let Some(process) = order.get(next) {
        order.extend(children.remove(&process.inner).unwrap_or_default());
        next += 1;
    }
    order
}

/// Collects pages into records of a bounded size.
struct Output<'a, S: Sink> {
    sink: &'a mut S,
    round: &'a mut Round,
}

impl<S: Sink> Output<'_, S> {
    /// Sends the contents of pages. Pages of zeros are sorted out where nothing is the same as
    /// zeros, which `blank` tells of an address: not where a file would show through.
    fn pages(
        &mut self,
        space: Space,
        runs: &[Run],
        data: &[u8],
        blank: impl Fn(u64) -> bool,
    ) -> Result<(), TrackError> {
        let mut full = Vec::new();
        let mut zero = Vec::new();
        let mut bytes = Vec::with_capacity(data.len());
        let mut pages = data.chunks_exact(PAGE as usize);
        for run in runs {
            for index in 0..run.pages {
                let page = pages.next().unwrap_or_default();
                let start = run.start + index * PAGE;
                if is_zero(page) && blank(start) {
                    push_page(&mut zero, start);
                } else {
                    push_page(&mut full, start);
                    bytes.extend_from_slice(page);
                }
            }
        }
        if !full.is_empty() {
            self.round.pages += bytes.len() as u64 / PAGE;
            self.send(Record::Pages { space, runs: full, data: bytes })?;
        }
        self.drop_runs(space, zero)
    }

    /// Says that these pages hold nothing any more.
    fn drop_runs(&mut self, space: Space, runs: Vec<Run>) -> Result<(), TrackError> {
        if runs.is_empty() {
            return Ok(());
        }
        self.round.dropped += runs.iter().map(|run| run.pages).sum::<u64>();
        self.send(Record::Drop { space, runs })
    }

    fn send(&mut self, record: Record) -> Result<(), TrackError> {
        self.sink.record(record).map_err(|SinkClosed| TrackError::Sink)
    }
}

fn is_zero(page: &[u8]) -> bool {
    page.chunks_exact(64).all(|line| line == [0; 64])
}

fn push_page(runs: &mut Vec<Run>, start: u64) {
    match runs.last_mut() {
        Some(run) if run.end() == start => run.pages += 1,
        _ => runs.push(Run { start, pages: 1 }),
    }
}
