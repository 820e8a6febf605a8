//! What was asked of the kernel for a part of memory.

use std::sync::atomic::Ordering;
use std::time::Duration;

use ckpt_engine::procfs::{parse_maps, parse_smaps};
use ckpt_engine::sys::program::advice::{Advice, Lock, lock_future};
use ckpt_engine::sys::program::fork::fork;
use ckpt_engine::sys::program::map::{Backing, Map, PAGE_BYTES};
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::Pid;

use crate::client::record::mix;
use crate::workload::context::Context;
use crate::workload::keep::keep;
use crate::workload::outcome::{Failure, ensure, same};

const PAGES: usize = 64;
const PAGE_WORDS: usize = PAGE_BYTES / 8;

/// A map with a pattern in it, apart from all others.
fn patterned(backing: Backing<'_>) -> Result<Map, Failure> {
    let map = Map::new(PAGES, backing)?;
    for page in 0..PAGES {
        map.word(page * PAGE_WORDS).store(mix(page as u64), Ordering::Relaxed);
    }
    Ok(map)
}

fn check(map: &Map) -> Result<(), Failure> {
    for page in 0..PAGES {
        let found = map.word(page * PAGE_WORDS).load(Ordering::Relaxed);
        same("a page", found, mix(page as u64))?;
    }
    Ok(())
}

/// What smaps shows of the area that begins where the map does.
fn flags(map: &Map) -> Result<String, Failure> {
    let smaps = std::fs::read_to_string("/proc/self/smaps")?;
    let start = map.address() as u64;
    let found = parse_smaps(&smaps).into_iter().find(|(line, _)| line.start == start);
    let (_, flags) = found.ok_or_else(|| Failure::new("the map is no area of its own"))?;
    Ok(format!("{flags:?}"))
}

/// Each piece of advice on a map of its own, with unadvised memory around it.
pub(super) fn kinds(context: &mut Context) -> Result<(), Failure> {
    let all = [
        Advice::DontFork,
        Advice::DontDump,
        Advice::WipeOnFork,
        Advice::HugePage,
        Advice::NoHugePage,
        Advice::Mergeable,
        Advice::Sequential,
        Advice::Random,
    ];
    let mut maps = Vec::new();
    for advice in all {
        let map = patterned(Backing::Private)?;
        map.advise(advice)?;
        maps.push((map, patterned(Backing::Private)?));
    }
    let look = || {
        maps.iter()
            .map(|(map, _)| check(map).and_then(|()| flags(map)))
            .collect::<Result<Vec<_>, _>>()
    };
    keep(context, "advice", look, || Ok(maps[0].0.advise(Advice::DontDump)?))
}

/// What a child gets of memory that is not for it: nothing, or zeros.
pub(super) fn across_fork(context: &mut Context) -> Result<(), Failure> {
    let kept_back = patterned(Backing::Private)?;
    kept_back.advise(Advice::DontFork)?;
    let wiped = patterned(Backing::Private)?;
    wiped.advise(Advice::WipeOnFork)?;
    let plain = patterned(Backing::Private)?;
    while context.step(Duration::from_millis(20))? {
        if context.progress.plant() {
            plain.word(0).fetch_add(1, Ordering::Relaxed);
        }
        let child = Pid::from_raw(fork(|| {
            let is_wiped =
                (0..PAGES).all(|page| wiped.word(page * PAGE_WORDS).load(Ordering::Relaxed) == 0);
            let maps = std::fs::read_to_string("/proc/self/maps").unwrap_or_default();
            let start = kept_back.address() as u64;
            let is_there =
                parse_maps(&maps).iter().any(|line| line.start <= start && start < line.end);
            i32::from(!is_wiped) + 2 * i32::from(is_there) + 4 * i32::from(check(&plain).is_err())
        })?);
        same("what a child sees", waitpid(child, None)?, WaitStatus::Exited(child, 0))?;
        check(&kept_back)?;
        check(&wiped)?;
    }
    Ok(())
}

