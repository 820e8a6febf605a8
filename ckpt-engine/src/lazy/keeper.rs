//! What a keeper knows, and what it does about each thing that happens.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    os::fd::{AsFd, BorrowedFd},
};

use bytes::Bytes;
use ckpt_format::memory::{PAGE, Run};

use super::{FromKeeper, pieces::Pieces};
use crate::{
    ranges::Ranges,
    sys::missing::{Event, Missing, Obstacle},
};

/// Pages that are asked for with the one that somebody waits for.
const AROUND: u64 = 16;
/// Pages in one request that nobody waits for.
const BLOCK: u64 = 32;
/// The most that is under way and that nobody waits for, in pages: what somebody waits for comes
/// after it.
const WINDOW: u64 = 128;
/// Where nothing is ever registered: a question about it is only whether the memory still exists.
const NOWHERE: u64 = 0x1_0000;

/// One address space with missing pages.
#[derive(Debug)]
struct Mind {
    id: u64,
    missing: Missing,
    /// The process on the source that its pages come from.
    pid: i32,
    pieces: Pieces,
    /// Pages that somebody waits for.
    waiting: BTreeSet<u64>,
}

/// Pages that have come and could not be put in place yet.
#[derive(Debug)]
struct Late {
    pid: i32,
    start: u64,
    pages: u64,
    /// None for zeros.
    data: Option<Bytes>,
}

/// All address spaces of a VE.
#[derive(Debug, Default)]
pub(super) struct Keeper {
    minds: Vec<Mind>,
    /// What has not come yet, by process on the source and address there.
    wanted: BTreeMap<i32, Ranges>,
    /// What has been asked for.
    asked: BTreeMap<i32, Ranges>,
    /// In which order to ask.
    order: VecDeque<(i32, Run)>,
    late: VecDeque<Late>,
    faults: u64,
    /// How many address spaces there were.
    ids: u64,
    /// Whether there is somebody to ask.
    begun: bool,
    /// What is to be said.
    words: Vec<FromKeeper>,
}

impl Keeper {
    /// Takes over a process.
    pub(super) fn add(&mut self, pid: i32, runs: &[Run], missing: Missing) {
        let mut pieces = Pieces::default();
        let wanted = self.wanted.entry(pid).or_default();
        for run in runs {
            pieces.insert(run.start, run.end());
            wanted.insert(run.start, run.end());
            self.order.push_back((pid, *run));
        }
        self.push(missing, pid, pieces);
    }

    fn push(&mut self, missing: Missing, pid: i32, pieces: Pieces) {
        self.ids += 1;
        let id = self.ids;
        self.minds.push(Mind { id, missing, pid, pieces, waiting: BTreeSet::new() });
        if self.begun {
            self.words.push(FromKeeper::Held { id });
        }
    }

