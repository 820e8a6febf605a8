//! What an epoll has been told and what it has told already.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::time::Duration;

use ckpt_engine::sys::event::{busy_poll, set_busy_poll};
use ckpt_format::files::BusyPoll;
use nix::sched::{CloneFlags, unshare};
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::signal::{SigSet, Signal, kill};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::unistd::{Pid, sethostname};

use crate::workload::context::Context;
use crate::workload::outcome::{Failure, ensure, same};

const LEVEL: u64 = 1;
const EDGE: u64 = 2;
const ONCE: u64 = 3;
const PIPE: u64 = 4;
const INNER: u64 = 0xdead_beef_0000_0005;

pub(super) fn run(context: &mut Context) -> Result<(), Failure> {
    let outer = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
    let inner = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
    let level = event(1)?;
    let edge = event(1)?;
    let once = event(1)?;
    let (mut read, mut write) = std::io::pipe()?;
    let (quiet, _open) = std::io::pipe()?;
    let input = EpollFlags::EPOLLIN;
    inner.add(&level, EpollEvent::new(input, LEVEL))?;
    inner.add(&read, EpollEvent::new(input, PIPE))?;
    outer.add(&inner.0, EpollEvent::new(input, INNER))?;
    outer.add(&edge, EpollEvent::new(input | EpollFlags::EPOLLET, EDGE))?;
    outer.add(&once, EpollEvent::new(input | EpollFlags::EPOLLONESHOT, ONCE))?;
    outer.add(quiet.as_fd(), EpollEvent::new(input, 99))?;
    let first = ready(&outer)?;
    same("ready at the beginning", first, vec![EDGE, ONCE, INNER])?;
    // A program must expect an edge to be told again, but not that a spent one-shot speaks.
    let busy = BusyPoll { microseconds: 50, packets: 16, preferred: true };
    set_busy_poll(inner.0.as_fd(), busy)?;
    let mut turn = 0;
    while context.step(Duration::from_millis(6))? {
        same("how devices are polled", busy_poll(inner.0.as_fd())?, Some(busy))?;
        same("how they are polled outside", busy_poll(outer.0.as_fd())?, None)?;
        let quiet = ready(&outer)?;
        ensure(quiet.contains(&INNER), || format!("a nested epoll is silent: {quiet:?}"))?;
        ensure(!quiet.contains(&ONCE), || "a spent one-shot spoke".to_owned())?;
        ensure(!quiet.contains(&99), || "an empty pipe spoke".to_owned())?;
        same("ready inside", ready(&inner)?, vec![LEVEL])?;
        write.write_all(b"x")?;
        same("ready inside with data", ready(&inner)?, vec![LEVEL, PIPE])?;
        read.read_exact(&mut [0])?;
        edge.write(1)?;
        ensure(ready(&outer)?.contains(&EDGE), || "a new edge was not told".to_owned())?;
        turn += 1;
        if turn % 50 == 0 {
            let armed = input | EpollFlags::EPOLLONESHOT;
            outer.modify(&once, &mut EpollEvent::new(armed, ONCE))?;
            ensure(ready(&outer)?.contains(&ONCE), || "an armed one-shot is silent".to_owned())?;
        }
        if context.progress.plant() {
            outer.delete(&inner.0)?;
        }
    }
    Ok(())
}

/// A file whose text the kernel makes up tells of its changes, before and after a move.
pub(super) fn made_up(context: &mut Context) -> Result<(), Failure> {
    unshare(CloneFlags::CLONE_NEWUTS)?;
    let file = File::open("/proc/sys/kernel/hostname")?;
    let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
    epoll.add(&file, EpollEvent::new(EpollFlags::EPOLLPRI, 1))?;
    let mut events = [EpollEvent::empty(); 2];
    let mut turn = 0;
    while context.step(Duration::from_millis(20))? {
        // Whatever names others have changed is told as well.
        while epoll.wait(&mut events, EpollTimeout::ZERO)? > 0 {}
        if context.progress.plant() {
            epoll.delete(&file)?;
        }
        turn += 1;
        sethostname(format!("name-{turn}"))?;
        let told = epoll.wait(&mut events, EpollTimeout::from(5000u16))?;
        same("changes that were told", told, 1)?;
    }
    Ok(())
}

/// A set learns of a signal by being woken, not by looking.
pub(super) fn signals(context: &mut Context) -> Result<(), Failure> {
    let mut mask = SigSet::empty();
    mask.add(Signal::SIGUSR2);
    mask.thread_block()?;
    let signals = SignalFd::with_flags(&mask, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)?;
    let set = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
    set.add(&signals, EpollEvent::new(EpollFlags::EPOLLIN, LEVEL))?;
    while context.step(Duration::from_millis(6))? {
        same("ready before a signal", ready(&set)?, vec![])?;
        if context.progress.plant() {
            set.delete(&signals)?;
        }
        kill(Pid::this(), Signal::SIGUSR2)?;
        same("ready after a signal", ready(&set)?, vec![LEVEL])?;
        let found = signals.read_signal()?.map(|it| it.ssi_signo);
        same("the signal", found, Some(Signal::SIGUSR2 as u32))?;
    }
    Ok(())
}

fn event(count: u32) -> Result<EventFd, Failure> {
    let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
    Ok(EventFd::from_value_and_flags(count, flags)?)
}

/// The data of what is ready now, sorted.
fn ready(epoll: &Epoll) -> Result<Vec<u64>, Failure> {
    let mut events = [EpollEvent::empty(); 10];
    let count = epoll.wait(&mut events, EpollTimeout::ZERO)?;
    let mut found: Vec<u64> = events[..count].iter().map(EpollEvent::data).collect();
    found.sort_unstable();
    Ok(found)
}
