//! What a process leaves on the source when it stands still, to be fetched once it runs.

use ckpt_format::{
    memory::{PAGE, Run},
    process::Process,
};

use super::{Life, Tracked, blocks, run};
use crate::{
    aio,
    areas::can_come_later,
    ranges::Ranges,
    sys::ptrace,
    track::{Output, Sink, TrackError, sharing::exclusive},
};

impl Life {
    /// What could not be read when it was due, and what was kept back for nothing.
    pub(super) fn take_owed(&mut self) -> Ranges {
        let mut due = std::mem::take(&mut self.owed);
        for (start, end) in std::mem::take(&mut self.left).iter() {
            due.insert(start, end);
        }
        due
    }

    /// Counts how much of what is due could come later; with `leave` keeps it back.
    pub(super) fn sort_out<S: Sink>(
        &mut self,
        pid: i32,
        due: Ranges,
        frozen: bool,
        leave: bool,
        output: &mut Output<'_, S>,
    ) -> Result<Ranges, TrackError> {
        if !frozen {
            self.hot = due.clone();
        }
        if frozen && !leave {
            return Ok(due);
        }
        let plain = exclusive(&self.pagemap, &self.plain(&due));
        let plain = match plain {
            Ok(plain) => plain,
            // It is ending.
            Err(_) if !frozen => Ranges::default(),
            Err(source) => return Err(TrackError::Memory { pid, source }),
        };
        output.round.plain += plain.iter().map(|(start, end)| (end - start) / PAGE).sum::<u64>();
        if !leave {
            return Ok(due);
        }
        self.left = plain;
        Ok(due.without(&self.left))
    }

    /// The part of `due` that lies in memory that can come later.
    fn plain(&self, due: &Ranges) -> Ranges {
        // A device may still write what an AIO request has been given.
        if aio::any(&self.space.areas) {
            return Ranges::default();
        }
        let areas = self.space.areas.iter().filter(|area| can_come_later(area));
        due.common(&areas.map(|area| (area.start, area.end)).collect())
    }
}

impl Tracked {
    /// Sends what was kept back although it is needed at once, and returns the rest: what was
    /// written last comes first.
    pub(in crate::track) fn send_needed<S: Sink>(
        &mut self,
        process: &Process,
        output: &mut Output<'_, S>,
    ) -> Result<Vec<Run>, TrackError> {
        let (host, pid) = (self.host, self.inner);
        let Some(life) = &mut self.life else { return Ok(Vec::new()) };
        let needed = life.left.common(&needed(process));
        for block in blocks(&needed) {
            life.send_block(host, pid, block, output)?;
        }
        if !life.owed.is_empty() {
            return Err(TrackError::Memory { pid, source: std::io::ErrorKind::InvalidData.into() });
        }
        life.left = life.left.without(&needed);
        let hot = life.left.common(&life.hot);
        let rest = life.left.without(&hot);
        Ok(hot.iter().chain(rest.iter()).map(|(start, end)| run(start, end)).collect())
    }

    /// The pages that are kept back, in bytes.
    pub(in crate::track) fn left_bytes(&self) -> u64 {
        let ranges = self.life.iter().flat_map(|life| life.left.iter());
        ranges.map(|(start, end)| end - start).sum()
    }
}

/// What the kernel touches before a rebuilt thread runs, and the thread with its first
/// instructions.
fn needed(process: &Process) -> Ranges {
    let mut pages = Ranges::default();
    let mut touch = |start: u64, len: u64| {
        let end = start.saturating_add(len).min(u64::MAX - PAGE);
        pages.insert(start & !(PAGE - 1), end.next_multiple_of(PAGE));
    };
    for thread in process.living() {
        if let Some(rseq) = &thread.rseq {
            // Written whenever the thread leaves the kernel.
            touch(rseq.pointer, u64::from(rseq.size).max(1));
        }
        touch(thread.robust_list.0, 1);
        touch(thread.tid_address, 1);
        if let Some(registers) = ptrace::registers_from_bytes(&thread.registers) {
            touch(registers.rsp.saturating_sub(PAGE), 2 * PAGE);
            touch(registers.rip, 1);
            touch(registers.fs_base, 1);
        }
    }
    pages
}
