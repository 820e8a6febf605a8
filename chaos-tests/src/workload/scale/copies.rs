//! Eight processes that have made the same pages, each for itself, and move them about.

use std::sync::atomic::Ordering;
use std::time::Duration;

use ckpt_engine::sys::program::map::{Backing, Map, PAGE_BYTES};

use crate::client::record::mix;
use crate::workload::context::{Context, Progress};
use crate::workload::outcome::{Failure, same};
use crate::workload::process::{Child, Stop};

const PAGE_WORDS: usize = PAGE_BYTES / 8;
/// 32 MiB.
const PAGES: usize = 8192;
const NAMES: [&str; 8] = ["one", "two", "three", "four", "five", "six", "seven", "eight"];
/// Pages looked at, and pages written, between two pauses.
const LOOKS: usize = 16;
const WRITES: usize = 8;
/// Every so many turns the end of the map is given back and filled again.
const ENDS: u64 = 64;
const END: usize = 64;

pub(super) fn run(context: &mut Context) -> Result<(), Failure> {
    let mut children = Vec::new();
    for (number, name) in (0..).zip(NAMES) {
        let progress = context.progress.clone();
        children.push(Child::start(context, name, |stop| live(number, stop, &progress))?);
    }
    while context.step(Duration::from_millis(50))? {
        children.iter().try_for_each(Child::check)?;
    }
    children.into_iter().try_for_each(Child::finish)
}

/// A map and what each of its pages should hold.
struct Pages {
    map: Map,
    holds: Vec<usize>,
}

impl Pages {
    fn write(&mut self, page: usize, contents: usize) {
        self.holds[page] = contents;
        for word in 0..PAGE_WORDS {
            let value = mix((contents * PAGE_WORDS + word) as u64);
            self.map.word(page * PAGE_WORDS + word).store(value, Ordering::Relaxed);
        }
    }

    fn check(&self, page: usize) -> Result<(), Failure> {
        for word in 0..PAGE_WORDS {
            let wanted = mix((self.holds[page] * PAGE_WORDS + word) as u64);
            let found = self.map.word(page * PAGE_WORDS + word).load(Ordering::Relaxed);
            same("a word of a page", found, wanted)?;
        }
        Ok(())
    }
}

fn live(number: u64, stop: &Stop, progress: &Progress) -> Result<(), Failure> {
    let map = Map::new(PAGES, Backing::Private)?;
    let mut pages = Pages { map, holds: vec![0; PAGES] };
    (0..PAGES).for_each(|page| pages.write(page, page));
    let (mut random, mut turn) = (number, 0u64);
    let mut any = || {
        random = mix(random);
        random as usize % PAGES
    };
    while !stop.wait(Duration::from_millis(10))? {
        turn += 1;
        let looked: Vec<usize> = (0..LOOKS).map(|_| any()).collect();
        if progress.plant() {
            pages.map.word(looked[0] * PAGE_WORDS + 7).fetch_add(1, Ordering::Relaxed);
        }
        looked.into_iter().try_for_each(|page| pages.check(page))?;
        for _ in 0..WRITES {
            let (one, other) = (any(), any());
            let (first, second) = (pages.holds[one], pages.holds[other]);
            pages.write(one, second);
            pages.write(other, first);
        }
        if turn.is_multiple_of(ENDS) {
            let ends = pages.holds[PAGES - END..].to_vec();
            pages.map.resize(PAGES - END)?;
            pages.map.resize(PAGES)?;
            for (page, contents) in (PAGES - END..).zip(ends) {
                let word = pages.map.word(page * PAGE_WORDS).load(Ordering::Relaxed);
                same("a page that is new", word, 0)?;
                pages.write(page, contents);
            }
        }
    }
    (0..PAGES).try_for_each(|page| pages.check(page))
}
