//! Locks on files: of processes, of descriptions, of whole files, and leases.

use std::fs::File;
use std::io::Write;
use std::os::fd::{AsFd, AsRawFd};
use std::time::Duration;

use ckpt_engine::sys::program::descriptor::{self, Fcntl, Owner, Range};
use ckpt_engine::sys::program::signal;
use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};

use crate::workload::context::Context;
use crate::workload::outcome::{Failure, ensure, same};
use crate::workload::process::{Child, proc_text};

fn make(context: &Context, name: &str) -> Result<File, Failure> {
    let path = context.path(name);
    let mut file = File::options().read(true).write(true).create_new(true).open(path)?;
    file.write_all(&[7; 4096])?;
    Ok(file)
}

fn again(context: &Context, name: &str) -> Result<File, Failure> {
    Ok(File::options().read(true).write(true).open(context.path(name))?)
}

const WRITE: i32 = libc::F_WRLCK;
const READ: i32 = libc::F_RDLCK;
const NONE: i32 = libc::F_UNLCK;

pub(super) fn of_processes(context: &mut Context) -> Result<(), Failure> {
    let file = make(context, "locked")?;
    let ours = [
        (WRITE, Range { start: 0, length: 10 }),
        (READ, Range { start: 100, length: 50 }),
        (WRITE, Range { start: 1 << 33, length: 0 }),
    ];
    for (kind, range) in ours {
        descriptor::lock(file.as_fd(), Owner::Process, kind, range)?;
    }
    let parent = nix::unistd::getpid().as_raw();
    let file = &file;
    let child = Child::start(context, "looker", |stop| {
        // Locks are not inherited, so those of the parent are in its way.
        while !stop.wait(Duration::from_millis(5))? {
            for (kind, range) in ours {
                let one = Range { start: range.start + 3, length: 1 };
                let found = descriptor::obstacle(file.as_fd(), Owner::Process, WRITE, one)?;
                same("a lock of the parent", found, Some((kind, range, parent)))?;
            }
            let free = Range { start: 20, length: 60 };
            let found = descriptor::obstacle(file.as_fd(), Owner::Process, WRITE, free)?;
            same("no lock in between", found, None)?;
            let shared = Range { start: 120, length: 3 };
            let found = descriptor::obstacle(file.as_fd(), Owner::Process, READ, shared)?;
            same("a second reader", found, None)?;
        }
        Ok(())
    })?;
    while context.step(Duration::from_millis(8))? {
        child.check()?;
        if context.progress.plant() {
            descriptor::lock(file.as_fd(), Owner::Process, NONE, ours[1].1)?;
        }
    }
    child.finish()
}

pub(super) fn of_descriptions(context: &mut Context) -> Result<(), Failure> {
    let held = make(context, "locked")?;
    let copy = held.try_clone()?;
    let other = again(context, "locked")?;
    let first = Range { start: 5, length: 20 };
    let second = Range { start: 1000, length: 0 };
    descriptor::lock(held.as_fd(), Owner::Description, WRITE, first)?;
    descriptor::lock(copy.as_fd(), Owner::Description, READ, second)?;
    let look = |range| descriptor::obstacle(other.as_fd(), Owner::Description, WRITE, range);
    while context.step(Duration::from_millis(8))? {
        same("a lock of a description", look(first)?, Some((WRITE, first, -1)))?;
        same("a reader's lock", look(second)?, Some((READ, second, -1)))?;
        same("no lock in between", look(Range { start: 30, length: 900 })?, None)?;
        let own = descriptor::obstacle(copy.as_fd(), Owner::Description, WRITE, first)?;
        same("its own lock in its way", own, None)?;
        if context.progress.plant() {
            descriptor::lock(copy.as_fd(), Owner::Description, NONE, first)?;
        }
    }
    Ok(())
}

pub(super) fn of_files(context: &mut Context) -> Result<(), Failure> {
    let locked = |file, how| Flock::lock(file, how).map_err(|(_, errno)| errno);
    let exclusive = locked(make(context, "exclusive")?, FlockArg::LockExclusiveNonblock)?;
    let shared = locked(make(context, "shared")?, FlockArg::LockSharedNonblock)?;
    let parent = nix::unistd::getpid();
    // A child has the description, and the lock with it.
    let child = Child::start(context, "heir", |stop| {
        while !stop.wait(Duration::from_millis(20))? {}
        Ok(())
    })?;
    while context.step(Duration::from_millis(8))? {
        child.check()?;
        same("the holder", nix::unistd::getpid(), parent)?;
        let taken = locked(again(context, "exclusive")?, FlockArg::LockSharedNonblock);
        same("a locked file", taken.map(drop), Err(Errno::EWOULDBLOCK))?;
        let taken = locked(again(context, "shared")?, FlockArg::LockExclusiveNonblock);
        same("a file that is read", taken.map(drop), Err(Errno::EWOULDBLOCK))?;
        locked(again(context, "shared")?, FlockArg::LockSharedNonblock)?;
        if context.progress.plant() {
            exclusive.unlock().map_err(|(_, errno)| errno)?;
            let taken = locked(again(context, "exclusive")?, FlockArg::LockSharedNonblock);
            return same("a locked file", taken.map(drop), Err(Errno::EWOULDBLOCK));
        }
    }
    drop(shared);
    child.finish()
}