    /// The userfaultfd of an address space.
    pub(super) fn descriptor(&self, id: u64) -> Option<BorrowedFd<'_>> {
        self.minds.iter().find(|mind| mind.id == id).map(|mind| mind.missing.as_fd())
    }

    /// Asks for what is needed first; what was asked for before counts as lost.
    pub(super) fn begin(&mut self) {
        self.begun = true;
        self.asked.clear();
        self.words.extend(self.minds.iter().map(|mind| FromKeeper::Held { id: mind.id }));
        // Those first that were first from the start. What was asked for stands there no more; what
        // stands there twice is asked for once.
        for (&pid, ranges) in &self.wanted {
            self.order.extend(ranges.iter().map(|(start, end)| (pid, run(start, end))));
        }
        let waiting: Vec<(usize, u64)> = self
            .minds
            .iter()
            .enumerate()
            .flat_map(|(index, mind)| mind.waiting.iter().map(move |&page| (index, page)))
            .collect();
        for (index, page) in waiting {
            self.ask_for(index, page);
        }
        self.ask_on();
    }

    /// Nobody is there to be asked any more.
    pub(super) fn pause(&mut self) {
        self.begun = false;
        self.words.clear();
    }

    /// What is to be said to the daemon.
    pub(super) fn words(&mut self) -> Vec<FromKeeper> {
        std::mem::take(&mut self.words)
    }

    /// How much is to come.
    pub(super) fn left(&self) -> FromKeeper {
        let ranges = self.wanted.values().flat_map(Ranges::iter);
        let bytes = ranges.map(|(start, end)| end - start).sum();
        FromKeeper::Left { bytes, faults: self.faults }
    }

    /// How often somebody had to wait.
    pub(super) fn faults(&self) -> u64 {
        self.faults
    }

    /// True when nothing is to come any more.
    pub(super) fn is_complete(&self) -> bool {
        let is_whole = |mind: &Mind| mind.pieces.is_empty();
        self.wanted.is_empty() && self.late.is_empty() && self.minds.iter().all(is_whole)
    }

    /// True when pages that are here could not be put in place: try again in a moment.
    pub(super) fn is_late(&self) -> bool {
        !self.late.is_empty()
    }

    /// Where events come from.
    pub(super) fn sources(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        self.minds.iter().map(|mind| mind.missing.as_fd())
    }

    /// Reads and follows the events of one address space, by its place in [`Self::sources`].
    pub(super) fn follow(&mut self, index: usize) {
        let events = match self.minds[index].missing.events() {
            Ok(events) => events,
            Err(error) => {
                tracing::error!(%error, "cannot read what happens to the memory of a process");
                return;
            }
        };
        for event in events {
            match event {
                Event::Fault(address) => self.fault(index, address & !(PAGE - 1)),
                Event::Fork(missing) => {
                    let (pid, pieces) = (self.minds[index].pid, self.minds[index].pieces.clone());
                    self.push(missing, pid, pieces);
                }
                Event::Moved { from, to, len } => {
                    let mind = &mut self.minds[index];
                    mind.pieces.relocate(from, to, len);
                    mind.look_again(from, from.saturating_add(len));
                    mind.look_again(to, to.saturating_add(len));
                }
                Event::Gone { start, end } => {
                    let mind = &mut self.minds[index];
                    mind.pieces.remove(start, end);
                    mind.look_again(start, end);
                }
            }
        }
    }

    /// Somebody waits for a page.
    fn fault(&mut self, index: usize, page: u64) {
        let mind = &mut self.minds[index];
        if mind.pieces.within(page, page + PAGE).next().is_some() {
            mind.waiting.insert(page);
            self.faults += 1;
            self.ask_for(index, page);
            return;
        }
        match mind.missing.zero(page, PAGE).stopped {
            None => {}
            Some(Obstacle::Changing) => {
                // Whoever waits looks again, and comes back with the same question.
                std::thread::yield_now();
                mind.missing.wake(page, PAGE);
            }
            Some(Obstacle::Present | Obstacle::NoPlace) => mind.missing.wake(page, PAGE),
            Some(Obstacle::Ended) => {}
            Some(Obstacle::NoMemory) => {
                std::thread::yield_now();
                mind.missing.wake(page, PAGE);
            }
            Some(Obstacle::Other(errno)) => {
                tracing::error!(page, errno, "cannot give a process an empty page");
                mind.missing.wake(page, PAGE);
            }
        }
    }

    /// Asks for a page that somebody waits for, and some behind it.
    fn ask_for(&mut self, index: usize, page: u64) {
        if !self.begun {
            return;
        }
        let mind = &self.minds[index];
        let Some(part) = mind.pieces.within(page, page + AROUND * PAGE).next() else { return };
        let pid = mind.pid;
        let Some(wanted) = self.wanted.get(&pid) else { return };
        let asked = self.asked.entry(pid).or_default();
        let end = part.origin + (part.end - part.start);
        let fresh = wanted.within(part.origin, end).collect::<Ranges>().without(asked);
        // The page itself may be under way already: then it comes.
        if let Some((start, end)) = fresh.iter().next().filter(|(start, _)| *start == part.origin) {
            asked.insert(start, end);
            self.words.push(FromKeeper::Want { pid, run: run(start, end), urgent: true });
        }
    }

    /// Asks for what nobody waits for, as far as the window allows.
    fn ask_on(&mut self) {
        if !self.begun {
            return;
        }
        let asked = self.asked.values().flat_map(Ranges::iter);
        let mut under_way: u64 = asked.map(|(start, end)| (end - start) / PAGE).sum();
        while under_way + BLOCK <= WINDOW {
            let Some((pid, next)) = self.order.pop_front() else { return };
            let Some(wanted) = self.wanted.get(&pid) else { continue };
            let asked = self.asked.entry(pid).or_default();
            let open = wanted.within(next.start, next.end()).collect::<Ranges>().without(asked);
            let Some((start, end)) = open.iter().next() else { continue };
            let end = end.min(start + BLOCK * PAGE);
            if end < next.end() {
                self.order.push_front((pid, run(end, next.end())));
            }
            asked.insert(start, end);
            under_way += (end - start) / PAGE;
            self.words.push(FromKeeper::Want { pid, run: run(start, end), urgent: false });
        }
    }

    /// Pages have come from the source.
    pub(super) fn arrived(&mut self, pid: i32, runs: &[Run], data: &Bytes) {
        let mut at = 0_usize;
        for run in runs {
            let len = run.pages.checked_mul(PAGE);
            let len = len.filter(|&len| run.start.checked_add(len).is_some());
            let next = len.and_then(|len| at.checked_add(usize::try_from(len).ok()?));
            let data = match next {
                Some(_) if data.is_empty() => None,
                Some(next) if next <= data.len() => Some(data.slice(at..next)),
                _ => {
                    tracing::error!(pid, "pages came without their contents");
                    return;
                }
            };
            at = next.unwrap_or(at);
            // What nobody asked for, or what came before, is not looked at.
            let wanted = self.wanted.get(&pid).map(|wanted| wanted.within(run.start, run.end()));
            let due: Vec<(u64, u64)> = wanted.into_iter().flatten().collect();
            for (start, end) in due {
                let offset = (start - run.start) as usize;
                let data =
                    data.as_ref().map(|data| data.slice(offset..offset + (end - start) as usize));
                self.late.push_back(Late { pid, start, pages: (end - start) / PAGE, data });
                self.came(pid, start, end);
            }
            if let Some(asked) = self.asked.get_mut(&pid) {
                asked.remove(run.start, run.end());
            }
        }
        self.settle();
    }

    fn came(&mut self, pid: i32, start: u64, end: u64) {
        if let Some(wanted) = self.wanted.get_mut(&pid) {
            wanted.remove(start, end);
            if wanted.is_empty() {
                self.wanted.remove(&pid);
            }
        }
    }

    /// Puts in place what has come, as far as that is possible now.
    pub(super) fn settle(&mut self) {
        for _ in 0..self.late.len() {
            let Some(late) = self.late.pop_front() else { break };
            let mut placed = true;
            for mind in self.minds.iter_mut().filter(|mind| mind.pid == late.pid) {
                placed &= mind.place(&late);
            }
            if !placed {
                self.late.push_back(late);
            }
        }
        self.ask_on();
    }

    /// Drops address spaces that do not exist any more, and what was to come for them alone.
    pub(super) fn sweep(&mut self) {
        let words = &mut self.words;
        let begun = self.begun;
        self.minds.retain(|mind| {
            let lives = mind.missing.zero(NOWHERE, PAGE).stopped != Some(Obstacle::Ended);
            if !lives && begun {
                words.push(FromKeeper::Gone { id: mind.id });
            }
            lives
        });
        let minds = &self.minds;
        let lives = |pid: i32| minds.iter().any(|mind| mind.pid == pid);
        self.wanted.retain(|&pid, _| lives(pid));
        self.asked.retain(|&pid, _| lives(pid));
        self.late.retain(|late| lives(late.pid));
        if self.wanted.is_empty() && self.late.is_empty() {
            self.check();
        }
        self.ask_on();
    }

    /// What one of them misses must be wanted: else it would wait for ever.
    fn check(&mut self) {
        for mind in self.minds.iter().filter(|mind| !mind.pieces.is_empty()) {
            tracing::error!(pid = mind.pid, "pages that somebody misses were taken for complete");
            let wanted = self.wanted.entry(mind.pid).or_default();
            for part in mind.pieces.within(0, u64::MAX) {
                let end = part.origin + (part.end - part.start);
                wanted.insert(part.origin, end);
                self.order.push_back((mind.pid, run(part.origin, end)));
            }
        }
    }
}

