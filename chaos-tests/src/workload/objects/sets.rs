//! epoll sets whose entries are more than what descriptors show.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::time::Duration;

use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::eventfd::{EfdFlags, EventFd};

use crate::workload::context::Context;
use crate::workload::outcome::{Failure, ensure, same};
use crate::workload::process::Child;

fn set() -> Result<Epoll, Failure> {
    Ok(Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?)
}

fn counter(count: u32) -> Result<EventFd, Failure> {
    let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
    Ok(EventFd::from_value_and_flags(count, flags)?)
}

/// The data of what is ready now, sorted.
fn ready(epoll: &Epoll) -> Result<Vec<u64>, Failure> {
    let mut events = [EpollEvent::empty(); 32];
    let count = epoll.wait(&mut events, EpollTimeout::ZERO)?;
    let mut found: Vec<u64> = events[..count].iter().map(EpollEvent::data).collect();
    found.sort_unstable();
    Ok(found)
}

pub(super) fn numbers(context: &mut Context) -> Result<(), Failure> {
    let epoll = set()?;
    let input = EpollFlags::EPOLLIN;
    // Added under a number that is closed, while another number keeps the file alive.
    let first = counter(1)?;
    let number = first.as_fd().as_raw_fd();
    let first_kept = first.as_fd().try_clone_to_owned()?;
    epoll.add(&first, EpollEvent::new(input, 10))?;
    drop(first);
    // The number names another file by now, which is added, too.
    let second = counter(1)?;
    same("a number that was free", second.as_fd().as_raw_fd(), number)?;
    epoll.add(&second, EpollEvent::new(input, 20))?;
    // One file under two numbers.
    let twin = second.as_fd().try_clone_to_owned()?;
    epoll.add(&twin, EpollEvent::new(input, 21))?;
    let (mut first_kept, second) = (File::from(first_kept), File::from(OwnedFd::from(second)));
    let mut second = second;
    while context.step(Duration::from_millis(8))? {
        if context.progress.plant() {
            epoll.delete(&twin)?;
        }
        same("ready of all", ready(&epoll)?, vec![10, 20, 21])?;
        let mut count = [0; 8];
        first_kept.read_exact(&mut count)?;
        same("ready without the first", ready(&epoll)?, vec![20, 21])?;
        second.read_exact(&mut count)?;
        same("ready of none", ready(&epoll)?, Vec::new())?;
        first_kept.write_all(&1u64.to_ne_bytes())?;
        second.write_all(&1u64.to_ne_bytes())?;
    }
    Ok(())
}

pub(super) fn deep(context: &mut Context) -> Result<(), Failure> {
    let counter = counter(0)?;
    let sets = (0..4).map(|_| set()).collect::<Result<Vec<_>, _>>()?;
    let input = EpollFlags::EPOLLIN;
    sets[0].add(&counter, EpollEvent::new(input, 100))?;
    for level in 1..4 {
        sets[level].add(&sets[level - 1].0, EpollEvent::new(input, level as u64))?;
    }
    while context.step(Duration::from_millis(8))? {
        for epoll in &sets {
            same("ready of none", ready(epoll)?, Vec::new())?;
        }
        counter.write(1)?;
        for (level, epoll) in sets.iter().enumerate().rev() {
            let expected = if level == 0 { 100 } else { level as u64 };
            same("ready at a level", ready(epoll)?, vec![expected])?;
        }
        if context.progress.plant() {
            sets[2].delete(&sets[1].0)?;
        }
        counter.read()?;
    }
    Ok(())
}

pub(super) fn exclusive(context: &mut Context) -> Result<(), Failure> {
    let counter = counter(0)?;
    let (one, two) = (set()?, set()?);
    let flags = EpollFlags::EPOLLIN | EpollFlags::EPOLLEXCLUSIVE;
    one.add(&counter, EpollEvent::new(flags, 1))?;
    two.add(&counter, EpollEvent::new(flags, 2))?;
    while context.step(Duration::from_millis(8))? {
        same("ready before", (ready(&one)?, ready(&two)?), (Vec::new(), Vec::new()))?;
        // What is exclusive cannot be changed.
        let event = &mut EpollEvent::new(EpollFlags::EPOLLIN, 9);
        same("changing one", one.modify(&counter, event), Err(nix::Error::EINVAL))?;
        if context.progress.plant() {
            one.delete(&counter)?;
        }
        counter.write(1)?;
        same("ready after", (ready(&one)?, ready(&two)?), (vec![1], vec![2]))?;
        counter.read()?;
    }
    Ok(())
}

pub(super) fn shared(context: &mut Context) -> Result<(), Failure> {
    let epoll = set()?;
    let (mut reader, mut writer) = std::io::pipe()?;
    epoll.add(&reader, EpollEvent::new(EpollFlags::EPOLLIN, 4))?;
    let answers = counter(0)?;
    // The set of parent and child is one: what either adds both wait for.
    let child = Child::start(context, "brother", |stop| {
        let mut seen = 0u64;
        while !stop.wait(Duration::from_millis(1))? {
            let found = ready(&epoll)?;
            if found.contains(&4) {
                let mut byte = [0];
                reader.read_exact(&mut byte)?;
                same("what can be read", u64::from(byte[0]), seen % 251)?;
                seen += 1;
                answers.write(1)?;
            }
        }
        Ok(())
    })?;
    let mut turn = 0u64;
    let mut answered = 0;
    let late = EventFd::from_value_and_flags(1, EfdFlags::EFD_CLOEXEC)?;
    while context.step(Duration::from_millis(6))? {
        child.check()?;
        if turn == answered {
            writer.write_all(&[(turn % 251) as u8 ^ u8::from(context.progress.plant())])?;
            turn += 1;
        }
        answered += answers
            .read()
            .or_else(|error| if error == nix::Error::EAGAIN { Ok(0) } else { Err(error) })?;
        ensure(answered <= turn, || "more answers than questions".to_owned())?;
        epoll.add(&late, EpollEvent::new(EpollFlags::EPOLLIN, 5))?;
        ensure(ready(&epoll)?.contains(&5), || "a new entry is silent".to_owned())?;
        epoll.delete(&late)?;
    }
    ensure(answered > 0, || "the brother never answered".to_owned())?;
    child.finish()
}
