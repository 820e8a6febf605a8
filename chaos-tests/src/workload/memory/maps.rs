//! Maps of every kind, and maps that come, go and move.

use std::collections::VecDeque;
use std::fs::File;
use std::io::Write;
use std::os::fd::AsFd;
use std::sync::atomic::Ordering;
use std::time::Duration;

use ckpt_engine::sys::program::map::{Backing, Map, PAGE_BYTES};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::unistd::ftruncate;

use crate::client::record::mix;
use crate::workload::context::Context;
use crate::workload::outcome::{Failure, ensure, same};
use crate::workload::process::Child;

const PAGE_WORDS: usize = PAGE_BYTES / 8;
const PAGES: usize = 16;

/// Long-lived maps: of files, of a memfd, shared with a child, and with a guard page.
pub(super) fn kinds(context: &mut Context) -> Result<(), Failure> {
    let shared = Map::new(PAGES, Backing::Shared)?;
    let memfd = memfd_create("selfcheck", MFdFlags::MFD_CLOEXEC)?;
    ftruncate(&memfd, (PAGES * PAGE_BYTES) as i64)?;
    let memfd_shared = Map::new(PAGES, Backing::FileShared(memfd.as_fd()))?;
    let memfd_private = Map::new(PAGES, Backing::FilePrivate(memfd.as_fd()))?;
    let file = pattern_file(context)?;
    let file_private = Map::new(PAGES, Backing::FilePrivate(file.as_fd()))?;
    let file_shared = Map::new(PAGES, Backing::FileShared(file.as_fd()))?;
    let guarded = Map::new(PAGES, Backing::Private)?;
    guarded.word(0).store(7, Ordering::SeqCst);
    guarded.set_accessible(1, PAGES - 1, false)?;
    // Words 0 belong to the parent, words 1 to the child; each follows the other by one.
    let child = Child::start(context, "maps", |stop| {
        while !stop.wait(Duration::from_millis(1))? {
            for map in [&shared, &memfd_shared, &file_shared] {
                map.word(1).store(map.word(0).load(Ordering::SeqCst), Ordering::SeqCst);
            }
        }
        Ok(())
    })?;
    // The private pages are copied on the first write; the file must never show them.
    memfd_private.word(0).store(99, Ordering::SeqCst);
    file_private.word(0).store(99, Ordering::SeqCst);
    let mut turn = 0;
    while context.step(Duration::from_millis(5))? {
        child.check()?;
        for (name, map) in [("shared", &shared), ("memfd", &memfd_shared), ("file", &file_shared)] {
            let (own, echo) =
                (map.word(0).load(Ordering::SeqCst), map.word(1).load(Ordering::SeqCst));
            same(&format!("own word of {name} memory"), own, turn)?;
            ensure(echo <= own && own - echo <= 2000, || {
                format!("{name}: child says {echo} of {own}")
            })?;
            map.word(0).store(turn + 1, Ordering::SeqCst);
        }
        turn += 1;
        same("private page of a memfd", memfd_private.word(0).load(Ordering::SeqCst), 99)?;
        same("private page of a file", file_private.word(0).load(Ordering::SeqCst), 99)?;
        for page in 1..PAGES {
            let found = file_private.word(page * PAGE_WORDS).load(Ordering::SeqCst);
            same("page of a file", found, mix(page as u64))?;
        }
        same("memory before a guard page", guarded.word(0).load(Ordering::SeqCst), 7)?;
        if turn % 50 == 0 {
            check_guard(&guarded)?;
        }
        if context.progress.plant() {
            memfd_shared.word(0).fetch_add(100_000, Ordering::SeqCst);
        }
    }
    child.finish()
}

/// The kernel itself refuses to read from an inaccessible page.
fn check_guard(map: &Map) -> Result<(), Failure> {
    let memory = File::open("/proc/self/mem")?;
    let mut byte = [0];
    let at = |page: usize| (map.address() + page * PAGE_BYTES) as u64;
    // Reads through /proc/self/mem ignore the protection, so ask what the map says.
    std::os::unix::fs::FileExt::read_exact_at(&memory, &mut byte, at(0))?;
    let maps = std::fs::read_to_string("/proc/self/maps")?;
    let wanted = format!("{:x}-", at(1));
    let guard = maps.lines().find(|line| line.starts_with(&wanted));
    ensure(guard.is_some_and(|line| line.contains(" ---p ")), || {
        format!("the guard pages are {guard:?}")
    })
}

