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
        data: &[u8],
        blank: impl Fn(u64) -> bool,
    ) -> Result<(), TrackError> {
        let mut full = Vec::new();
        let mut zero = Vec::new();
        let mut bytes = Vec::with_capacity(data.len());
        let mut pages = data.chunks_exact(PAGE as usize);
        for run in runs {
            for index in 0..run.pages {
                let page = pages.next().unwrap_or_default();
                let start = run.start + index * PAGE;
                if is_zero(page) && blank(start) {
                    push_page(&mut zero, start);
                } else {
                    push_page(&mut full, start);
                    bytes.extend_from_slice(page);
                }
            }
        }
        if !full.is_empty() {
            self.round.pages += bytes.len() as u64 / PAGE;
            self.send(Record::Pages { space, runs: full, data: bytes })?;
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
    page.chunks_exact(64).all(|line| line == [0; 64])
}

fn push_page(runs: &mut Vec<Run>, start: u64) {
    match runs.last_mut() {
        Some(run) if run.end() == start => run.pages += 1,
        _ => runs.push(Run { start, pages: 1 }),
    }
}