/// What has no path can be locked as well, and so can what is no file at all.
pub(super) fn without_path(context: &mut Context) -> Result<(), Failure> {
    let locked = |file, how| Flock::lock(file, how).map_err(|(_, errno)| errno);
    let (reader, writer) = std::io::pipe()?;
    let (one, two) = std::os::unix::net::UnixStream::pair()?;
    let listener = std::net::TcpListener::bind("127.0.0.1:0")?;
    let stream = std::net::TcpStream::connect(listener.local_addr()?)?;
    let device = File::open("/dev/null")?;
    let exclusive: [File; 4] = [
        std::os::fd::OwnedFd::from(reader).into(),
        std::os::fd::OwnedFd::from(one).into(),
        std::os::fd::OwnedFd::from(stream).into(),
        std::os::fd::OwnedFd::from(listener).into(),
    ];
    let mut held = Vec::new();
    for file in exclusive {
        held.push((locked(file, FlockArg::LockExclusiveNonblock)?, "WRITE"));
    }
    held.push((locked(device, FlockArg::LockSharedNonblock)?, "READ"));
    let range = Range { start: 3, length: 4 };
    descriptor::lock(writer.as_fd(), Owner::Description, WRITE, range)?;
    descriptor::lock(two.as_fd(), Owner::Process, WRITE, range)?;
    while context.step(Duration::from_millis(8))? {
        for (file, how) in &held {
            let number = file.as_raw_fd();
            let info = proc_text(format!("/proc/self/fdinfo/{number}"))?;
            let lock = info.lines().find(|line| line.contains("FLOCK"));
            ensure(lock.is_some_and(|line| line.contains(how)), || format!("{number}: {info}"))?;
        }
        // A description of its own, of the same pipe.
        let other = File::open(format!("/proc/self/fd/{}", held[0].0.as_raw_fd()))?;
        let taken = locked(other.try_clone()?, FlockArg::LockSharedNonblock);
        same("a locked pipe", taken.map(drop), Err(Errno::EWOULDBLOCK))?;
        let found = descriptor::obstacle(other.as_fd(), Owner::Description, READ, range)?;
        same("a locked part of a pipe", found, Some((WRITE, range, -1)))?;
        let info = proc_text(format!("/proc/self/fdinfo/{}", two.as_raw_fd()))?;
        ensure(info.contains("POSIX"), || format!("the lock of a process: {info}"))?;
        if context.progress.plant() {
            held.pop();
            held.push((locked(File::open("/dev/zero")?, FlockArg::LockExclusiveNonblock)?, "READ"));
        }
    }
    Ok(())
}

const BROKEN: i32 = 40;

pub(super) fn lease(context: &mut Context) -> Result<(), Failure> {
    let path = context.path("leased");
    std::fs::write(&path, b"leased")?;
    signal::count(BROKEN, libc::SA_RESTART)?;
    context.has_handlers = true;
    let file = File::open(&path)?;
    let take = |kind| descriptor::fcntl(file.as_fd(), Fcntl::SetLease(kind));
    // Giving it up also gives up the signal.
    let signal = || descriptor::fcntl(file.as_fd(), Fcntl::SetSignal(BROKEN));
    take(READ)?;
    signal()?;
    let mut broken = 0;
    let mut turn = 0;
    while context.step(Duration::from_millis(8))? {
        same("a lease", descriptor::fcntl(file.as_fd(), Fcntl::GetLease)?, READ)?;
        same("its signal", descriptor::fcntl(file.as_fd(), Fcntl::GetSignal)?, BROKEN)?;
        same("how often it was broken", signal::counted(BROKEN), broken)?;
        turn += 1;
        if turn % 10 == 0 {
            let flags = nix::fcntl::OFlag::O_WRONLY | nix::fcntl::OFlag::O_NONBLOCK;
            let writer = nix::fcntl::open(&path, flags, nix::sys::stat::Mode::empty());
            same("a writer of a leased file", writer.map(drop), Err(Errno::EWOULDBLOCK))?;
            broken += 1;
            same("a lease that is broken", signal::counted(BROKEN), broken)?;
            take(NONE)?;
            take(READ)?;
            signal()?;
        }
        if context.progress.plant() {
            take(NONE)?;
        }
    }
    Ok(())
}

pub(super) fn asynchronous(context: &mut Context) -> Result<(), Failure> {
    const ARRIVED: i32 = 41;
    let (mut reader, mut writer) = std::os::unix::net::UnixStream::pair()?;
    signal::block(ARRIVED)?;
    let own_end = reader.try_clone()?;
    let ask = |command| descriptor::fcntl(own_end.as_fd(), command);
    let own = nix::unistd::getpid().as_raw();
    ask(Fcntl::SetOwner(own))?;
    ask(Fcntl::SetSignal(ARRIVED))?;
    ask(Fcntl::SetFlags(libc::O_ASYNC | libc::O_NONBLOCK))?;
    let mut turn = 0u8;
    while context.step(Duration::from_millis(8))? {
        same("the owner", ask(Fcntl::GetOwner)?, own)?;
        same("the signal", ask(Fcntl::GetSignal)?, ARRIVED)?;
        let flags = ask(Fcntl::GetFlags)? & (libc::O_ASYNC | libc::O_NONBLOCK);
        same("the flags", flags, libc::O_ASYNC | libc::O_NONBLOCK)?;
        if context.progress.plant() {
            ask(Fcntl::SetFlags(libc::O_NONBLOCK))?;
        }
        turn = turn.wrapping_add(1);
        writer.write_all(&[turn])?;
        let told = signal::take(&[ARRIVED], Duration::from_secs(5));
        ensure(told.is_ok(), || "no signal tells that something can be read".to_owned())?;
        let mut byte = [0];
        std::io::Read::read_exact(&mut reader, &mut byte)?;
        same("what can be read", byte, [turn])?;
    }
    Ok(())
}
