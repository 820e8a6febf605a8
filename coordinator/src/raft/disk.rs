//! The log on the disk. One thread writes; whatever waits while it writes shares the next
//! transaction, so that a burst of entries costs one flush.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::mpsc;

use redb::{Database, ReadableDatabase, ReadableTable, TableDefinition};
use tokio::sync::oneshot;

/// Entries by index.
const LOG: TableDefinition<'_, u64, &[u8]> = TableDefinition::new("log");
/// Everything of which there is one.
const META: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("meta");
/// The layout of the store; another one is refused.
const FORMAT: &[u8] = b"1";
/// The log is read once and then only written: a small cache will do. In bytes.
const CACHE: usize = 1 << 20;
/// Operations that may share a transaction.
const BATCH_MAX: usize = 256;

/// Names of the single values.
pub(super) mod key {
    pub(in super::super) const FORMAT: &str = "format";
    pub(in super::super) const VOTE: &str = "vote";
    pub(in super::super) const COMMITTED: &str = "committed";
    pub(in super::super) const PURGED: &str = "purged";
    pub(in super::super) const SNAPSHOT_META: &str = "snapshot-meta";
    pub(in super::super) const SNAPSHOT: &str = "snapshot";
}

/// Why a store cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The file cannot be opened as a store.
    #[error("cannot open {}", path.display())]
    Open {
        /// Which file.
        path: PathBuf,
        /// What the library said.
        source: redb::DatabaseError,
    },
    /// The file cannot be read or written.
    #[error("cannot use {}", path.display())]
    Access {
        /// Which file.
        path: PathBuf,
        /// What the library said.
        source: redb::Error,
    },
    /// The file was written by a build with another layout.
    #[error("{} has layout {found}, this build knows layout 1", path.display())]
    Layout {
        /// Which file.
        path: PathBuf,
        /// What it says.
        found: String,
    },
    /// What the file holds cannot be understood.
    #[error("{} is damaged", path.display())]
    Damaged {
        /// Which file.
        path: PathBuf,
        /// What is wrong.
        source: io::Error,
    },
}

/// A change of the store.
pub(super) enum Change {
    Put(Vec<(u64, Vec<u8>)>),
    /// Removes entries from this index on.
    RemoveFrom(u64),
    /// Removes entries up to this index, this one too.
    RemoveUpTo(u64),
    Set(&'static str, Vec<u8>),
}

type Done = Box<dyn FnOnce(io::Result<()>) + Send>;

struct Operation {
    changes: Vec<Change>,
    done: Option<Done>,
}

/// Where changes are handed in. The file is closed with the last handle.
#[derive(Clone)]
pub(super) struct Writer(mpsc::Sender<Operation>);

impl Writer {
    /// Makes the changes in one transaction; `done` is called once they would survive a power cut.
    pub(super) fn submit(&self, changes: Vec<Change>, done: Done) {
        let operation = Operation { changes, done: Some(done) };
        if let Err(mpsc::SendError(mut operation)) = self.0.send(operation)
            && let Some(done) = operation.done.take()
        {
            done(Err(stopped()));
        }
    }

    /// Makes the changes with whatever is written next; nobody needs to know when.
    pub(super) fn submit_lazily(&self, changes: Vec<Change>) {
        // A store that stopped has told those who wait for it.
        let _ = self.0.send(Operation { changes, done: None });
    }