/// Memory that is locked: at once, as it is used, and all that is to come.
pub(super) fn locked(context: &mut Context) -> Result<(), Failure> {
    let now = patterned(Backing::Private)?;
    now.lock(Lock::Now)?;
    let later = Map::new(PAGES, Backing::Private)?;
    later.word(0).store(1, Ordering::Relaxed);
    later.lock(Lock::OnFault)?;
    let look = || Ok((flags(&now)?, flags(&later)?));
    keep(context, "locks", look, || Ok(later.unlock()?))
}

pub(super) fn locked_future(context: &mut Context) -> Result<(), Failure> {
    lock_future(true)?;
    let look = || {
        let map = patterned(Backing::Private)?;
        check(&map)?;
        let smaps = std::fs::read_to_string("/proc/self/smaps")?;
        let start = map.address() as u64;
        // It may be joined with what is before it.
        let before = parse_smaps(&smaps).into_iter().rfind(|(line, _)| line.start <= start);
        Ok(before.is_some_and(|(_, flags)| flags.advice.locked))
    };
    keep(context, "whether new memory is locked", look, || Ok(lock_future(false)?))
}

/// Memory that is sealed: nobody can unmap, protect or move it.
pub(super) fn sealed(context: &mut Context) -> Result<(), Failure> {
    let map = patterned(Backing::Private)?.seal()?;
    let look = || {
        check(map)?;
        let refused = map.set_accessible(0, 1, false).err().and_then(|error| error.raw_os_error());
        Ok((flags(map)?, refused))
    };
    keep(context, "a seal", look, || {
        map.word(0).fetch_add(1, Ordering::Relaxed);
        Ok(())
    })
}

/// Memory that the kernel may take away; while there is enough it does not.
pub(super) fn droppable(context: &mut Context) -> Result<(), Failure> {
    let map = patterned(Backing::Droppable)?;
    while context.step(Duration::from_millis(20))? {
        if context.progress.plant() {
            map.word(0).fetch_add(1, Ordering::Relaxed);
        }
        ensure(flags(&map)?.contains("droppable: true"), || {
            "the map is an ordinary one".to_owned()
        })?;
        for page in 0..PAGES {
            let found = map.word(page * PAGE_WORDS).load(Ordering::Relaxed);
            // Dropped or kept, never anything else.
            ensure(found == 0 || found == mix(page as u64), || format!("page {page}: {found:#x}"))?;
            map.word(page * PAGE_WORDS).store(mix(page as u64), Ordering::Relaxed);
        }
    }
    Ok(())
}

/// Guards in the middle of memory, which come and go.
pub(super) fn guards(context: &mut Context) -> Result<(), Failure> {
    let mut map = patterned(Backing::Private)?;
    map.guard(8, 4)?;
    map.guard(40, 1)?;
    let mut turn = 0u64;
    while context.step(Duration::from_millis(20))? {
        turn += 1;
        for page in (0..8).chain(12..40).chain(41..PAGES) {
            let found = map.word(page * PAGE_WORDS).load(Ordering::Relaxed);
            same("a page beside guards", found, mix(page as u64))?;
        }
        if context.progress.plant() {
            map.unguard(8, 4)?;
        }
        for page in [8, 11, 40] {
            touch_ends(&map, page)?;
        }
        if turn.is_multiple_of(10) {
            map.unguard(40, 1)?;
            same("a page that was guarded", map.word(40 * PAGE_WORDS).load(Ordering::Relaxed), 0)?;
            map.guard(40, 1)?;
        }
    }
    Ok(())
}

/// A child that touches a guard is ended by the kernel.
fn touch_ends(map: &Map, page: usize) -> Result<(), Failure> {
    let child = Pid::from_raw(fork(|| {
        let _ = nix::sys::resource::setrlimit(nix::sys::resource::Resource::RLIMIT_CORE, 0, 0);
        i32::try_from(map.word(page * PAGE_WORDS).load(Ordering::Relaxed)).unwrap_or(1)
    })?);
    let ended = waitpid(child, None)?;
    let by_signal = matches!(ended, WaitStatus::Signaled(_, nix::sys::signal::Signal::SIGSEGV, _));
    ensure(by_signal, || format!("the guard at page {page} let a read through: {ended:?}"))
}
