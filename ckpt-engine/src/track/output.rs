//! From pages to records.

use ckpt_format::{
    memory::{PAGE, Run, Space},
    stream::Record,
};

use super::{Round, Sink, SinkClosed, TrackError};

/// Collects pages into records of a bounded size: a record for each of a thousand pages that lie
/// apart would cost more than the pages.
pub(super) struct Output<'a, S: Sink> {
    sink: &'a mut S,
    pub(super) round: &'a mut Round,
    /// Pages of one process that are still to be sent.
    waiting: Waiting,
}

/// A record of pages in the making.
#[derive(Default)]
struct Waiting {
    pid: i32,
    runs: Vec<Run>,
    data: Vec<u8>,
}

impl<'a, S: Sink> Output<'a, S> {
    /// Pieces that are larger travel alone.
    const SMALL: usize = 64 << 10;
    /// What waits is sent when it is as large as this.
    const ENOUGH: usize = 256 << 10;

    pub(super) fn new(sink: &'a mut S, round: &'a mut Round) -> Self {
        Self { sink, round, waiting: Waiting::default() }
    }

    /// Sends the contents of pages. Pages of zeros are sorted out where nothing is the same as
    /// zeros, which `blank` tells of an address: not where a file would show through.
    pub(super) fn pages(
        &mut self,
        space: Space,
        runs: &[Run],
        mut data: Vec<u8>,
        blank: impl Fn(u64) -> bool,
    ) -> Result<(), TrackError> {
        let mut full = Vec::new();
        let mut zero = Vec::new();
        let (mut at, mut kept) = (0, 0);
        for start in runs.iter().flat_map(|run| (run.start..run.end()).step_by(PAGE as usize)) {
            let page = at..(at + PAGE as usize).min(data.len());
            at = page.end;
            if is_zero(&data[page.clone()]) && blank(start) {
                push_page(&mut zero, start);
                continue;
            }
            push_page(&mut full, start);
            // Nearly always they lie where they were read.
            if page.start != kept {
                data.copy_within(page.clone(), kept);
            }
            kept += page.len();
        }
        data.truncate(kept);
        if !full.is_empty() {
            self.round.pages += data.len() as u64 / PAGE;
            match space {
                Space::Process(pid) if data.len() < Self::SMALL => self.wait(pid, full, &data)?,
                _ => self.send(Record::Pages { space, runs: full, data: data.into() })?,
            }
        }
        self.drop_runs(space, zero)
    }

    fn wait(&mut self, pid: i32, runs: Vec<Run>, data: &[u8]) -> Result<(), TrackError> {
        if self.waiting.pid != pid {
            self.flush()?;
            self.waiting.pid = pid;
        }
        self.waiting.runs.extend(runs);
        self.waiting.data.extend_from_slice(data);
        if self.waiting.data.len() >= Self::ENOUGH { self.flush() } else { Ok(()) }
    }

    /// Sends what waits. To be called at the end, also when something has failed: what was handed
    /// in counts as sent.
    pub(super) fn flush(&mut self) -> Result<(), TrackError> {
        let Waiting { pid, runs, data } = std::mem::take(&mut self.waiting);
        if runs.is_empty() {
            return Ok(());
        }
        self.record(Record::Pages { space: Space::Process(pid), runs, data: data.into() })
    }

    /// Says that these pages hold nothing any more.
    pub(super) fn drop_runs(&mut self, space: Space, runs: Vec<Run>) -> Result<(), TrackError> {
        if runs.is_empty() {
            return Ok(());
        }
        self.round.dropped += runs.iter().map(|run| run.pages).sum::<u64>();
        self.send(Record::Drop { space, runs })
    }

    /// Sends a record after all that was handed in before it.
    pub(super) fn send(&mut self, record: Record) -> Result<(), TrackError> {
        self.flush()?;
        self.record(record)
    }

    fn record(&mut self, record: Record) -> Result<(), TrackError> {
        self.sink.record(record).map_err(|SinkClosed| TrackError::Sink)
    }
}

fn is_zero(page: &[u8]) -> bool {
    let (lines, rest) = page.as_chunks::<64>();
    lines.iter().all(|line| line.iter().fold(0, |all, byte| all | byte) == 0)
        && rest.iter().all(|&byte| byte == 0)
}

pub(super) fn push_page(runs: &mut Vec<Run>, start: u64) {
    match runs.last_mut() {
        Some(run) if run.end() == start => run.pages += 1,
        _ => runs.push(Run { start, pages: 1 }),
    }
}
