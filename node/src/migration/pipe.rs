//! From plain threads that read a VE to what carries it away: the bulk stream to another node, or
//! a checkpoint file.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use bytes::Bytes;
use ckpt_engine::track::{Sink, SinkClosed};
use ckpt_format::{codec, stream::Record};
use tokio::sync::mpsc;
use transport::{BulkSender, LinkError};

use super::{
    checkpoint::Outlet,
    limiter::Pace,
    messages::{Item, STATE_PIECE, State},
    packing,
    squeeze::Squeeze,
};

/// Encoded pieces that may wait.
const QUEUE: usize = 8;

/// The writing end. Blocks when what takes the data is slower than the reading of the VE.
#[derive(Clone, Debug)]
pub(super) struct Pipe {
    way: Way,
    bytes: Arc<AtomicU64>,
    /// None for a file.
    pace: Option<Pace>,
    squeeze: Arc<Squeeze>,
}

/// Where the data goes.
#[derive(Clone, Debug)]
enum Way {
    Link(mpsc::Sender<[Bytes; 2]>),
    File(Outlet),
}

impl Pipe {
    /// Starts the task that empties the pipe into `bulk`. It ends with the pipe.
    pub(super) fn start(
        mut bulk: BulkSender,
        pace: Pace,
    ) -> (Self, tokio::task::JoinHandle<Result<(), LinkError>>) {
        let (queue, mut receiver) = mpsc::channel::<[Bytes; 2]>(QUEUE);
        let limits = pace.clone();
        let squeeze = Arc::<Squeeze>::default();
        let scale = squeeze.clone();
        let pump = tokio::spawn(async move {
            while let Some(parts) = receiver.recv().await {
                let (start, len) = (Instant::now(), parts[0].len() + parts[1].len());
                limits.pass(len).await;
                bulk.send_joined(parts).await?;
                scale.sent(len, start.elapsed());
            }
            bulk.finish().await
        });
        (Self { way: Way::Link(queue), bytes: Arc::default(), pace: Some(pace), squeeze }, pump)
    }

    /// Into a checkpoint file.
    pub(super) fn to_file(outlet: Outlet) -> Self {
        Self { way: Way::File(outlet), bytes: Arc::default(), pace: None, squeeze: Arc::default() }
    }

    /// Bytes written so far.
    pub(super) fn bytes(&self) -> u64 {
        self.bytes.load(Ordering::Relaxed)
    }

    /// Whether limits of the bandwidth do not count now.
    pub(super) fn lift_limit(&self, lifted: bool) {
        if let Some(pace) = &self.pace {
            pace.lift(lifted);
        }
    }

    /// How long such limits have held the data back so far.
    pub(super) fn waited(&self) -> Duration {
        self.pace.as_ref().map_or(Duration::ZERO, Pace::waited)
    }

    /// True once nothing more can be written, because the stream broke.
    pub(super) fn is_broken(&self) -> bool {
        match &self.way {
            Way::Link(queue) => queue.is_closed(),
            Way::File(outlet) => outlet.is_broken(),
        }
    }

    /// Writes one piece. Must not be called on a thread that runs async tasks.
    pub(super) fn item(&self, item: Item) -> Result<(), SinkClosed> {
        match &self.way {
            Way::Link(queue) => {
                let parts = packing::pack(item, &self.squeeze);
                let bytes = parts[0].len() + parts[1].len();
                self.bytes.fetch_add(bytes as u64, Ordering::Relaxed);
                queue.blocking_send(parts).map_err(|_| SinkClosed)
            }
            Way::File(outlet) => outlet.item(&item).map_err(|()| SinkClosed),
        }
    }

    /// Writes the state.
    pub(super) fn state(&self, state: &State) -> Result<(), SinkClosed> {
        match &self.way {
            Way::Link(_) => in_pieces(state, |item| self.item(item)),
            Way::File(outlet) => outlet.state(state).map_err(|()| SinkClosed),
        }
    }
}

/// The state in pieces that fit a stream.
pub(super) fn in_pieces<E>(
    state: &State,
    mut take: impl FnMut(Item) -> Result<(), E>,
) -> Result<(), E> {
    let mut rest = Bytes::from(codec::encode(state));
    loop {
        let bytes = rest.split_to(rest.len().min(STATE_PIECE));
        let last = rest.is_empty();
        take(Item::State { bytes, last })?;
        if last {
            return Ok(());
        }
    }
}

impl Sink for Pipe {
    fn record(&mut self, record: Record) -> Result<(), SinkClosed> {
        self.item(Item::Memory(record))
    }
}
