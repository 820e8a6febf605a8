//! Fifty thousand areas: every second page cannot be touched.

use std::sync::atomic::Ordering;
use std::time::Duration;

use ckpt_engine::sys::program::map::{Backing, Map, PAGE_BYTES};

use crate::client::record::mix;
use crate::workload::context::Context;
use crate::workload::outcome::{Failure, ensure, same};

const AREAS: usize = 25_000;
const PAGE_WORDS: usize = PAGE_BYTES / 8;

pub(super) fn run(context: &mut Context) -> Result<(), Failure> {
    let map = Map::new(AREAS * 2, Backing::Private)?;
    let word = |area: usize| map.word(area * 2 * PAGE_WORDS);
    for area in 0..AREAS {
        word(area).store(mix(area as u64), Ordering::Relaxed);
        map.set_accessible(area * 2 + 1, 1, false)?;
    }
    let mut turn = 0;
    while context.step(Duration::from_millis(50))? {
        if context.progress.plant() {
            word(7).fetch_add(1, Ordering::Relaxed);
        }
        for area in 0..AREAS {
            same("the page of an area", word(area).load(Ordering::Relaxed), mix(area as u64))?;
        }
        turn += 1;
        if turn % 50 == 0 {
            let maps = std::fs::read_to_string("/proc/self/maps")?;
            let guards = maps.lines().filter(|line| line.contains(" ---p ")).count();
            ensure(guards >= AREAS - 1, || format!("only {guards} areas cannot be touched"))?;
        }
    }
    Ok(())
}
