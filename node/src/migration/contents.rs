//! Files and memory of a VE that stands still.
//!
//! The target hears of files first, because it maps them. Where looking at them takes long, memory is
//! read meanwhile, and what is read waits for the files to be on their way.

use std::{
    sync::OnceLock,
    thread,
    time::{Duration, Instant},
};

use ckpt_engine::track::{Sink, SinkClosed, TrackError, Tracker};
use ckpt_format::stream::Record;

use super::{
    blackout::CopyError, messages::Item, pipe::Pipe, postcopy::later::Memory, stopwatch::Stopwatch,
};
use crate::storage::{self, FileTracker, MappedFiles};

/// A look at the files that takes less than this is not worth a thread.
const WORTH: Duration = Duration::from_millis(5);
/// So much may wait, in bytes.
const WAITING_MAX: usize = 16 << 20;
/// What a record without pages counts as.
const RECORD: usize = 256;

/// Sends what has changed of the files.
pub(super) fn send_files(
    files: &mut FileTracker,
    mapped: &MappedFiles,
    last: bool,
    pipe: &Pipe,
) -> Result<(), CopyError> {
    let mut sink = |record| pipe.item(Item::File(record)).map_err(|_| storage::SinkClosed);
    files.round(mapped, last, &mut sink)?;
    Ok(())
}

/// Sends both. `took` is how long the last look at the files took.
pub(super) fn send(
    (files, mapped): (&mut FileTracker, &MappedFiles),
    tracker: &mut Tracker,
    memory: Memory,
    took: Duration,
    pipe: &Pipe,
) -> Result<(), CopyError> {
    let mut send_files = || {
        let _watch = Stopwatch::beside("files");
        send_files(files, mapped, true, pipe)
    };
    if took < WORTH {
        send_files()?;
        let _watch = Stopwatch::beside("memory");
        return Ok(read_memory(tracker, memory, &mut pipe.clone())?);
    }
    let gate = Gate::default();
    thread::scope(|scope| {
        let sending = scope.spawn(|| {
            let leaf = Leaf(&gate);
            let sent = send_files();
            leaf.turn(sent.is_ok());
            sent
        });
        let start = Instant::now();
        let mut behind = Behind { gate: &gate, pipe: pipe.clone(), waiting: Vec::new(), bytes: 0 };
        let read = read_memory(tracker, memory, &mut behind);
        Stopwatch::was_beside("memory", start.elapsed());
        let passed = behind.pass();
        sending.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
        read?;
        passed.map_err(|SinkClosed| CopyError::Link)
    })
}

fn read_memory(
    tracker: &mut Tracker,
    memory: Memory,
    sink: &mut impl Sink,
) -> Result<(), TrackError> {
    match memory {
        Memory::Whole => tracker.last_round(sink)?,
        Memory::Later => tracker.last_round_without_memory(sink)?,
    };
    Ok(())
}

/// Lets what waits through when something else is on its way, or tells that it never will be.
#[derive(Debug, Default)]
struct Gate(OnceLock<bool>);

/// Opens a gate, or shuts it for good when it is dropped.
struct Leaf<'a>(&'a Gate);

impl Leaf<'_> {
    fn turn(self, open: bool) {
        // Whoever drops a leaf has turned it: nobody else has set it.
        let _ = self.0.0.set(open);
    }
}

impl Drop for Leaf<'_> {
    fn drop(&mut self) {
        let _ = self.0.0.set(false);
    }
}

/// Holds records back until a gate is open.
struct Behind<'a, S> {
    gate: &'a Gate,
    pipe: S,
    waiting: Vec<Record>,
    bytes: usize,
}

impl<S: Sink> Behind<'_, S> {
    /// Waits for the gate, and lets all through.
    fn pass(&mut self) -> Result<(), SinkClosed> {
        if !self.gate.0.wait() {
            return Err(SinkClosed);
        }
        self.bytes = 0;
        self.waiting.drain(..).try_for_each(|record| self.pipe.record(record))
    }
}

impl<S: Sink> Sink for Behind<'_, S> {
    fn record(&mut self, record: Record) -> Result<(), SinkClosed> {
        let bytes = match &record {
            Record::Pages { data, .. } => RECORD + data.len(),
            Record::Areas { areas, .. } => RECORD * (1 + areas.len()),
            _ => RECORD,
        };
        if self.gate.0.get().is_none() && self.bytes + bytes <= WAITING_MAX {
            self.bytes += bytes;
            self.waiting.push(record);
            return Ok(());
        }
        self.pass()?;
        self.pipe.record(record)
    }
}

#[cfg(test)]
mod tests {
    use ckpt_format::{
        memory::{PAGE, Run, Space},
        process::Layout,
    };

    use super::*;

    /// Takes down the first page of what it is given.
    #[derive(Default)]
    struct Seen(Vec<u64>);

    impl Sink for Seen {
        fn record(&mut self, record: Record) -> Result<(), SinkClosed> {
            let Record::Pages { runs, .. } = record else { return Err(SinkClosed) };
            self.0.push(runs[0].start / PAGE);
            Ok(())
        }
    }

    fn page(at: u64, bytes: usize) -> Record {
        let runs = vec![Run { start: at * PAGE, pages: 1 }];
        Record::Pages { space: Space::Process(1), runs, data: vec![1; bytes].into() }
    }

    fn behind(gate: &Gate) -> Behind<'_, Seen> {
        Behind { gate, pipe: Seen::default(), waiting: Vec::new(), bytes: 0 }
    }

    #[test]
    fn what_waits_comes_behind_the_files_and_in_its_order() {
        let gate = Gate::default();
        let mut behind = behind(&gate);
        for at in 1..4 {
            behind.record(page(at, 1000)).unwrap();
        }
        assert_eq!(behind.pipe.0, [0; 0]);
        Leaf(&gate).turn(true);
        behind.record(page(4, 1000)).unwrap();
        behind.pass().unwrap();
        assert_eq!(behind.pipe.0, [1, 2, 3, 4]);
    }

    #[test]
    fn not_more_waits_than_there_is_room_for() {
        let gate = Gate::default();
        let mut behind = behind(&gate);
        for at in 0..15 {
            behind.record(page(at, 1 << 20)).unwrap();
        }
        assert!(behind.waiting.len() == 15 && behind.bytes <= WAITING_MAX);
        thread::scope(|scope| {
            let reading = scope.spawn(|| {
                behind.record(page(15, 2 << 20)).unwrap();
                behind
            });
            // Only when the gate opens is there room for it.
            Leaf(&gate).turn(true);
            let behind = reading.join().unwrap();
            assert_eq!(behind.pipe.0, (0..16).collect::<Vec<_>>());
            assert_eq!(behind.bytes, 0);
        });
    }

    #[test]
    fn files_that_could_not_be_sent_let_nothing_through() {
        let gate = Gate::default();
        let mut behind = behind(&gate);
        behind.record(page(1, 1000)).unwrap();
        drop(Leaf(&gate));
        assert!(behind.pass().is_err());
        assert!(behind.record(Record::Layout(Layout::default())).is_err());
        assert_eq!(behind.pipe.0, [0; 0]);
    }
}
