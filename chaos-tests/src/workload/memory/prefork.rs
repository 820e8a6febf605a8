//! A server that loads much and forks many: what its workers have in common is in memory once.

use std::sync::atomic::Ordering;
use std::time::Duration;

use ckpt_engine::sys::program::fork::fork;
use ckpt_engine::sys::program::map::{Backing, Map, PAGE_BYTES};
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::Pid;

use crate::client::record::mix;
use crate::workload::context::Context;
use crate::workload::outcome::{Failure, ensure, same};
use crate::workload::process::{Child, proc_text};

const PAGE_WORDS: usize = PAGE_BYTES / 8;
const PAGES: usize = 4096;
const WORKERS: [&str; 8] = ["one", "two", "three", "four", "five", "six", "seven", "eight"];
/// The pages that a worker writes.
const OWN: usize = 50;

fn load(map: &Map, page: usize) -> u64 {
    map.word(page * PAGE_WORDS).load(Ordering::Relaxed)
}

/// The memory of these processes in KiB, what is shared counted once.
fn proportional(pids: &[Pid]) -> Result<u64, Failure> {
    let mut sum = 0;
    for pid in pids {
        let rollup = proc_text(format!("/proc/{pid}/smaps_rollup"))?;
        let line = rollup.lines().find_map(|line| line.strip_prefix("Pss_Anon:"));
        let number = line.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok());
        sum += number.ok_or_else(|| Failure::new(format!("no size in {rollup:?}")))?;
    }
    Ok(sum)
}

pub(super) fn run(context: &mut Context) -> Result<(), Failure> {
    let dataset = Map::new(PAGES, Backing::Private)?;
    for page in 0..PAGES {
        dataset.word(page * PAGE_WORDS).store(mix(page as u64), Ordering::Relaxed);
    }
    let mut workers = Vec::new();
    for (number, name) in WORKERS.into_iter().enumerate() {
        let (dataset, progress) = (&dataset, context.progress.clone());
        workers.push(Child::start(context, name, |stop| work(number, dataset, stop, &progress))?);
    }
    let mut pids: Vec<Pid> = workers.iter().map(|worker| worker.pid).collect();
    pids.push(nix::unistd::getpid());
    let mut turn = 0u64;
    let mut before = 0;
    while context.step(Duration::from_millis(20))? {
        turn += 1;
        workers.iter().try_for_each(Child::check)?;
        // Its own first pages are those that the workers write, too.
        dataset.word(1).store(turn, Ordering::Relaxed);
        let page = mix(turn) as usize % PAGES;
        same("a page of the server", load(&dataset, page), mix(page as u64))?;
        // By then all workers have written their pages.
        if turn == 25 {
            before = proportional(&pids)?;
        }
        if turn > 25 && turn.is_multiple_of(10) {
            let now = proportional(&pids)?;
            ensure(now <= before + before * 15 / 100, || {
                format!("the memory of a family grew from {before} to {now} KiB")
            })?;
        }
        late_worker(turn, &dataset)?;
    }
    workers.into_iter().try_for_each(Child::finish)
}

fn work(
    number: usize,
    dataset: &Map,
    stop: &crate::workload::process::Stop,
    progress: &crate::workload::context::Progress,
) -> Result<(), Failure> {
    let own = |page: usize| page / OWN == number;
    let mark = |page: usize| mix(page as u64) ^ number as u64 ^ 0xff;
    for page in (0..PAGES).filter(|page| own(*page)) {
        dataset.word(page * PAGE_WORDS).store(mark(page), Ordering::Relaxed);
    }
    let mut random = number as u64;
    while !stop.wait(Duration::from_millis(10))? {
        random = mix(random);
        for page in [random as usize % PAGES, number * OWN + random as usize % OWN] {
            if progress.plant() {
                dataset.word(page * PAGE_WORDS).fetch_add(1, Ordering::Relaxed);
            }
            let wanted = if own(page) { mark(page) } else { mix(page as u64) };
            same("a page of a worker", load(dataset, page), wanted)?;
        }
        same("what the server writes", dataset.word(1).load(Ordering::Relaxed), 0)?;
    }
    Ok(())
}

/// Workers that come and go see what the server has at that moment.
fn late_worker(turn: u64, dataset: &Map) -> Result<(), Failure> {
    let page = mix(turn) as usize % PAGES;
    let child = Pid::from_raw(fork(|| {
        let seen = dataset.word(1).load(Ordering::Relaxed) == turn
            && load(dataset, page) == mix(page as u64);
        i32::from(!seen)
    })?);
    same("what a new worker sees", waitpid(child, None)?, WaitStatus::Exited(child, 0))
}
