//! System V shared memory.

use std::sync::atomic::Ordering::SeqCst;
use std::time::Duration;

use ckpt_engine::sys::program::map::PAGE_BYTES;
use ckpt_engine::sys::program::sysv::{self, Attached};
use nix::unistd::{getegid, geteuid};

use super::key;
use crate::workload::context::Context;
use crate::workload::outcome::{Failure, ensure, same};
use crate::workload::process::Child;

const PAGES: usize = 16;
const BYTES: usize = PAGES * PAGE_BYTES;
const WORDS: usize = BYTES / 8;

/// A segment that goes with the workload.
pub(in crate::workload) struct Segment(i32);

impl Segment {
    /// One of huge pages.
    pub(in crate::workload) fn of_huge_pages(number: i32, bytes: usize) -> Result<Self, Failure> {
        let made = sysv::segment_of_huge_pages(key(number), bytes, 0o600);
        made.map(Self).map_err(|error| {
            let hint = "vm.nr_hugepages, and vm.hugetlb_shm_group for root of the VE";
            Failure::new(format!("the host gives no huge pages ({hint}): {error}"))
        })
    }

    pub(in crate::workload) fn number(&self) -> i32 {
        self.0
    }

    fn new(number: i32, bytes: usize, mode: i32) -> Result<Self, Failure> {
        Ok(Self(sysv::segment(key(number), bytes, Some(mode))?))
    }

    /// Attached for reading and writing, where it has this size.
    pub(in crate::workload) fn attach(&self, bytes: usize) -> Result<Attached, Failure> {
        Ok(Attached::new(self.0, bytes, false)?)
    }
}

impl Drop for Segment {
    fn drop(&mut self) {
        // It may have been removed already.
        let _ = sysv::remove_segment(self.0);
    }
}

pub(in crate::workload) fn shared(context: &mut Context) -> Result<(), Failure> {
    let segment = Segment::new(1, BYTES, 0o600)?;
    let id = segment.0;
    let child = Child::start(context, "brother", |stop| {
        let theirs = Attached::new(id, BYTES, false)?;
        let mut turn = 0;
        while !stop.wait(Duration::from_millis(3))? {
            turn += 1;
            let word = turn as usize * 61 % (WORDS / 2) * 2 + 1;
            theirs.word(word).store(turn, SeqCst);
            theirs.word(1).store(turn, SeqCst);
        }
        Ok(())
    })?;
    // Not before: a child has what its parent had attached.
    let ours = segment.attach(BYTES)?;
    let mut turn = 0;
    let mut seen = 0;
    while context.step(Duration::from_millis(5))? {
        child.check()?;
        for word in (2..WORDS).step_by(2) {
            let expected = if turn == 0 { 0 } else { turn + word as u64 };
            same("a word of a segment", ours.word(word).load(SeqCst), expected)?;
        }
        turn += 1;
        (2..WORDS).step_by(2).for_each(|word| ours.word(word).store(turn + word as u64, SeqCst));
        let now = ours.word(1).load(SeqCst);
        ensure(now >= seen, || format!("a brother's word went back from {seen} to {now}"))?;
        seen = now;
        if seen > 0 {
            same("how often it is attached", sysv::segment_state(id)?.attached, 2)?;
        }
        if context.progress.plant() {
            ours.word(4).store(9, SeqCst);
        }
    }
    ensure(seen > 0, || "the brother never wrote".to_owned())?;
    child.finish()
}

pub(in crate::workload) fn detached(context: &mut Context) -> Result<(), Failure> {
    let segment = Segment::new(2, BYTES, 0o600)?;
    let mut turn = 0u64;
    while context.step(Duration::from_millis(15))? {
        same("how often it is attached", sysv::segment_state(segment.0)?.attached, 0)?;
        let now = segment.attach(BYTES)?;
        let right = (0..WORDS).all(|word| now.word(word).load(SeqCst) == turn * word as u64);
        ensure(right, || "a segment that nobody had has changed".to_owned())?;
        turn += 1;
        (0..WORDS).for_each(|word| now.word(word).store(turn * word as u64, SeqCst));
        if context.progress.plant() {
            now.word(77).store(1, SeqCst);
        }
    }
    Ok(())
}