impl Mind {
    /// Has those look again who wait for pages in a range in which something has changed.
    fn look_again(&mut self, start: u64, end: u64) {
        let waiting: Vec<u64> = self.waiting.range(start..end.max(start)).copied().collect();
        for page in waiting {
            self.waiting.remove(&page);
            self.missing.wake(page, PAGE);
        }
    }

    /// Puts pages in place wherever they are missing here. False if some of it must be tried again.
    fn place(&mut self, late: &Late) -> bool {
        let parts = self.pieces.with_origin(late.start, late.start + late.pages * PAGE);
        let mut done = true;
        for part in parts {
            let offset = part.origin - late.start;
            done &= self.place_part(part.start, part.end, offset, late.data.as_ref());
        }
        done
    }

    fn place_part(&mut self, start: u64, end: u64, offset: u64, data: Option<&Bytes>) -> bool {
        let mut at = start;
        // Smaller after a border between two areas was met.
        let mut step = end - start;
        while at < end {
            let len = step.min(end - at);
            let from = (offset + (at - start)) as usize;
            let placed = match data {
                Some(data) => self.missing.copy(at, &data[from..from + len as usize]),
                None => self.missing.zero(at, len),
            };
            let settled = match placed.stopped {
                None => placed.len,
                Some(Obstacle::NoPlace) if len > PAGE => {
                    step = PAGE;
                    continue;
                }
                // The program has put something else there, or has given it back.
                Some(Obstacle::Present | Obstacle::NoPlace) => {
                    self.missing.wake(at, PAGE);
                    PAGE
                }
                Some(Obstacle::Ended) => {
                    self.pieces = Pieces::default();
                    return true;
                }
                Some(Obstacle::Changing | Obstacle::NoMemory) => return false,
                Some(Obstacle::Other(errno)) => {
                    tracing::error!(at, errno, "cannot put a page in place; trying again");
                    return false;
                }
            };
            self.pieces.remove(at, at + settled);
            let waited: Vec<u64> = self.waiting.range(at..at + settled).copied().collect();
            for page in waited {
                self.waiting.remove(&page);
            }
            at += settled;
        }
        true
    }
}

fn run(start: u64, end: u64) -> Run {
    Run { start, pages: (end - start) / PAGE }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_that_cannot_be_are_no_reason_to_panic() {
        let data = Bytes::from(vec![0; 2 * PAGE as usize]);
        for pages in [u64::MAX, u64::MAX / PAGE, 3] {
            let runs = [Run { start: 0, pages: 1 }, Run { start: PAGE, pages }];
            let mut keeper = Keeper::default();
            keeper.arrived(1, &runs, &data);
            keeper.arrived(1, &runs[1..], &Bytes::new());
            assert!(keeper.is_complete());
        }
    }
}
