//! Data on its way in both directions between two ends in one process.

use std::io::{Read, Write};

use crate::workload::outcome::Failure;
use crate::workload::stream::Stream;

/// Two ends, each with unread data.
pub(super) struct BothWays<S> {
    pub(super) ends: [S; 2],
    out: [Stream; 2],
    back: [Stream; 2],
    /// A turn sends no more, in bytes.
    most: u64,
}

impl<S: Read + Write> BothWays<S> {
    /// So many bytes are always unread.
    pub(super) fn new(
        ends: [S; 2],
        seeds: [u64; 2],
        behind: usize,
        most: u64,
    ) -> Result<Self, Failure> {
        let streams = seeds.map(Stream::new);
        let mut both = Self { ends, out: streams.clone(), back: streams, most };
        both.put(0, behind)?;
        both.put(1, behind)?;
        Ok(both)
    }

    fn put(&mut self, end: usize, count: usize) -> Result<(), Failure> {
        self.ends[end].write_all(&self.out[end].next(count))?;
        self.out[end].advance(count);
        Ok(())
    }

    pub(super) fn turn(&mut self) -> Result<(), Failure> {
        for end in 0..2 {
            let count = 1 + (self.out[end].place() % self.most) as usize;
            self.put(end, count)?;
            let mut bytes = vec![0; count];
            self.ends[1 - end].read_exact(&mut bytes)?;
            self.back[end].check(&bytes)?;
        }
        Ok(())
    }
}
