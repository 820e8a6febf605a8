//! Counters in memory against the same counters in files, and pages written at random whose
//! content is known from how often each was written.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::atomic::Ordering;
use std::time::Duration;

use ckpt_engine::sys::program::map::{Backing, Map, PAGE_BYTES};

use crate::client::record::mix;
use crate::workload::context::Context;
use crate::workload::outcome::{Failure, same};

const PAGES: usize = 4096;
const PAGE_WORDS: usize = PAGE_BYTES / 8;
const COUNTERS: usize = 64;

pub(super) fn run(context: &mut Context) -> Result<(), Failure> {
    let pages = Pages::new()?;
    let mut counters = Counters::new(context)?;
    let mut random = 1;
    while context.step(Duration::from_millis(2))? {
        for _ in 0..8 {
            random = mix(random);
            pages.write(random);
            pages.check(mix(random))?;
        }
        counters.advance(random)?;
        if context.progress.plant() {
            pages.damage();
        }
    }
    pages.check_all()?;
    counters.check_all()
}

/// Private memory. The first word of a page says how often it was written; three others follow
/// from it.
struct Pages(Map);

impl Pages {
    fn new() -> Result<Self, Failure> {
        let pages = Self(Map::new(PAGES, Backing::Private)?);
        // Every second page only: the others are holes that read as zero.
        for page in (0..PAGES).step_by(2) {
            pages.fill(page, 1);
        }
        Ok(pages)
    }

    fn write(&self, random: u64) {
        let page = random as usize % PAGES;
        let count = self.0.word(page * PAGE_WORDS).load(Ordering::Relaxed);
        self.fill(page, count + 1);
    }

    fn fill(&self, page: usize, count: u64) {
        let first = page * PAGE_WORDS;
        for (place, value) in content(page, count) {
            self.0.word(first + place).store(value, Ordering::Relaxed);
        }
        self.0.word(first).store(count, Ordering::Relaxed);
    }

    fn check(&self, random: u64) -> Result<(), Failure> {
        self.check_page(random as usize % PAGES)
    }

    fn check_page(&self, page: usize) -> Result<(), Failure> {
        let first = page * PAGE_WORDS;
        let count = self.0.word(first).load(Ordering::Relaxed);
        for (place, expected) in content(page, count) {
            let found = self.0.word(first + place).load(Ordering::Relaxed);
            same(&format!("page {page}, written {count} times, word {place}"), found, expected)?;
        }
        Ok(())
    }

    fn check_all(&self) -> Result<(), Failure> {
        (0..PAGES).try_for_each(|page| self.check_page(page))
    }

    fn damage(&self) {
        for page in 0..PAGES {
            self.0.word(page * PAGE_WORDS + 1).fetch_add(1, Ordering::Relaxed);
        }
    }
}

/// What some words of a page must be; zero in a page that was never written.
fn content(page: usize, count: u64) -> [(usize, u64); 3] {
    [1, 200, PAGE_WORDS - 1].map(|place| {
        let value = if count == 0 { 0 } else { mix(mix(page as u64) ^ count ^ place as u64) };
        (place, value)
    })
}

/// The same numbers on the heap and in a file.
struct Counters {
    file: File,
    memory: Vec<u64>,
}

impl Counters {
    fn new(context: &Context) -> Result<Self, Failure> {
        let path = context.path("counters");
        let file = File::options().read(true).write(true).create_new(true).open(path)?;
        file.set_len(COUNTERS as u64 * 8)?;
        Ok(Self { file, memory: vec![0; COUNTERS] })
    }

    fn advance(&mut self, random: u64) -> Result<(), Failure> {
        let place = random as usize % COUNTERS;
        let in_file = self.read(place)?;
        same(&format!("counter {place} in the file"), in_file, self.memory[place])?;
        self.memory[place] += 1;
        Ok(self.file.write_all_at(&self.memory[place].to_le_bytes(), place as u64 * 8)?)
    }

    fn read(&self, place: usize) -> Result<u64, Failure> {
        let mut bytes = [0; 8];
        self.file.read_exact_at(&mut bytes, place as u64 * 8)?;
        Ok(u64::from_le_bytes(bytes))
    }

    fn check_all(&self) -> Result<(), Failure> {
        (0..COUNTERS).try_for_each(|place| {
            same("a counter in the file", self.read(place)?, self.memory[place])
        })
    }
}
