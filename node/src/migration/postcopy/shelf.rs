//! The source: gives out pages of a VE that stands still here and runs on the target.

use std::{
    collections::{HashMap, VecDeque},
    fs::File,
    io,
    os::unix::fs::FileExt,
    path::Path,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Instant,
};

use ckpt_engine::procfs::{self, Status};
use ckpt_format::{
    memory::{PAGE, Run, Space},
    stream::{PAGE_DATA_MAX, Record},
};
use coordinator::MigrationId;
use tokio::{
    sync::{mpsc, watch},
    task::spawn_blocking,
};
use transport::{Bulk, BulkSender, ControlReceiver, ControlSender, LinkError, NodeId};

use super::{Answer, Question};
use crate::migration::{messages::Item, packing, squeeze::Squeeze};

/// All VEs whose pages are given out here.
#[derive(Debug, Default)]
pub(in crate::migration) struct Shelves(Mutex<HashMap<MigrationId, Arc<Shelf>>>);

impl Shelves {
    /// From now on these pages are given out.
    pub(in crate::migration) fn put(&self, migration: MigrationId, shelf: Arc<Shelf>) {
        self.all().insert(migration, shelf);
    }

    /// They are needed no more.
    pub(in crate::migration) fn clear(&self, migration: MigrationId) {
        self.all().remove(&migration);
    }

    /// The pages of a migration, for its target only.
    pub(super) fn find(&self, migration: MigrationId, target: NodeId) -> Option<Arc<Shelf>> {
        self.all().get(&migration).filter(|shelf| shelf.target == target).cloned()
    }

    fn all(&self) -> MutexGuard<'_, HashMap<MigrationId, Arc<Shelf>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// How the target came out of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::migration) enum Outcome {
    /// It has everything.
    Complete {
        /// How often somebody had to wait.
        faults: u64,
    },
    /// The VE ended before.
    Ended,
}

/// The memory of the frozen processes of one VE.
#[derive(Debug)]
pub(in crate::migration) struct Shelf {
    target: NodeId,
    memory: HashMap<i32, File>,
    pages: AtomicU64,
    bytes: AtomicU64,
    /// What was asked for and given, zeros as well, in bytes.
    given: AtomicU64,
    outcome: watch::Sender<Option<Outcome>>,
}

impl Shelf {
    /// Opens the memory of all processes in a frozen cgroup.
    pub(in crate::migration) fn open(freezer: &Path, target: NodeId) -> io::Result<Self> {
        let mut memory = HashMap::new();
        for host in procfs::cgroup_processes(freezer)? {
            // The dead among them have no memory.
            let Ok(status) = Status::read(host) else { continue };
            let Ok(pid) = status.in_ve("NSpid") else { continue };
            let host = match status.text("State").is_ok_and(|state| state.starts_with('Z')) {
                true => procfs::stand_in(host).unwrap_or(host),
                false => host,
            };
            if let Ok(file) = File::open(procfs::path(host, "mem"))
                && memory.insert(pid, file).is_some()
            {
                // Whose pages are asked for could not be told.
                return Err(io::ErrorKind::AlreadyExists.into());
            }
        }
        Ok(Self {
            target,
            memory,
            pages: AtomicU64::new(0),
            bytes: AtomicU64::new(0),
            given: AtomicU64::new(0),
            outcome: watch::channel(None).0,
        })
    }

    /// Fails unless the memory of all these processes is here.
    pub(in crate::migration) fn check(
        &self,
        mut processes: impl Iterator<Item = i32>,
    ) -> io::Result<()> {
        match processes.all(|pid| self.memory.contains_key(&pid)) {
            true => Ok(()),
            false => Err(io::ErrorKind::NotFound.into()),
        }
    }

    /// Pages given so far, zeros not counted.
    pub(in crate::migration) fn pages(&self) -> u64 {
        self.pages.load(Ordering::Relaxed)
    }

    /// Bytes sent so far.
    pub(in crate::migration) fn bytes(&self) -> u64 {
        self.bytes.load(Ordering::Relaxed)
    }

    /// How much of the memory was given so far, in bytes.
    pub(in crate::migration) fn given(&self) -> u64 {
        self.given.load(Ordering::Relaxed)
    }

    /// How the target came out of it, once it has said so.
    pub(in crate::migration) fn outcome(&self) -> watch::Receiver<Option<Outcome>> {
        self.outcome.subscribe()
    }

