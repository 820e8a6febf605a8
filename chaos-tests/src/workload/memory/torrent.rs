//! Memory that is written as fast as it goes: no link keeps up with it.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use ckpt_engine::sys::program::fork::fork;
use ckpt_engine::sys::program::map::{Backing, Map, PAGE_BYTES};
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::Pid;

use crate::client::record::mix;
use crate::workload::context::{Context, Progress};
use crate::workload::outcome::{Failure, same};

const PAGE_WORDS: usize = PAGE_BYTES / 8;
/// Pages of the large map.
const PAGES: usize = 10_000;
/// Pages written between two looks at everything else.
const BATCH: usize = 1000;
/// Every so many steps it forks: pages that a family has in common cannot come later.
const FORKS: u64 = 16;
/// Pages of the maps that are moved, thrown away and read into.
const SMALL: usize = 300;
/// Threads of the flood, and pages of each.
const THREADS: usize = 4;
const OWN: usize = 2500;

/// What a page holds after so many turns.
fn mark(page: usize, turn: u64) -> u64 {
    mix(page as u64 ^ turn << 32)
}

/// Fills all of the pages but their ends with what no compression makes smaller, so that a slow
/// link stays slow.
fn fill(map: &Map, pages: usize) {
    for page in 0..pages {
        for word in page * PAGE_WORDS + 1..(page + 1) * PAGE_WORDS - 1 {
            map.word(word).store(mix(word as u64), Ordering::Relaxed);
        }
    }
}

/// Checks what a page held after the last turn, and writes what it holds after this one.
fn renew(map: &Map, page: usize, turn: u64, progress: &Progress) -> Result<(), Failure> {
    let ends = [page * PAGE_WORDS, page * PAGE_WORDS + PAGE_WORDS - 1];
    // In the first turn nobody would look at it.
    if turn > 0 && progress.plant() {
        map.word(ends[1]).fetch_add(1, Ordering::Relaxed);
    }
    for word in ends {
        if turn > 0 {
            same("a page", map.word(word).load(Ordering::Relaxed), mark(page, turn - 1))?;
        }
        map.word(word).store(mark(page, turn), Ordering::Relaxed);
    }
    Ok(())
}

/// One process that writes, forks, moves memory, throws it away, and reads into it.
pub(super) fn torrent(context: &mut Context) -> Result<(), Failure> {
    let map = Map::new(PAGES, Backing::Private)?;
    fill(&map, PAGES);
    let mut moved = Map::new(SMALL, Backing::Private)?;
    let mut thrown = Map::new(SMALL, Backing::Private)?;
    let source = context.path("source");
    let wanted: Vec<u8> =
        (0..SMALL * PAGE_BYTES).map(|at| (mix(at as u64 / 8) >> 3) as u8).collect();
    std::fs::write(&source, &wanted)?;
    let source = File::open(&source)?;
    let mut read = vec![0u8; SMALL * PAGE_BYTES];
    let progress = context.progress.clone();
    let mut step = 0;
    while context.step(Duration::ZERO)? {
        let (turn, first) = ((step * BATCH / PAGES) as u64, step * BATCH % PAGES);
        for page in first..first + BATCH {
            renew(&map, page, turn, &progress)?;
        }
        let number = step as u64;
        if number.is_multiple_of(FORKS) {
            fork_and_look(&map, first, turn, mix(number))?;
        }
        grow(&mut moved, number)?;
        for page in 0..SMALL {
            let word = thrown.word(page * PAGE_WORDS).load(Ordering::Relaxed);
            let before = if number == 0 { 0 } else { mark(page, number - 1) };
            same("a page that is thrown away later", word, before)?;
        }
        thrown.discard()?;
        for page in 0..SMALL {
            let word = page * PAGE_WORDS;
            same("a page thrown away", thrown.word(word).load(Ordering::Relaxed), 0)?;
            thrown.word(word).store(mark(page, number), Ordering::Relaxed);
        }
        // By the kernel, in a place that the program has not touched since the last time.
        let at = step * 16 % SMALL * PAGE_BYTES;
        let len = (16 * PAGE_BYTES).min(read.len() - at);
        source.read_exact_at(&mut read[at..at + len], at as u64)?;
        same("bytes read from a file", &read[at..at + len], &wanted[at..at + len])?;
        step += 1;
    }
    Ok(())
}

/// A child sees what its parent sees, and what it writes stays its own.
fn fork_and_look(map: &Map, first: usize, turn: u64, random: u64) -> Result<(), Failure> {
    let page = random as usize % PAGES;
    let wanted = match page < first + BATCH {
        true => Some(mark(page, turn)),
        false => turn.checked_sub(1).map(|before| mark(page, before)),
    };
    let word = map.word(page * PAGE_WORDS);
    let child = Pid::from_raw(fork(|| {
        let seen = word.load(Ordering::Relaxed);
        word.store(!seen, Ordering::Relaxed);
        i32::from(wanted.unwrap_or(0) != seen)
    })?);
    same("what a child sees", waitpid(child, None)?, WaitStatus::Exited(child, 0))?;
    same("what its parent sees", word.load(Ordering::Relaxed), wanted.unwrap_or(0))
}

/// The map grows and shrinks, and may move meanwhile.
fn grow(map: &mut Map, number: u64) -> Result<(), Failure> {
    for page in 0..SMALL {
        let word = map.word(page * PAGE_WORDS).load(Ordering::Relaxed);
        let before = if number == 0 { 0 } else { mark(page, number - 1) };
        same("a page of a map that moves", word, before)?;
    }
    map.resize(SMALL * 3)?;
    let behind = map.word((SMALL * 2 + 1) * PAGE_WORDS);
    same("a page behind the old end", behind.load(Ordering::Relaxed), 0)?;
    behind.store(1, Ordering::Relaxed);
    for page in 0..SMALL {
        map.word(page * PAGE_WORDS).store(mark(page, number), Ordering::Relaxed);
    }
    Ok(map.resize(SMALL)?)
}

/// Threads that write, each its own pages.
pub(super) fn flood(context: &mut Context) -> Result<(), Failure> {
    let map = Map::new(THREADS * OWN, Backing::Private)?;
    fill(&map, THREADS * OWN);
    let stop = AtomicBool::new(false);
    let progress = context.progress.clone();
    std::thread::scope(|scope| {
        let work = |thread: usize| {
            let (map, stop, progress) = (&map, &stop, &progress);
            move || {
                let mut turn = 0;
                while !stop.load(Ordering::Relaxed) {
                    for page in thread * OWN..(thread + 1) * OWN {
                        renew(map, page, turn, progress)?;
                    }
                    progress.count();
                    turn += 1;
                }
                Ok::<_, Failure>(())
            }
        };
        let threads: Vec<_> = (0..THREADS).map(|thread| scope.spawn(work(thread))).collect();
        let mut waited = Ok(());
        while waited.is_ok() && threads.iter().all(|thread| !thread.is_finished()) {
            match context.step(Duration::from_millis(10)) {
                Ok(true) => {}
                Ok(false) => break,
                Err(failure) => waited = Err(failure),
            }
        }
        stop.store(true, Ordering::Relaxed);
        for thread in threads {
            thread.join().map_err(|_| Failure::new("a thread panicked"))??;
        }
        waited
    })
}