fn pattern_file(context: &Context) -> Result<File, Failure> {
    let path = context.path("pattern");
    let mut file = File::options().read(true).write(true).create_new(true).open(path)?;
    for page in 0..PAGES as u64 {
        let mut content = vec![0; PAGE_BYTES];
        if page > 0 {
            content[..8].copy_from_slice(&mix(page).to_le_bytes());
        }
        file.write_all(&content)?;
    }
    Ok(file)
}

/// Maps that are made, resized, discarded and removed; a stack that grows; a heap that breathes.
pub(super) fn churn(context: &mut Context) -> Result<(), Failure> {
    let mut maps: VecDeque<(Map, u64)> = VecDeque::new();
    let mut heap: VecDeque<(u64, Vec<u64>)> = VecDeque::new();
    let mut random = 3;
    while context.step(Duration::from_millis(3))? {
        random = mix(random);
        let pages = 1 + random as usize % 200;
        let map = Map::new(pages, Backing::Private)?;
        stamp(&map, random);
        maps.push_back((map, random));
        if random % 3 == 0
            && let Some((map, seed)) = maps.front_mut()
        {
            let pages = 1 + mix(random) as usize % 300;
            let before = map.words() / PAGE_WORDS;
            map.resize(pages).map_err(|error| Failure::new(torn(map, &error)))?;
            check_stamp(map, *seed, before.min(pages))?;
            stamp(map, *seed);
        }
        if random % 7 == 0
            && let Some((map, seed)) = maps.back_mut()
        {
            map.discard()?;
            same("discarded memory", map.word(0).load(Ordering::Relaxed), 0)?;
            stamp(map, *seed);
        }
        if maps.len() > 40
            && let Some((map, seed)) = maps.pop_front()
        {
            check_stamp(&map, seed, map.words() / PAGE_WORDS)?;
        }
        heap.push_back((random, vec![random; 1 + random as usize % 5000]));
        if context.progress.plant()
            && let Some((_, words)) = heap.front_mut()
        {
            words[0] ^= 1;
        }
        if heap.len() > 100
            && let Some((seed, words)) = heap.pop_front()
        {
            ensure(words.iter().all(|word| *word == seed), || "the heap changed".to_owned())?;
        }
        let depth = 1 + random % 400;
        same("sums down a deep stack", descend(depth), depth * (depth + 1) / 2)?;
    }
    Ok(())
}

/// Which areas the kernel has where a map should be one.
fn torn(map: &Map, error: &std::io::Error) -> String {
    let (start, end) = (map.address(), map.address() + map.words() * 8);
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap_or_default();
    let touches = |line: &&str| {
        let number = |text| usize::from_str_radix(text, 16).ok();
        let bounds = line.split(' ').next().and_then(|range| range.split_once('-'));
        let bounds = bounds.and_then(|(from, to)| Some((number(from)?, number(to)?)));
        bounds.is_some_and(|(from, to)| from <= end && to >= start)
    };
    let areas: Vec<&str> = maps.lines().filter(touches).map(str::trim_end).collect();
    format!("a map at {start:x}-{end:x} cannot be resized: {error}; areas: {areas:?}")
}

fn stamp(map: &Map, seed: u64) {
    for page in 0..map.words() / PAGE_WORDS {
        map.word(page * PAGE_WORDS).store(mix(seed ^ page as u64), Ordering::Relaxed);
    }
}

fn check_stamp(map: &Map, seed: u64, pages: usize) -> Result<(), Failure> {
    for page in 0..pages {
        let found = map.word(page * PAGE_WORDS).load(Ordering::Relaxed);
        same("a page of a map that was moved", found, mix(seed ^ page as u64))?;
    }
    Ok(())
}

/// Uses about a page of stack for each level.
#[inline(never)]
fn descend(depth: u64) -> u64 {
    let room = std::hint::black_box([depth; 500]);
    if depth == 0 { 0 } else { room[499] + descend(depth - 1) }
}
