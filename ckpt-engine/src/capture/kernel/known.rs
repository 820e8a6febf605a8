//! What processes have said about words that only the kernel understands.

use std::{
    collections::{HashMap, HashSet},
    io,
};

use ckpt_format::{
    controls::{ProcessControls, ThreadControls},
    process::{Process, Thread},
    seccomp::Filter,
};

use super::{
    fields::{Field, Fields},
    program::Copier,
    read::Record,
};
use crate::{
    capture::seccomp::Filters,
    container::BASELINE_FILTERS,
    sys::task::{self, Switch},
};

/// What is in the flags of an address space.
#[derive(Clone, Copy, Debug)]
pub(super) struct MemoryAnswers {
    pub(super) dumpable: u32,
    pub(super) coredump_filter: u32,
    pub(super) controls: ProcessControls,
}

/// A thread by its number on the host and its birth.
type Holder = (i32, u64);

/// Answers by the words that they come from.
#[derive(Debug, Default)]
pub(super) struct Known {
    /// The flags of a thread that it can set itself; all others come and go.
    switches: u64,
    memory: HashMap<u64, MemoryAnswers>,
    barriers: HashMap<u32, u32>,
    controls: HashMap<[u64; 4], ThreadControls>,
    /// By the address of the newest one.
    filters: HashMap<u64, Vec<Filter>>,
    /// Who has had which filter ever since it was learned. As long as one of them has it, it is at
    /// its address and nothing else is.
    holders: HashMap<Holder, u64>,
}

/// What a process has decided about failures of memory (`PF_MCE_PROCESS`, `PF_MCE_EARLY`).
const MACHINE_CHECK: u64 = 0x0800_0080;

impl Known {
    pub(super) fn new(fields: &Fields, copier: &Copier) -> io::Result<Self> {
        Ok(Self { switches: switches(fields, copier)?, ..Self::default() })
    }

    /// Forgets filters that nobody has kept since they were learned; notes who has them now.
    pub(super) fn settle<'a>(&mut self, records: impl Iterator<Item = Record<'a>>) {
        let held: Vec<(Holder, u64)> =
            records.map(|record| (holder(&record), record.number(Field::Filter))).collect();
        let kept = held.iter().filter(|(holder, filter)| self.holders.get(holder) == Some(filter));
        let kept: HashSet<u64> = kept.map(|(_, filter)| *filter).collect();
        self.filters.retain(|filter, _| kept.contains(filter));
        self.holders = held.into_iter().filter(|(_, filter)| kept.contains(filter)).collect();
    }

    /// Whether something about the thread must be asked.
    pub(super) fn lacks(&self, record: &Record<'_>) -> bool {
        let dead = record.number(Field::MemoryPointer) == 0;
        !dead
            && (self.memory(record).is_none()
                || self.barriers(record).is_none()
                || self.controls(record).is_none()
                || (has_filters(record)
                    && !self.filters.contains_key(&record.number(Field::Filter))))
    }

    /// Keeps what a process has said, with the records from the moment when it did.
    pub(super) fn keep(&mut self, asked: &Process, seen: &[Record<'_>], filters: &[Filter]) {
        if let Some(leader) = seen.first() {
            let answers = MemoryAnswers {
                dumpable: asked.dumpable,
                coredump_filter: asked.coredump_filter,
                controls: ProcessControls { lock_future: 0, ..asked.controls },
            };
            self.memory.insert(leader.number(Field::MemoryFlags), answers);
            self.barriers.insert(leader.word(Field::Barriers), asked.membarrier);
        }
        for (thread, record) in asked.threads.iter().zip(seen) {
            if thread.controls.dispatch.is_none() {
                self.controls.insert(self.key(record), thread.controls);
            }
            let own = thread.filters.iter().filter_map(|place| filters.get(*place as usize));
            let filter = record.number(Field::Filter);
            self.filters.insert(filter, own.cloned().collect());
            self.holders.insert(holder(record), filter);
        }
    }

    pub(super) fn memory(&self, record: &Record<'_>) -> Option<MemoryAnswers> {
        self.memory.get(&record.number(Field::MemoryFlags)).copied()
    }

    pub(super) fn barriers(&self, record: &Record<'_>) -> Option<u32> {
        self.barriers.get(&record.word(Field::Barriers)).copied()
    }

    pub(super) fn controls(&self, record: &Record<'_>) -> Option<ThreadControls> {
        self.controls.get(&self.key(record)).copied()
    }

    /// The places of a thread's own filters among all.
    pub(super) fn filters(&self, record: &Record<'_>, all: &mut Filters) -> Option<Vec<u32>> {
        if !has_filters(record) {
            return Some(Vec::new());
        }
        let filters = self.filters.get(&record.number(Field::Filter))?;
        Some(filters.iter().map(|filter| all.place(filter.clone())).collect())
    }

    fn key(&self, record: &Record<'_>) -> [u64; 4] {
        [
            record.number(Field::AtomicFlags),
            record.number(Field::ThreadFlags) & self.switches,
            record.number(Field::Flags) & MACHINE_CHECK,
            record.number(Field::CallWork),
        ]
    }
}

