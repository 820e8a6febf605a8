//! Memory that is large, sparse, or in very many pieces.

use std::sync::atomic::Ordering;
use std::time::Duration;

use ckpt_engine::sys::program::advice::Advice;
use ckpt_engine::sys::program::map::{Backing, Map, PAGE_BYTES};

use crate::client::record::mix;
use crate::workload::context::Context;
use crate::workload::outcome::{Failure, ensure, same};

const PAGE_WORDS: usize = PAGE_BYTES / 8;

/// Pages far apart in sixty-four gibibytes for which nothing is set aside.
pub(super) fn sparse(context: &mut Context) -> Result<(), Failure> {
    const PAGES: usize = 16 << 20;
    const USED: usize = 400;
    let map = Map::new(PAGES, Backing::Unreserved)?;
    let place = |number: usize| mix(number as u64) as usize % PAGES * PAGE_WORDS;
    for number in 0..USED {
        map.word(place(number)).store(place(number) as u64, Ordering::Relaxed);
    }
    let mut turn = 0;
    while context.step(Duration::from_millis(10))? {
        if context.progress.plant() {
            map.word(place(turn % USED)).fetch_add(1, Ordering::Relaxed);
        }
        for number in 0..USED {
            let word = map.word(place(number)).load(Ordering::Relaxed);
            same("a page far away", word, place(number) as u64)?;
        }
        // One that was never used holds zeros.
        let other = mix(turn as u64 ^ 0xabcd) as usize % PAGES * PAGE_WORDS + 1;
        same("a page in between", map.word(other).load(Ordering::Relaxed), 0)?;
        turn += 1;
    }
    Ok(())
}

/// Areas that cannot be joined, as many as a large Java or database process has.
pub(super) fn areas(context: &mut Context) -> Result<(), Failure> {
    const AREAS: usize = 3000;
    let map = Map::new(AREAS * 2, Backing::Private)?;
    for area in 0..AREAS {
        map.word(area * 2 * PAGE_WORDS).store(mix(area as u64), Ordering::Relaxed);
        map.set_accessible(area * 2 + 1, 1, false)?;
    }
    let mut turn = 0;
    while context.step(Duration::from_millis(10))? {
        if context.progress.plant() {
            map.word(turn % AREAS * 2 * PAGE_WORDS).fetch_add(1, Ordering::Relaxed);
        }
        for area in 0..AREAS {
            let word = map.word(area * 2 * PAGE_WORDS).load(Ordering::Relaxed);
            same("the page of an area", word, mix(area as u64))?;
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

/// Huge pages stay huge, while they are only read.
pub(super) fn huge(context: &mut Context) -> Result<(), Failure> {
    const HUGE: usize = 512;
    const COUNT: usize = 8;
    let map = Map::new(HUGE * (COUNT + 1), Backing::Private)?;
    map.advise(Advice::HugePage)?;
    let fill = |page: usize| mix(page as u64) | 1;
    for page in 0..HUGE * (COUNT + 1) {
        map.word(page * PAGE_WORDS).store(fill(page), Ordering::Relaxed);
    }
    let start = huge_kib(&map)?;
    ensure(start >= 2048, || "no huge page is to be had".to_owned())?;
    let mut turn = 0u64;
    while context.step(Duration::from_millis(20))? {
        turn += 1;
        let page = mix(turn) as usize % (HUGE * COUNT);
        if context.progress.plant() {
            map.word(page * PAGE_WORDS).store(0, Ordering::Relaxed);
        }
        let word = map.word(page * PAGE_WORDS).load(Ordering::Relaxed);
        same("a page of a huge one", word, fill(page))?;
        if turn.is_multiple_of(20) {
            let now = huge_kib(&map)?;
            // The kernel may split one for its own reasons.
            ensure(now * 2 >= start, || format!("of {start} KiB in huge pages {now} are left"))?;
        }
    }
    Ok(())
}

fn huge_kib(map: &Map) -> Result<u64, Failure> {
    let smaps = std::fs::read_to_string("/proc/self/smaps")?;
    let start = format!("{:x}-", map.address());
    let area = smaps.split_once(&start).map_or("", |(_, area)| area);
    let line = area.lines().find_map(|line| line.strip_prefix("AnonHugePages:"));
    let number = line.and_then(|line| line.split_whitespace().next()?.parse().ok());
    number.ok_or_else(|| Failure::new("the map is no area of its own"))
}

/// A map that grows downwards when it is touched below its end.
pub(super) fn growing_down(context: &mut Context) -> Result<(), Failure> {
    const PAGES: usize = 64;
    let map = Map::new(PAGES, Backing::GrowingDown)?;
    for page in 0..PAGES {
        map.word(page * PAGE_WORDS).store(mix(page as u64), Ordering::Relaxed);
    }
    let look = || {
        let smaps = std::fs::read_to_string("/proc/self/smaps")?;
        let areas = ckpt_engine::procfs::parse_smaps(&smaps);
        let area = areas.iter().rfind(|(line, _)| line.start <= map.address() as u64);
        let sum = (0..PAGES).fold(0u64, |sum, page| {
            sum.wrapping_add(map.word(page * PAGE_WORDS).load(Ordering::Relaxed))
        });
        Ok((area.is_some_and(|(_, flags)| flags.grows_down), sum))
    };
    crate::workload::keep::keep(context, "a map that grows downwards", look, || {
        map.word(0).fetch_add(1, Ordering::Relaxed);
        Ok(())
    })
}
