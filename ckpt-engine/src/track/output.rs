//! From pages to records.

use ckpt_format::{
    memory::{PAGE, Run, Space},
    stream::Record,
};

use super::{Round, Sink, SinkClosed, TrackError};

/// Collects pages into records of a bounded size.
pub(super) struct Output<'a, S: Sink> {
    pub(super) sink: &'a mut S,
    pub(super) round: &'a mut Round,
}

impl<S: Sink> Output<'_, S> {
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
            self.send(Record::Pages { space, runs: full, data: data.into() })?;
        }
        self.drop_runs(space, zero)
    }

    /// Says that these pages hold nothing any more.
    pub(super) fn drop_runs(&mut self, space: Space, runs: Vec<Run>) -> Result<(), TrackError> {
        if runs.is_empty() {
            return Ok(());
        }
        self.round.dropped += runs.iter().map(|run| run.pages).sum::<u64>();
        self.send(Record::Drop { space, runs })
    }

    pub(super) fn send(&mut self, record: Record) -> Result<(), TrackError> {
        self.sink.record(record).map_err(|SinkClosed| TrackError::Sink)
    }
}

fn is_zero(page: &[u8]) -> bool {
    let (lines, rest) = page.as_chunks::<64>();
    lines.iter().all(|line| line.iter().fold(0, |all, byte| all | byte) == 0)
        && rest.iter().all(|&byte| byte == 0)
}

fn push_page(runs: &mut Vec<Run>, start: u64) {
    match runs.last_mut() {
        Some(run) if run.end() == start => run.pages += 1,
        _ => runs.push(Run { start, pages: 1 }),
    }
}
