//! Huge pages that are set aside for those who ask for them.

use std::fs::File;
use std::os::fd::AsFd;
use std::sync::atomic::Ordering::SeqCst;
use std::time::Duration;

use ckpt_engine::sys::program::map::{Backing, HUGE_PAGES, Map, PAGE_BYTES};
use ckpt_engine::sys::program::sysv;
use ckpt_engine::sys::task::memfd_of_huge_pages;
use nix::fcntl::{FcntlArg, SealFlag, fcntl};

use crate::client::record::mix;
use crate::workload::context::Context;
use crate::workload::ipc::key;
use crate::workload::ipc::segments::Segment;
use crate::workload::outcome::{Failure, ensure, same};
use crate::workload::process::Child;

const HUGE_BYTES: usize = HUGE_PAGES * PAGE_BYTES;
const HUGE_WORDS: usize = HUGE_BYTES / 8;
/// How many words are in use, all over a huge page.
const USED: usize = 300;

fn make(pages: usize, backing: Backing<'_>) -> Result<Map, Failure> {
    Map::new(pages * HUGE_PAGES, backing).map_err(|error| {
        Failure::new(format!("the host has no huge pages to give (vm.nr_hugepages): {error}"))
    })
}

/// Fails unless the area that begins there has huge pages.
fn is_huge(address: usize) -> Result<(), Failure> {
    let smaps = std::fs::read_to_string("/proc/self/smaps")?;
    let start = format!("{address:x}-");
    let area = smaps.lines().skip_while(|line| !line.starts_with(&start));
    let size = area.take(4).find_map(|line| line.strip_prefix("KernelPageSize:"));
    same("the size of its pages", size.map(str::trim), Some("2048 kB"))
}

/// A word that is in use.
fn place(number: usize) -> usize {
    mix(number as u64) as usize % HUGE_WORDS
}

pub(super) fn private(context: &mut Context) -> Result<(), Failure> {
    let map = make(2, Backing::Huge)?;
    // Of the two, the second cannot be reached except now and then.
    map.word(HUGE_WORDS + 5).store(55, SeqCst);
    let mut turn = 0u64;
    while context.step(Duration::from_millis(10))? {
        for number in 0..USED {
            let expected = if turn == 0 { 0 } else { turn ^ place(number) as u64 };
            same("a word of a huge page", map.word(place(number)).load(SeqCst), expected)?;
        }
        turn += 1;
        (0..USED).for_each(|it| map.word(place(it)).store(turn ^ place(it) as u64, SeqCst));
        if context.progress.plant() {
            map.word(place(7)).store(1, SeqCst);
        }
        map.set_accessible(HUGE_PAGES, HUGE_PAGES, true)?;
        same("a word of the other page", map.word(HUGE_WORDS + 5).load(SeqCst), 55)?;
        map.set_accessible(HUGE_PAGES, HUGE_PAGES, false)?;
        is_huge(map.address())?;
    }
    Ok(())
}

pub(super) fn shared(context: &mut Context) -> Result<(), Failure> {
    let map = make(1, Backing::HugeShared)?;
    let child = Child::start(context, "brother", |stop| {
        while !stop.wait(Duration::from_millis(2))? {
            let asked = map.word(1).load(SeqCst);
            map.word(HUGE_WORDS - 1).store(asked, SeqCst);
        }
        Ok(())
    })?;
    let (mut turn, mut answered) = (0u64, 0);
    while context.step(Duration::from_millis(8))? {
        child.check()?;
        for number in 0..USED {
            let expected = if turn == 0 { 0 } else { turn + number as u64 };
            let word = 2 + number * 800;
            same("a word of common memory", map.word(word).load(SeqCst), expected)?;
        }
        turn += 1;
        for number in 0..USED {
            map.word(2 + number * 800).store(turn + number as u64, SeqCst);
        }
        map.word(1).store(turn, SeqCst);
        let now = map.word(HUGE_WORDS - 1).load(SeqCst);
        ensure(now >= answered && now <= turn, || format!("{now} came after {answered}"))?;
        answered = now;
        if context.progress.plant() {
            map.word(2).store(9, SeqCst);
        }
        is_huge(map.address())?;
    }
    ensure(answered > 0, || "the brother never answered".to_owned())?;
    child.finish()
}

