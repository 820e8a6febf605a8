//! pidfds of processes that live, are dead, and are gone, held and on their way.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixDatagram;
use std::time::Duration;

use ckpt_engine::sys::program::descriptor::{open_process, signal_process};
use ckpt_engine::sys::program::message;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid};
use nix::unistd::getpid;

use crate::workload::context::Context;
use crate::workload::outcome::{Failure, ensure, same};
use crate::workload::process::{Child, proc_text};

fn has_ended(process: BorrowedFd<'_>) -> Result<bool, Failure> {
    let mut fds = [PollFd::new(process, PollFlags::POLLIN)];
    Ok(poll(&mut fds, PollTimeout::ZERO)? > 0)
}

/// The number that the descriptor shows.
fn number(process: &OwnedFd) -> Result<i32, Failure> {
    use std::os::fd::AsRawFd;
    let text = proc_text(format!("/proc/self/fdinfo/{}", process.as_raw_fd()))?;
    let line = text.lines().find_map(|line| line.strip_prefix("Pid:"));
    line.and_then(|number| number.trim().parse().ok())
        .ok_or_else(|| Failure::new("a pidfd without a number"))
}

/// A process that does nothing.
fn subject(context: &Context) -> Result<Child, Failure> {
    Child::start(context, "subject", |stop| {
        while !stop.wait(Duration::from_millis(50))? {}
        Ok(())
    })
}

pub(super) fn living(context: &mut Context) -> Result<(), Failure> {
    let child = subject(context)?;
    let pid = child.pid.as_raw();
    let process = open_process(pid, 0)?;
    let own = open_process(getpid().as_raw(), libc::PIDFD_NONBLOCK)?;
    while context.step(Duration::from_millis(8))? {
        child.check()?;
        same("whose it is", number(&process)?, pid)?;
        same("our own", number(&own)?, getpid().as_raw())?;
        ensure(!has_ended(process.as_fd())?, || "a living process has ended".to_owned())?;
        signal_process(process.as_fd(), 0)?;
        let none = waitid(Id::PIDFd(process.as_fd()), WaitPidFlag::WEXITED | WaitPidFlag::WNOHANG);
        same("waiting for it", none, Ok(WaitStatus::StillAlive))?;
        if context.progress.plant() {
            signal_process(process.as_fd(), libc::SIGKILL)?;
        }
    }
    child.finish()
}

/// A child that has ended with this code and waits to be collected.
fn dead(code: i32) -> Result<OwnedFd, Failure> {
    let pid = ckpt_engine::sys::program::fork::fork(|| code)?;
    let process = open_process(pid, 0)?;
    let mut fds = [PollFd::new(process.as_fd(), PollFlags::POLLIN)];
    loop {
        match poll(&mut fds, PollTimeout::NONE) {
            Err(Errno::EINTR) => {}
            Err(error) => return Err(error.into()),
            Ok(_) => break,
        }
    }
    Ok(process)
}

/// What service managers keep of a process, in this order: see systemd's `PidRef`.
#[repr(C)]
struct Reference {
    pid: i32,
    fd: i32,
    inode: u64,
}

pub(super) fn remembered(context: &mut Context) -> Result<(), Failure> {
    use std::os::fd::AsRawFd;
    let child = subject(context)?;
    let pid = child.pid.as_raw();
    let process = open_process(pid, 0)?;
    let inode = |fd: &OwnedFd| Ok::<u64, Failure>(nix::sys::stat::fstat(fd)?.st_ino);
    let mut kept = Vec::new();
    for _ in 0..100 {
        let reference = Reference { pid, fd: process.as_raw_fd(), inode: inode(&process)? };
        kept.push(Box::new(reference));
    }
    while context.step(Duration::from_millis(8))? {
        child.check()?;
        let now = inode(&open_process(pid, 0)?)?;
        if context.progress.plant() {
            kept[50].inode += 1;
        }
        for reference in &kept {
            same("the number of the process", reference.pid, pid)?;
            same("the descriptor of the process", reference.fd, process.as_raw_fd())?;
            same("the identity of the process", reference.inode, now)?;
        }
    }
    child.finish()
}

pub(super) fn zombies(context: &mut Context) -> Result<(), Failure> {
    let mut turn = 0;
    while context.step(Duration::from_millis(1))? {
        turn += 1;
        let code = 1 + turn % 100;
        let process = dead(code)?;
        let pid = number(&process)?;
        for _ in 0..50 {
            if !context.step(Duration::from_millis(8))? {
                break;
            }
            same("the number of a dead process", number(&process)?, pid)?;
            ensure(has_ended(process.as_fd())?, || "a dead process lives".to_owned())?;
            signal_process(process.as_fd(), 0)?;
            let look = WaitPidFlag::WEXITED | WaitPidFlag::WNOHANG | WaitPidFlag::WNOWAIT;
            let status = waitid(Id::PIDFd(process.as_fd()), look)?;
            let expected = code + i32::from(context.progress.plant());
            let exited = matches!(status, WaitStatus::Exited(_, code) if code == expected);
            ensure(exited, || format!("a process that ended with {code}: {status:?}"))?;
        }
        waitid(Id::PIDFd(process.as_fd()), WaitPidFlag::WEXITED)?;
    }
    Ok(())
}

pub(super) fn gone(context: &mut Context) -> Result<(), Failure> {
    let process = dead(3)?;
    waitid(Id::PIDFd(process.as_fd()), WaitPidFlag::WEXITED)?;
    while context.step(Duration::from_millis(8))? {
        let mut found = number(&process)?;
        if context.progress.plant() {
            found = 1;
        }
        same("the number of a process that is gone", found, -1)?;
        ensure(has_ended(process.as_fd())?, || "a process that is gone lives".to_owned())?;
        let sent = signal_process(process.as_fd(), 0).map_err(|error| error.raw_os_error());
        same("a signal to it", sent, Err(Some(libc::ESRCH)))?;
        let waited = waitid(Id::PIDFd(process.as_fd()), WaitPidFlag::WEXITED);
        same("waiting for it", waited, Err(Errno::ECHILD))?;
    }
    Ok(())
}

pub(super) fn flying(context: &mut Context) -> Result<(), Failure> {
    let child = subject(context)?;
    let pid = child.pid.as_raw();
    let (read, write) = UnixDatagram::pair()?;
    message::send(write.as_fd(), b"first", &[open_process(pid, 0)?.as_fd()])?;
    while context.step(Duration::from_millis(8))? {
        child.check()?;
        let mut bytes = [0; 16];
        let (length, mut fds) = message::receive(read.as_fd(), &mut bytes)?;
        ensure(length == 5, || format!("{length} bytes of a message"))?;
        let process = fds.pop().ok_or_else(|| Failure::new("a message without a pidfd"))?;
        let planted = i32::from(context.progress.plant());
        same("whose it is", number(&process)?, pid + planted)?;
        signal_process(process.as_fd(), 0)?;
        message::send(write.as_fd(), b"again", &[process.as_fd()])?;
    }
    child.finish()
}
