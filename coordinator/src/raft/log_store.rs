//! openraft's view of the log: a mirror in memory for reading, the disk for keeping.

use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::ops::RangeBounds;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use openraft::OptionalSend;
use openraft::entry::RaftEntry as _;
use openraft::storage::{IOFlushed, LogState, RaftLogReader, RaftLogStorage};
use serde::de::DeserializeOwned;
use tokio::sync::oneshot;

use super::disk::{self, Change, StoreError, Writer, key};
use super::types::{Entry, LogId, SnapshotMeta, TypeConfig, Vote, decode, encode};

/// The log. Short: entries behind a snapshot are purged.
#[derive(Clone)]
pub(crate) struct LogStore {
    mirror: Arc<Mutex<Mirror>>,
    pub(super) writer: Writer,
}

impl fmt::Debug for LogStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LogStore").finish_non_exhaustive()
    }
}

#[derive(Debug, Default)]
struct Mirror {
    entries: BTreeMap<u64, Entry>,
    vote: Option<Vote>,
    committed: Option<LogId>,
    purged: Option<LogId>,
}

/// A snapshot as it was kept.
pub(super) type Kept = Option<(SnapshotMeta, String)>;

/// What opening gives.
pub(super) struct OpenedLog {
    pub(super) log: LogStore,
    pub(super) snapshot: Kept,
    pub(super) closed: oneshot::Receiver<()>,
}

impl LogStore {
    /// Opens or makes the log at `path`.
    pub(super) fn open(path: &Path) -> Result<OpenedLog, StoreError> {
        let opened = disk::open(path)?;
        let (mirror, snapshot) = read(&opened.held)
            .map_err(|source| StoreError::Damaged { path: path.into(), source })?;
        let log = Self { mirror: Arc::new(Mutex::new(mirror)), writer: opened.writer };
        Ok(OpenedLog { log, snapshot, closed: opened.closed })
    }

    fn mirror(&self) -> MutexGuard<'_, Mirror> {
        self.mirror.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn read(held: &disk::Held) -> io::Result<(Mirror, Kept)> {
    fn value<T: DeserializeOwned>(held: &disk::Held, name: &str) -> io::Result<Option<T>> {
        held.values.get(name).map(|bytes| decode(bytes)).transpose()
    }
    let mut entries = BTreeMap::new();
    for (index, bytes) in &held.log {
        entries.insert(*index, decode(bytes)?);
    }
    let mirror = Mirror {
        entries,
        vote: value(held, key::VOTE)?,
        committed: value::<Option<LogId>>(held, key::COMMITTED)?.flatten(),
        purged: value(held, key::PURGED)?,
    };
    let snapshot = value(held, key::SNAPSHOT_META)?.zip(value(held, key::SNAPSHOT)?);
    Ok((mirror, snapshot))
}

impl RaftLogReader<TypeConfig> for LogStore {
    async fn try_get_log_entries<RB>(&mut self, range: RB) -> io::Result<Vec<Entry>>
    where
        RB: RangeBounds<u64> + Clone + fmt::Debug + OptionalSend,
    {
        Ok(self.mirror().entries.range(range).map(|(_, entry)| entry.clone()).collect())
    }

    async fn read_vote(&mut self) -> io::Result<Option<Vote>> {
        Ok(self.mirror().vote)
    }
}

impl RaftLogStorage<TypeConfig> for LogStore {
    type LogReader = Self;

    async fn get_log_state(&mut self) -> io::Result<LogState<TypeConfig>> {
        let mirror = self.mirror();
        let last = mirror.entries.values().next_back().map(|entry| entry.log_id());
        Ok(LogState { last_purged_log_id: mirror.purged, last_log_id: last.or(mirror.purged) })
    }

    async fn get_log_reader(&mut self) -> Self {
        self.clone()
    }

    async fn save_vote(&mut self, vote: &Vote) -> io::Result<()> {
        self.writer.write(vec![Change::Set(key::VOTE, encode(vote))]).await?;
        self.mirror().vote = Some(*vote);
        Ok(())
    }

    async fn save_committed(&mut self, committed: Option<LogId>) -> io::Result<()> {
        // A hint for the next start, which may be old: not worth a flush of its own.
        self.writer.submit_lazily(vec![Change::Set(key::COMMITTED, encode(&committed))]);
        self.mirror().committed = committed;
        Ok(())
    }

    async fn read_committed(&mut self) -> io::Result<Option<LogId>> {
        Ok(self.mirror().committed)
    }

    async fn append<I>(&mut self, entries: I, callback: IOFlushed<TypeConfig>) -> io::Result<()>
    where
        I: IntoIterator<Item = Entry> + OptionalSend,
        I::IntoIter: OptionalSend,
    {
        let mut encoded = Vec::new();
        {
            let mut mirror = self.mirror();
            for entry in entries {
                encoded.push((entry.index(), encode(&entry)));
                mirror.entries.insert(entry.index(), entry);
            }
        }
        let done = Box::new(move |result| callback.io_completed(result));
        self.writer.submit(vec![Change::Put(encoded)], done);
        Ok(())
    }

    async fn truncate_after(&mut self, last: Option<LogId>) -> io::Result<()> {
        let first = last.map_or(0, |last| last.index + 1);
        self.mirror().entries.split_off(&first);
        self.writer.write(vec![Change::RemoveFrom(first)]).await
    }

    async fn purge(&mut self, last: LogId) -> io::Result<()> {
        {
            let mut mirror = self.mirror();
            mirror.entries = mirror.entries.split_off(&(last.index + 1));
            mirror.purged = Some(last);
        }
        let purged = Change::Set(key::PURGED, encode(&last));
        self.writer.write(vec![Change::RemoveUpTo(last.index), purged]).await
    }
}