    /// Answers one link until it ends: what somebody waits for first.
    pub(super) async fn serve(
        self: Arc<Self>,
        mut sender: ControlSender,
        mut receiver: ControlReceiver,
        bulk: Bulk,
    ) -> Result<(), LinkError> {
        sender.send(&Answer::Serving).await?;
        let mut stream = bulk.open().await?;
        let squeeze = Squeeze::default();
        // A stream is seen at the other end when something was written.
        stream.send_joined(packing::pack(Item::Postcopy, &squeeze)).await?;
        let (queue, mut questions) = mpsc::unbounded_channel();
        let reading = tokio::spawn(async move {
            while let Ok(question) = receiver.recv::<Question>().await {
                if queue.send(question).is_err() {
                    break;
                }
            }
        });
        let (mut urgent, mut rest) = (VecDeque::new(), VecDeque::new());
        let served = loop {
            let more = match urgent.is_empty() && rest.is_empty() {
                true => match questions.recv().await {
                    Some(question) => Some(question),
                    None => break Ok(()),
                },
                false => questions.try_recv().ok(),
            };
            match more {
                Some(Question::Want { pid, run, urgent: true }) => urgent.push_back((pid, run)),
                Some(Question::Want { pid, run, urgent: false }) => rest.push_back((pid, run)),
                Some(Question::Complete { faults }) => {
                    self.outcome.send_replace(Some(Outcome::Complete { faults }));
                }
                Some(Question::Ended) => drop(self.outcome.send_replace(Some(Outcome::Ended))),
                Some(Question::Able | Question::Fetch { .. }) => {}
                None => {
                    let Some((pid, run)) = urgent.pop_front().or_else(|| rest.pop_front()) else {
                        continue;
                    };
                    if let Err(error) = self.give(&mut stream, &squeeze, pid, run).await {
                        break Err(error);
                    }
                }
            }
        };
        reading.abort();
        match served {
            Err(NotGiven::Lost(error)) => {
                tracing::error!(%error, "the memory of a VE that moved away is lost");
                sender.send(&Answer::Gone).await
            }
            Err(NotGiven::Link(error)) => Err(error),
            Ok(()) => Ok(()),
        }
    }

    async fn give(
        self: &Arc<Self>,
        stream: &mut BulkSender,
        squeeze: &Squeeze,
        pid: i32,
        run: Run,
    ) -> Result<(), NotGiven> {
        let this = self.clone();
        let records = spawn_blocking(move || this.read(pid, run)).await;
        for record in records.map_err(io::Error::other)?? {
            if let Record::Pages { data, .. } = &record {
                self.pages.fetch_add(data.len() as u64 / PAGE, Ordering::Relaxed);
            }
            let parts = packing::pack(Item::Memory(record), squeeze);
            let (start, len) = (Instant::now(), parts[0].len() + parts[1].len());
            stream.send_joined(parts).await.map_err(NotGiven::Link)?;
            squeeze.sent(len, start.elapsed());
            self.bytes.fetch_add(len as u64, Ordering::Relaxed);
        }
        self.given.fetch_add(run.pages * PAGE, Ordering::Relaxed);
        Ok(())
    }

    /// Reads pages: those with contents, and those of zeros.
    fn read(&self, pid: i32, run: Run) -> io::Result<Vec<Record>> {
        let len = run.pages.saturating_mul(PAGE);
        if len > PAGE_DATA_MAX as u64 || !run.start.is_multiple_of(PAGE) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let memory = self.memory.get(&pid).ok_or(io::ErrorKind::NotFound)?;
        let mut data = vec![0; len as usize];
        memory.read_exact_at(&mut data, run.start)?;
        let space = Space::Process(pid);
        let (mut full, mut zero, mut kept) = (Vec::new(), Vec::new(), 0);
        for (index, start) in (run.start..run.end()).step_by(PAGE as usize).enumerate() {
            let at = index * PAGE as usize;
            let page = at..at + PAGE as usize;
            if data[page.clone()].iter().all(|&byte| byte == 0) {
                push(&mut zero, start);
                continue;
            }
            push(&mut full, start);
            data.copy_within(page, kept);
            kept += PAGE as usize;
        }
        data.truncate(kept);
        let mut records = Vec::new();
        if !full.is_empty() {
            records.push(Record::Pages { space, runs: full, data: data.into() });
        }
        if !zero.is_empty() {
            records.push(Record::Drop { space, runs: zero });
        }
        Ok(records)
    }
}

/// Why pages were not given.
enum NotGiven {
    /// They are not here any more.
    Lost(io::Error),
    /// Nobody takes them.
    Link(LinkError),
}

impl From<io::Error> for NotGiven {
    fn from(error: io::Error) -> Self {
        Self::Lost(error)
    }
}

fn push(runs: &mut Vec<Run>, start: u64) {
    match runs.last_mut() {
        Some(run) if run.end() == start => run.pages += 1,
        _ => runs.push(Run { start, pages: 1 }),
    }
}