    /// Makes the changes and waits until they would survive a power cut.
    pub(super) async fn write(&self, changes: Vec<Change>) -> io::Result<()> {
        let (sender, receiver) = oneshot::channel();
        self.submit(
            changes,
            Box::new(move |result| {
                let _ = sender.send(result);
            }),
        );
        receiver.await.unwrap_or_else(|_| Err(stopped()))
    }
}

fn stopped() -> io::Error {
    io::Error::new(io::ErrorKind::BrokenPipe, "the store of the log has stopped")
}

/// What the disk held when it was opened.
#[derive(Debug, Default)]
pub(super) struct Held {
    pub(super) log: Vec<(u64, Vec<u8>)>,
    pub(super) values: std::collections::BTreeMap<String, Vec<u8>>,
}

/// An open store.
pub(super) struct Opened {
    pub(super) held: Held,
    pub(super) writer: Writer,
    /// Resolves once the file is closed.
    pub(super) closed: oneshot::Receiver<()>,
}

/// Opens or makes the store at `path`.
pub(super) fn open(path: &Path) -> Result<Opened, StoreError> {
    let database = Database::builder()
        .set_cache_size(CACHE)
        .create(path)
        .map_err(|source| StoreError::Open { path: path.into(), source })?;
    let access = |source: redb::Error| StoreError::Access { path: path.into(), source };
    prepare(&database).map_err(access)?;
    let held = read_all(&database).map_err(access)?;
    match held.values.get(key::FORMAT).map(Vec::as_slice) {
        Some(FORMAT) => {}
        other => {
            let found = String::from_utf8_lossy(other.unwrap_or_default()).into_owned();
            return Err(StoreError::Layout { path: path.into(), found });
        }
    }
    let (sender, receiver) = mpsc::channel();
    let (closing, closed) = oneshot::channel();
    std::thread::Builder::new()
        .name("log-writer".into())
        .spawn(move || {
            run(&database, &receiver);
            drop(database);
            let _ = closing.send(());
        })
        .map_err(|source| access(redb::Error::Io(source)))?;
    Ok(Opened { held, writer: Writer(sender), closed })
}

fn prepare(database: &Database) -> Result<(), redb::Error> {
    let transaction = database.begin_write()?;
    transaction.open_table(LOG)?;
    {
        let mut meta = transaction.open_table(META)?;
        if meta.get(key::FORMAT)?.is_none() {
            meta.insert(key::FORMAT, FORMAT)?;
        }
    }
    transaction.commit()?;
    Ok(())
}

fn read_all(database: &Database) -> Result<Held, redb::Error> {
    let transaction = database.begin_read()?;
    let mut held = Held::default();
    for item in transaction.open_table(LOG)?.iter()? {
        let (index, bytes) = item?;
        held.log.push((index.value(), bytes.value().to_vec()));
    }
    for item in transaction.open_table(META)?.iter()? {
        let (name, bytes) = item?;
        held.values.insert(name.value().to_owned(), bytes.value().to_vec());
    }
    Ok(held)
}

fn run(database: &Database, operations: &mpsc::Receiver<Operation>) {
    let mut lazy = Vec::new();
    while let Ok(first) = operations.recv() {
        let mut batch = vec![first];
        while batch.len() < BATCH_MAX
            && let Ok(next) = operations.try_recv()
        {
            batch.push(next);
        }
        if batch.iter().all(|operation| operation.done.is_none()) {
            lazy.append(&mut batch);
            // What nobody waits for goes with the next thing somebody waits for.
            continue;
        }
        lazy.append(&mut batch);
        let result = commit(database, &lazy);
        for operation in lazy.drain(..) {
            if let Some(done) = operation.done {
                done(
                    result.as_ref().copied().map_err(|error| {
                        io::Error::other(format!("cannot write the log: {error}"))
                    }),
                );
            }
        }
    }
    if let Err(error) = commit(database, &lazy) {
        tracing::warn!(%error, "the last notes of the log are lost; they will be made again");
    }
}

fn commit(database: &Database, operations: &[Operation]) -> Result<(), redb::Error> {
    let transaction = database.begin_write()?;
    {
        let mut log = transaction.open_table(LOG)?;
        let mut meta = transaction.open_table(META)?;
        for change in operations.iter().flat_map(|operation| &operation.changes) {
            match change {
                Change::Put(entries) => {
                    for (index, bytes) in entries {
                        log.insert(index, bytes.as_slice())?;
                    }
                }
                Change::RemoveFrom(first) => log.retain_in(*first.., |_, _| false)?,
                Change::RemoveUpTo(last) => log.retain_in(..=*last, |_, _| false)?,
                Change::Set(name, bytes) => {
                    meta.insert(*name, bytes.as_slice())?;
                }
            }
        }
    }
    transaction.commit()?;
    Ok(())
}
