//! openraft's view of the state: entries that are committed are applied, in order.

use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use futures_util::{Stream, StreamExt as _};
use openraft::storage::{EntryResponder, RaftStateMachine};
use openraft::{EntryPayload, OptionalSend, RaftSnapshotBuilder};
use tokio::sync::watch;

use super::disk::{Change, Writer, key};
use super::log_store::Kept;
use super::types::{LogId, Snapshot, SnapshotMeta, StoredMembership, TypeConfig, decode, encode};
use crate::core::Core;
use crate::core::State;

/// The replica of the state on this node.
#[derive(Debug)]
pub(crate) struct Machine {
    core: Core,
    applied: Option<LogId>,
    membership: StoredMembership,
    /// Shared with a builder, which may end long after it began.
    snapshot: Arc<Mutex<Kept>>,
    published: watch::Sender<Arc<State>>,
    writer: Writer,
}

impl std::fmt::Debug for Writer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Writer").finish_non_exhaustive()
    }
}

impl Machine {
    /// The state as the kept snapshot has it; the log brings it up to date.
    pub(super) fn open(
        snapshot: Kept,
        published: watch::Sender<Arc<State>>,
        writer: Writer,
    ) -> io::Result<Self> {
        let mut machine = Self {
            core: Core::default(),
            applied: None,
            membership: StoredMembership::default(),
            snapshot: Arc::default(),
            published,
            writer,
        };
        if let Some((meta, text)) = snapshot {
            machine.take(meta, text)?;
        }
        Ok(machine)
    }

    fn take(&mut self, meta: SnapshotMeta, text: String) -> io::Result<()> {
        self.core = decode(text.as_bytes())?;
        self.applied = meta.last_log_id;
        self.membership = meta.last_membership.clone();
        replace(&self.snapshot, meta, text);
        self.published.send_replace(self.core.state.clone());
        Ok(())
    }
}

/// Puts a snapshot on the disk.
async fn keep(writer: &Writer, meta: &SnapshotMeta, text: &str) -> io::Result<()> {
    let changes = vec![
        Change::Set(key::SNAPSHOT_META, encode(meta)),
        Change::Set(key::SNAPSHOT, encode(&text)),
    ];
    writer.write(changes).await
}

/// The newer of two snapshots stays.
fn replace(kept: &Mutex<Kept>, meta: SnapshotMeta, text: String) {
    let mut kept = kept.lock().unwrap_or_else(PoisonError::into_inner);
    if kept.as_ref().is_none_or(|(old, _)| old.last_log_id <= meta.last_log_id) {
        *kept = Some((meta, text));
    }
}

impl RaftStateMachine<TypeConfig> for Machine {
    type SnapshotData = String;
    type SnapshotBuilder = Builder;

    async fn applied_state(&mut self) -> io::Result<(Option<LogId>, StoredMembership)> {
        Ok((self.applied, self.membership.clone()))
    }

    async fn apply<S>(&mut self, mut entries: S) -> io::Result<()>
    where
        S: Stream<Item = io::Result<EntryResponder<TypeConfig>>> + Unpin + OptionalSend,
    {
        let mut answers = Vec::new();
        while let Some(item) = entries.next().await {
            let (entry, responder) = item?;
            let answer = match entry.payload {
                EntryPayload::Blank => None,
                EntryPayload::Normal(request) => Some(self.core.apply(request)),
                EntryPayload::Membership(membership) => {
                    self.membership = StoredMembership::new(Some(entry.log_id), membership);
                    None
                }
            };
            self.applied = Some(entry.log_id);
            answers.extend(responder.map(|responder| (responder, answer)));
        }
        // Whoever hears an answer sees what it speaks of.
        self.published.send_replace(self.core.state.clone());
        for (responder, answer) in answers {
            responder.send(answer);
        }
        Ok(())
    }

    async fn get_snapshot_builder(&mut self) -> Builder {
        let last_log_id = self.applied;
        let meta = SnapshotMeta { last_log_id, last_membership: self.membership.clone() };
        Builder {
            meta,
            core: self.core.clone(),
            snapshot: self.snapshot.clone(),
            writer: self.writer.clone(),
        }
    }

    async fn install_snapshot(&mut self, meta: &SnapshotMeta, text: String) -> io::Result<()> {
        keep(&self.writer, meta, &text).await?;
        self.take(meta.clone(), text)
    }

    async fn get_current_snapshot(&mut self) -> io::Result<Option<Snapshot>> {
        let snapshot = self.snapshot.lock().unwrap_or_else(PoisonError::into_inner).clone();
        Ok(snapshot.map(|(meta, snapshot)| Snapshot { meta, snapshot }))
    }
}

/// Writes the state down while it moves on.
#[derive(Debug)]
pub(crate) struct Builder {
    meta: SnapshotMeta,
    core: Core,
    snapshot: Arc<Mutex<Kept>>,
    writer: Writer,
}

impl RaftSnapshotBuilder<TypeConfig> for Builder {
    type SnapshotData = String;

    async fn build_snapshot(&mut self) -> io::Result<Snapshot> {
        let text = String::from_utf8(encode(&self.core))
            .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
        keep(&self.writer, &self.meta, &text).await?;
        replace(&self.snapshot, self.meta.clone(), text.clone());
        Ok(Snapshot { meta: self.meta.clone(), snapshot: text })
    }
}
