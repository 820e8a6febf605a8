//! From plain threads that read a VE to the bulk stream that carries it away.

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};

use bytes::Bytes;
use ckpt_engine::track::{Sink, SinkClosed};
use ckpt_format::{codec, stream::Record};
use tokio::sync::mpsc;
use transport::{BulkSender, LinkError};

use super::messages::{Item, STATE_PIECE, State};

/// Encoded pieces that may wait.
const QUEUE: usize = 8;

/// The writing end. Blocks when the link is slower than the reading of the VE.
#[derive(Clone, Debug)]
pub(super) struct Pipe {
    queue: mpsc::Sender<Bytes>,
    bytes: Arc<AtomicU64>,
}

impl Pipe {
    /// Starts the task that empties the pipe into `bulk`. It ends with the pipe.
    pub(super) fn start(
        mut bulk: BulkSender,
    ) -> (Self, tokio::task::JoinHandle<Result<(), LinkError>>) {
        let (queue, mut receiver) = mpsc::channel::<Bytes>(QUEUE);
        let pump = tokio::spawn(async move {
            while let Some(bytes) = receiver.recv().await {
                bulk.send(bytes).await?;
            }
            bulk.finish().await
        });
        (Self { queue, bytes: Arc::default() }, pump)
    }

    /// Bytes written so far.
    pub(super) fn bytes(&self) -> u64 {
        self.bytes.load(Ordering::Relaxed)
    }

    /// True once nothing more can be written, because the stream broke.
    pub(super) fn is_broken(&self) -> bool {
        self.queue.is_closed()
    }

    /// Writes one piece. Must not be called on a thread that runs async tasks.
    pub(super) fn item(&self, item: &Item) -> Result<(), SinkClosed> {
        let bytes = codec::encode(item);
        self.bytes.fetch_add(bytes.len() as u64, Ordering::Relaxed);
        self.queue.blocking_send(bytes.into()).map_err(|_| SinkClosed)
    }

    /// Writes the state in pieces.
    pub(super) fn state(&self, state: &State) -> Result<(), SinkClosed> {
        let bytes = codec::encode(state);
        let mut pieces = bytes.chunks(STATE_PIECE).peekable();
        while let Some(piece) = pieces.next() {
            let last = pieces.peek().is_none();
            self.item(&Item::State { bytes: piece.to_vec(), last })?;
        }
        Ok(())
    }
}

impl Sink for Pipe {
    fn record(&mut self, record: Record) -> Result<(), SinkClosed> {
        self.item(&Item::Memory(record))
    }
}