pub(super) fn file(context: &mut Context) -> Result<(), Failure> {
    let file = File::from(memfd_of_huge_pages("selfcheck", HUGE_BYTES as u64)?);
    file.set_len(HUGE_BYTES as u64)?;
    let map = make(1, Backing::FileShared(file.as_fd()))?;
    map.word(900).store(1, SeqCst);
    let own = make(1, Backing::FilePrivate(file.as_fd()))?;
    // From here on it is a copy.
    own.word(900).store(2, SeqCst);
    let seals = SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW;
    fcntl(&file, FcntlArg::F_ADD_SEALS(seals))?;
    let mut turn = 2;
    while context.step(Duration::from_millis(8))? {
        turn += 1;
        for number in 0..USED {
            let expected = if turn == 3 { 0 } else { turn - 1 };
            let word = 1000 + number * 700;
            same("a word of a file", map.word(word).load(SeqCst), expected)?;
            map.word(word).store(turn, SeqCst);
        }
        if context.progress.plant() {
            own.word(900).store(7, SeqCst);
        }
        same("a word of the file", map.word(900).load(SeqCst), 1)?;
        same("a word of a copy", own.word(900).load(SeqCst), 2)?;
        same("its seals", fcntl(&file, FcntlArg::F_GET_SEALS)?, seals.bits())?;
        same("its size", file.metadata()?.len(), HUGE_BYTES as u64)?;
        is_huge(map.address())?;
        is_huge(own.address())?;
    }
    Ok(())
}

/// Two segments: of one only a part is attached, of the other nothing most of the time.
pub(super) fn segments(context: &mut Context) -> Result<(), Failure> {
    // Not a whole huge page: the kernel makes it one.
    let bytes = HUGE_BYTES - 5000;
    let whole = Segment::of_huge_pages(20, HUGE_BYTES + bytes)?;
    let rest = Segment::of_huge_pages(21, bytes)?;
    let mut map = whole.attach(2 * HUGE_BYTES)?;
    map.word(HUGE_WORDS + 1).store(77, SeqCst);
    map.shorten(HUGE_PAGES)?;
    let mut turn = 0u64;
    while context.step(Duration::from_millis(10))? {
        let other = rest.attach(HUGE_BYTES)?;
        for number in 0..USED {
            let expected = if turn == 0 { 0 } else { turn ^ number as u64 };
            let word = number * 800;
            same("a word of a segment", map.word(word).load(SeqCst), expected)?;
            same("a word of what nobody had", other.word(word).load(SeqCst), expected)?;
            map.word(word).store((turn + 1) ^ number as u64, SeqCst);
            other.word(word).store((turn + 1) ^ number as u64, SeqCst);
        }
        turn += 1;
        if context.progress.plant() {
            other.word(800).store(9, SeqCst);
        }
        drop(other);
        let again = whole.attach(2 * HUGE_BYTES)?;
        same("a word behind what is attached", again.word(HUGE_WORDS + 1).load(SeqCst), 77)?;
        drop(again);
        same("its size", sysv::segment_state(whole.number())?.bytes, HUGE_BYTES + bytes)?;
        same("how often it is attached", sysv::segment_state(whole.number())?.attached, 1)?;
        same("its number", sysv::segment(key(20), 0, None)?, whole.number())?;
        is_huge(map.address())?;
    }
    Ok(())
}

pub(super) fn family(context: &mut Context) -> Result<(), Failure> {
    let map = make(1, Backing::Huge)?;
    (0..USED).for_each(|it| map.word(place(it)).store(it as u64, SeqCst));
    let child = Child::start(context, "heir", |stop| {
        let mut turn = 0;
        while !stop.wait(Duration::from_millis(10))? {
            for number in 1..USED {
                let word = map.word(place(number)).load(SeqCst);
                same("what a child has of its parent", word, number as u64)?;
            }
            // Now it has a page of its own.
            let written = map.word(place(0)).swap(turn + 1, SeqCst);
            same("a word of its own", written, turn)?;
            turn += 1;
        }
        Ok(())
    })?;
    while context.step(Duration::from_millis(10))? {
        child.check()?;
        for number in 0..USED {
            let word = map.word(place(number)).load(SeqCst);
            same("a word of a parent", word, number as u64)?;
        }
        is_huge(map.address())?;
        if context.progress.plant() {
            map.word(place(3)).store(0, SeqCst);
        }
    }
    child.finish()
}
