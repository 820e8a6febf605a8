//! From plain threads that read a VE to what carries it away: the bulk stream to another node, or
//! a checkpoint file.

use std::{
    sync::{
        Arc, Mutex, PoisonError,
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
    repeats::Once,
    squeeze::Squeeze,
};

/// Encoded pieces that may wait.
const QUEUE: usize = 4;

/// The writing end. Blocks when what takes the data is slower than the reading of the VE.
#[derive(Clone, Debug)]
pub(super) struct Pipe {
    way: Way,
    bytes: Arc<AtomicU64>,
    /// None for a file.
    pace: Option<Pace>,
    squeeze: Arc<Squeeze>,
    /// None where the other end does not know about pages that it has already, nor about what is told
    /// ahead of the state: a file, or a node of an older version.
    once: Option<Arc<Mutex<Once>>>,
    /// Whether the other end takes processes before the rest of the state.
    in_parts: bool,
}

/// From this version of the protocol on a target can be told that it has a page, and what it will
/// need.
const LOOKS_AHEAD: u16 = 2;
/// From this version on, processes can be told before the rest of the state.
pub(super) const IN_PARTS: u16 = 3;

/// Where the data goes.
#[derive(Clone, Debug)]
enum Way {
    Link(mpsc::Sender<[Bytes; 2]>),
    File(Outlet),
}

impl Pipe {
    /// Starts the task that empties the pipe into `bulk`. It ends with the pipe. `version` is that
    /// of the protocol that both ends speak.
    pub(super) fn start(
        mut bulk: BulkSender,
        pace: Pace,
        version: u16,
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
        let once = (version >= LOOKS_AHEAD).then(|| Arc::new(Mutex::new(Once::new())));
        let (way, bytes, in_parts) = (Way::Link(queue), Arc::default(), version >= IN_PARTS);
        (Self { way, bytes, pace: Some(pace), squeeze, once, in_parts }, pump)
    }

    /// Into a checkpoint file.
    pub(super) fn to_file(outlet: Outlet) -> Self {
        let (way, bytes, squeeze) = (Way::File(outlet), Arc::default(), Arc::default());
        Self { way, bytes, pace: None, squeeze, once: None, in_parts: false }
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
        // All of it is in the state once more.
        if self.once.is_none() && matches!(item, Item::Descriptors(_) | Item::Connections(_)) {
            return Ok(());
        }
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

    /// Whether the other end takes [`Self::processes`].
    pub(super) fn takes_processes(&self) -> bool {
        self.in_parts
    }

    /// Writes some of the processes of the state that follows, encoded as a list.
    pub(super) fn processes(&self, encoded: Vec<u8>) -> Result<(), SinkClosed> {
        in_pieces(encoded, |bytes, last| self.item(Item::Processes { bytes, last }))
    }

    /// Writes the state.
    pub(super) fn state(&self, state: &State) -> Result<(), SinkClosed> {
        match &self.way {
            Way::Link(_) => in_pieces(codec::encode(state), |bytes, last| {
                self.item(Item::State { bytes, last })
            }),
            Way::File(outlet) => outlet.state(state).map_err(|()| SinkClosed),
        }
    }
}

/// Something encoded in pieces that fit a stream, each with whether it is the last.
pub(super) fn in_pieces<E>(
    encoded: Vec<u8>,
    mut take: impl FnMut(Bytes, bool) -> Result<(), E>,
) -> Result<(), E> {
    let mut rest = Bytes::from(encoded);
    loop {
        let bytes = rest.split_to(rest.len().min(STATE_PIECE));
        let last = rest.is_empty();
        take(bytes, last)?;
        if last {
            return Ok(());
        }
    }
}

impl Sink for Pipe {
    fn record(&mut self, record: Record) -> Result<(), SinkClosed> {
        let Some(once) = &self.once else { return self.item(Item::Memory(record)) };
        // Held until all is on its way: the target must hear of everything in the same order.
        let mut once = once.lock().unwrap_or_else(PoisonError::into_inner);
        let records = once.shorten(record, self.squeeze.link());
        records.into_iter().try_for_each(|record| self.item(Item::Memory(record)))
    }
}

#[cfg(test)]
mod tests {
    use ckpt_format::{
        memory::{Advice, Area, Backing, PAGE, Run, Space},
        process::{Layout, Shape},
    };
    use transport::Link;

    use super::*;
    use crate::migration::limiter::Limiter;

    /// A process that has the same page twice.
    fn records() -> Vec<Record> {
        let area = Area {
            start: PAGE,
            end: 9 * PAGE,
            protection: 3,
            shared: false,
            grows_down: false,
            may_write: true,
            offset: 0,
            backing: Backing::Anonymous { name: None },
            advice: Advice::default(),
        };
        let shape = Shape { pid: 1, life: 1, ..Shape::default() };
        let page = |at: u64| Record::Pages {
            space: Space::Process(1),
            runs: vec![Run { start: at * PAGE, pages: 1 }],
            data: vec![7; PAGE as usize].into(),
        };
        vec![
            Record::Layout(Layout { processes: vec![shape], shared: Vec::new() }),
            Record::Areas { pid: 1, areas: vec![area], complete: true },
            page(2),
            page(4),
        ]
    }

    /// Whether a node of this version is told that it has the second, and what it will need.
    async fn is_told(version: u16) -> (bool, bool) {
        let (source, target) = Link::pair();
        let pace = Pace::new(None, Arc::new(Limiter::new(None)));
        let (pipe, pump) = Pipe::start(source.bulk.open().await.unwrap(), pace, version);
        let mut sink = pipe;
        let sending = tokio::task::spawn_blocking(move || {
            let ahead = sink.item(Item::Descriptors(100));
            ahead.and_then(|()| records().into_iter().try_for_each(|it| sink.record(it))).is_ok()
        });
        let mut stream = target.bulk.accept().await.unwrap();
        let mut items = Vec::new();
        while let Some(frame) = stream.recv().await.unwrap() {
            items.push(packing::unpack(frame).unwrap());
        }
        assert!(sending.await.unwrap());
        pump.await.unwrap().unwrap();
        let ahead = matches!(items.first(), Some(Item::Descriptors(100)));
        match items.last() {
            Some(Item::Memory(Record::Same { .. })) => (true, ahead),
            Some(Item::Memory(Record::Pages { .. })) => (false, ahead),
            other => panic!("{other:?}"),
        }
    }

    #[tokio::test]
    async fn only_a_node_that_knows_about_it_is_told_what_it_has_and_will_need() {
        assert_eq!(is_told(LOOKS_AHEAD).await, (true, true));
        assert_eq!(is_told(LOOKS_AHEAD - 1).await, (false, false));
    }
}