pub(in crate::workload) fn removed(context: &mut Context) -> Result<(), Failure> {
    let segment = Segment::new(3, BYTES, 0o600)?;
    let ours = segment.attach(BYTES)?;
    sysv::remove_segment(segment.0)?;
    let mut turn = 0;
    while context.step(Duration::from_millis(8))? {
        let found = sysv::segment(key(3), BYTES, None).map_err(|error| error.raw_os_error());
        same("the key of a removed segment", found, Err(Some(libc::ENOENT)))?;
        let state = sysv::segment_state(segment.0)?;
        const SHM_DEST: u32 = 0o1000;
        same("its mode", state.mode & (SHM_DEST | 0o777), SHM_DEST | 0o600)?;
        same("how often it is attached", state.attached, 1)?;
        let place = (turn as usize * 127) % WORDS;
        same("a word of it", ours.word(place).swap(turn, SeqCst), expected(turn, place))?;
        turn += 1;
        if context.progress.plant() {
            (0..WORDS).for_each(|word| ours.word(word).store(u64::MAX, SeqCst));
        }
    }
    drop(ours);
    let gone = sysv::segment_state(segment.0).map_err(|error| error.raw_os_error());
    ensure(matches!(gone, Err(Some(libc::EINVAL | libc::EIDRM))), || {
        format!("a removed segment that nobody has is there: {gone:?}")
    })
}

/// What the word at this place was set to when it was last its turn.
fn expected(turn: u64, place: usize) -> u64 {
    let last = (0..turn).rev().take(WORDS).find(|before| (*before as usize * 127) % WORDS == place);
    last.unwrap_or(0)
}

pub(super) fn part(context: &mut Context) -> Result<(), Failure> {
    let segment = Segment::new(4, BYTES, 0o600)?;
    let whole = segment.attach(BYTES)?;
    let mut part = segment.attach(BYTES)?;
    part.shorten(3)?;
    let reader = Attached::new(segment.0, BYTES, true)?;
    let place = format!("{:x}-", reader.address());
    let mut turn = 0;
    while context.step(Duration::from_millis(8))? {
        turn += 1;
        whole.word(1000).store(turn, SeqCst);
        same("a word seen through a part", part.word(1000).load(SeqCst), turn)?;
        part.word(5).store(turn, SeqCst);
        if context.progress.plant() {
            whole.word(5).store(0, SeqCst);
        }
        same("a word seen by a reader", reader.word(5).load(SeqCst), turn)?;
        same("how often it is attached", sysv::segment_state(segment.0)?.attached, 3)?;
        let maps = std::fs::read_to_string("/proc/self/maps")?;
        let line = maps.lines().find(|line| line.starts_with(&place));
        let readable = line.is_some_and(|line| line.contains(" r--s "));
        ensure(readable, || format!("a segment attached for reading: {line:?}"))?;
    }
    Ok(())
}

pub(super) fn names(context: &mut Context) -> Result<(), Failure> {
    let make = |number: i32| Segment::new(10 + number, 1000 * (number as usize + 1), 0o640);
    let segments = (0..8).map(make).collect::<Result<Vec<_>, _>>()?;
    let (user, group) = (geteuid().as_raw(), getegid().as_raw());
    while context.step(Duration::from_millis(10))? {
        if context.progress.plant() {
            sysv::remove_segment(segments[5].0)?;
        }
        for (number, segment) in segments.iter().enumerate() {
            let number = number as i32;
            same("a segment by its key", sysv::segment(key(10 + number), 0, None)?, segment.0)?;
            let state = sysv::segment_state(segment.0)?;
            same("its size", state.bytes, 1000 * (number as usize + 1))?;
            same("its mode", state.mode & 0o777, 0o640)?;
            same("its owners", state.owners, [user, group, user, group])?;
            same("its key", state.key, key(10 + number))?;
        }
    }
    Ok(())
}
