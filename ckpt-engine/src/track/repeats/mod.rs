//! Pages whose contents the target has already: it is told where, and not sent them again.
//!
//! The target does what the records say, one after the other, and nothing else changes its pages
//! before the last of them. So the records alone tell which contents stand where: each is looked at
//! here on its way, and takes away what it overwrites, drops or unmaps. Whether a page has been
//! written on the source since does not matter.
//!
//! Only private anonymous memory is remembered: what stands there is what was sent. A file could
//! show through elsewhere, shared memory could be cut off, and droppable memory is the kernel's to
//! drop. Pages of any memory are found there, though.

mod contents;

use std::collections::HashMap;

use bytes::Bytes;
use ckpt_format::{
    memory::{Area, Backing, PAGE, Run, Space},
    process::Layout,
    stream::{Origin, PageHash, PageKey, Record, page_hash},
};

use self::contents::{Contents, Place};
use super::output::push_page;
use crate::areas::kept;

/// What the target of one stream of records has.
#[derive(Debug)]
pub struct Repeats {
    key: PageKey,
    processes: HashMap<i32, Known>,
    contents: Contents,
}

/// How hard to look.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Look {
    /// At every page.
    All,
    /// At one page in [`SAMPLE`], chosen by what it holds: all that are alike are chosen, or none.
    Sample,
}

/// One page in so many is looked at to see whether it is worth looking at all.
pub const SAMPLE: u64 = 16;

/// What is to be sent in the place of a record.
#[derive(Debug)]
pub struct Shortened {
    /// In this order.
    pub records: Vec<Record>,
    /// How many pages were looked at.
    pub looked: u64,
    /// How many of those the target has.
    pub found: u64,
}

/// A process as the target was told of it.
#[derive(Debug)]
struct Known {
    life: u64,
    /// Its areas whose contents are remembered.
    areas: Vec<Area>,
    /// The same, of areas that are not all told yet.
    coming: Vec<Area>,
}

impl Repeats {
    /// `key` must be random.
    pub fn new(key: PageKey) -> Self {
        Self { key, processes: HashMap::new(), contents: Contents::default() }
    }

    /// Takes in a record that is about to be sent, and says what to send for it. Every record must
    /// come by here, in the order in which they are sent.
    pub fn shorten(&mut self, record: Record, look: Look) -> Shortened {
        match &record {
            Record::Layout(layout) => self.layout(layout),
            Record::Areas { pid, areas, complete } => self.areas(*pid, areas, *complete),
            Record::Drop { space: Space::Process(pid), runs } | Record::Guards { pid, runs } => {
                self.forget(*pid, runs);
            }
            Record::Drop { space: Space::Shared(_), .. } => {}
            Record::Same { space, runs, .. } => {
                if let Space::Process(pid) = space {
                    self.forget(*pid, runs);
                }
            }
            Record::Pages { space, runs, data } => {
                return match self.pages(*space, runs, data, look) {
                    (None, looked) => Shortened { records: vec![record], looked, found: 0 },
                    (Some(split), looked) => Shortened {
                        found: split.hashes.len() as u64,
                        records: split.records(*space, self.key),
                        looked,
                    },
                };
            }
        }
        Shortened { records: vec![record], looked: 0, found: 0 }
    }

    fn layout(&mut self, layout: &Layout) {
        let living = layout.processes.iter().filter(|shape| shape.zombie.is_none());
        let lives: HashMap<i32, u64> = living.map(|shape| (shape.pid, shape.life)).collect();
        let contents = &mut self.contents;
        self.processes.retain(|pid, known| {
            let same = lives.get(pid) == Some(&known.life);
            if !same {
                contents.forget_process(*pid);
            }
            same
        });
        for (pid, life) in lives {
            let new = || Known { life, areas: Vec::new(), coming: Vec::new() };
            self.processes.entry(pid).or_insert_with(new);
        }
    }

    fn areas(&mut self, pid: i32, areas: &[Area], complete: bool) {
        let Some(known) = self.processes.get_mut(&pid) else { return };
        known.coming.extend(areas.iter().filter(|area| is_remembered(area)).cloned());
        if complete {
            let areas = std::mem::take(&mut known.coming);
            // Others are never the same as one of these, so it makes no difference that they are
            // left out.
            self.contents.keep(pid, &kept(&known.areas, &areas));
            known.areas = areas;
        }
    }

    fn forget(&mut self, pid: i32, runs: &[Run]) {
        runs.iter().for_each(|run| self.contents.forget(pid, run.start, run.end()));
    }