fn has_filters(record: &Record<'_>) -> bool {
    u64::from(record.word(Field::FilterCount)) > BASELINE_FILTERS
}

fn holder(record: &Record<'_>) -> Holder {
    (record.thread(), record.number(Field::Birth))
}

/// Finds out by which bits of a thread's flags the kernel remembers what the thread has switched
/// off: a thread of our own does so and looks at itself.
fn switches(fields: &Fields, copier: &Copier) -> io::Result<u64> {
    let at = fields.place(Field::ThreadFlags).at as usize;
    let flags = || -> io::Result<u64> {
        let bytes = copier.copy_of(task::own_number(), 0)?;
        let word = bytes.get(at..at + 8).and_then(|bytes| bytes.try_into().ok());
        word.map(u64::from_le_bytes).ok_or_else(|| io::ErrorKind::NotFound.into())
    };
    let look = || {
        Switch::ALL.into_iter().try_fold(0, |found, switch| {
            let before = flags()?;
            // What this processor cannot switch off nobody has switched off.
            let Ok(off) = switch.off(flags) else { return Ok(found) };
            let after = flags()?;
            let off = off?;
            Ok::<u64, io::Error>(found | ((before ^ off) & (off ^ after)))
        })
    };
    std::thread::scope(|scope| {
        // Other bits come and go by themselves, but hardly twice in the same way.
        let looking = scope.spawn(|| Ok(look()? & look()?));
        looking.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

/// Whether two ways to look at a process have told the same, but for what passes with time and what
/// our own stop has changed.
pub(super) fn agree(asked: &Process, told: &Process) -> bool {
    comparable(asked) == comparable(told)
}

/// The first thing that is not the same, for people.
pub(super) fn difference(asked: &Process, told: &Process) -> String {
    let (asked, told) = (format!("{:#?}", comparable(asked)), format!("{:#?}", comparable(told)));
    let lines = asked.lines().zip(told.lines());
    let differs = lines.into_iter().find(|(asked, told)| asked != told);
    differs.map_or_else(String::new, |(asked, told)| format!("{} {}", asked.trim(), told.trim()))
}

fn comparable(process: &Process) -> Process {
    let thread = |thread: &Thread| Thread {
        filters: Vec::new(),
        // Held back by our stop.
        signal_mask: 0,
        pending: Vec::new(),
        ..thread.clone()
    };
    Process {
        threads: process.threads.iter().map(thread).collect(),
        interval_timers: Default::default(),
        posix_timers: Vec::new(),
        pending: Vec::new(),
        semaphore_undo: Vec::new(),
        timers_read_at_ns: 0,
        stopped: None,
        ..process.clone()
    }
}