    /// Which of these pages the target has, if any, and how many were looked at.
    fn pages(
        &mut self,
        space: Space,
        runs: &[Run],
        data: &Bytes,
        look: Look,
    ) -> (Option<Split>, u64) {
        let pages = || data.chunks_exact(PAGE as usize);
        let starts = || runs.iter().flat_map(|run| (run.start..run.end()).step_by(PAGE as usize));
        let own = match space {
            Space::Process(pid) => Some(pid),
            Space::Shared(_) => None,
        };
        // A page that comes twice would overwrite what others are told to be found there.
        if !runs.is_sorted_by(|a, b| a.end() <= b.start) || starts().count() != pages().count() {
            if let Some(pid) = own {
                self.forget(pid, runs);
            }
            return (None, 0);
        }
        let looked_at = |page: &[u8]| look == Look::All || is_in_sample(page);
        let hash = |page| looked_at(page).then(|| page_hash(&self.key, page));
        let hashes: Vec<Option<PageHash>> = pages().map(hash).collect();
        let looked = hashes.iter().flatten().count() as u64;
        if let Some(pid) = own {
            self.overwrite(pid, runs, starts().zip(&hashes));
        }
        // What is in none of these pages stands where it stood, also once all new ones are written.
        let mut split = None;
        for (index, ((start, page), hash)) in starts().zip(pages()).zip(hashes).enumerate() {
            let found = hash.and_then(|hash| Some((self.contents.find(&hash)?, hash)));
            if let Some((place, hash)) = found {
                // Most records have nothing in common with others: they travel without a copy.
                let split =
                    split.get_or_insert_with(|| Split::of(starts().zip(pages()).take(index)));
                split.same(start, place, hash);
                continue;
            }
            if let Some(split) = &mut split {
                split.fresh(start, page);
            }
            if let (Some(hash), Some(pid)) = (hash, own)
                && self.remembers(pid, start)
            {
                self.contents.add(hash, Place { pid, start });
            }
        }
        (split, looked)
    }

    /// Forgets what stands in these pages, but for what is written there once more as it is.
    fn overwrite<'a>(
        &mut self,
        pid: i32,
        runs: &[Run],
        pages: impl Iterator<Item = (u64, &'a Option<PageHash>)>,
    ) {
        let written = pages.filter_map(|(start, hash)| Some((start, (*hash)?)));
        let stands = |(start, hash): &(u64, PageHash)| self.contents.at(pid, *start) == Some(hash);
        let stay: Vec<(u64, PageHash)> = written.filter(stands).collect();
        self.forget(pid, runs);
        for (start, hash) in stay {
            self.contents.add(hash, Place { pid, start });
        }
    }

    fn remembers(&self, pid: i32, start: u64) -> bool {
        self.processes.get(&pid).is_some_and(|known| {
            let index = known.areas.partition_point(|area| area.end <= start);
            known.areas.get(index).is_some_and(|area| area.start <= start)
        })
    }
}

/// Pages in two parts.
#[derive(Debug, Default)]
struct Split {
    /// Those that travel, and what they hold.
    fresh: (Vec<Run>, Vec<u8>),
    /// Those that the target has elsewhere, where, and what they are.
    same: (Vec<Run>, Vec<Origin>),
    hashes: Vec<PageHash>,
}

impl Split {
    /// With these pages, all of which travel.
    fn of<'a>(pages: impl Iterator<Item = (u64, &'a [u8])>) -> Self {
        let mut split = Self::default();
        pages.for_each(|(start, page)| split.fresh(start, page));
        split
    }

    fn fresh(&mut self, start: u64, page: &[u8]) {
        push_page(&mut self.fresh.0, start);
        self.fresh.1.extend_from_slice(page);
    }

    fn same(&mut self, start: u64, place: Place, hash: PageHash) {
        push_page(&mut self.same.0, start);
        match self.same.1.last_mut() {
            Some(last) if last.pid == place.pid && last.run.end() == place.start => {
                last.run.pages += 1;
            }
            _ => {
                let run = Run { start: place.start, pages: 1 };
                self.same.1.push(Origin { pid: place.pid, run });
            }
        }
        self.hashes.push(hash);
    }

    /// What travels comes first: the rest may be a repetition of it.
    fn records(self, space: Space, key: PageKey) -> Vec<Record> {
        let (fresh, data) = self.fresh;
        let (runs, origins) = self.same;
        let same = Record::Same { space, runs, origins, key, hashes: self.hashes };
        match fresh.is_empty() {
            true => vec![same],
            false => vec![Record::Pages { space, runs: fresh, data: data.into() }, same],
        }
    }
}

fn is_remembered(area: &Area) -> bool {
    matches!(area.backing, Backing::Anonymous { .. }) && !area.shared && !area.advice.droppable
}

/// A choice that costs next to nothing: from some words of the page.
fn is_in_sample(page: &[u8]) -> bool {
    let (words, _) = page.as_chunks::<8>();
    let mixed = words.iter().step_by(32).fold(0u64, |mixed, word| {
        (mixed.rotate_left(23) ^ u64::from_le_bytes(*word)).wrapping_mul(0x9e37_79b9_7f4a_7c15)
    });
    (mixed >> 32).is_multiple_of(SAMPLE)
}

#[cfg(test)]
mod tests;
