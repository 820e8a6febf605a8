//! POSIX message queues.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::ffi::CString;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::time::Duration;

use ckpt_engine::sys::mailbox;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::unistd::getpid;

use crate::workload::context::Context;
use crate::workload::outcome::{Failure, ensure, same};
use crate::workload::process::Child;

/// A queue whose name goes with the workload.
struct Mailbox {
    name: CString,
    queue: OwnedFd,
}

impl Mailbox {
    fn new(kind: &str, messages_max: i64) -> Result<Self, Failure> {
        let name = CString::new(format!("selfcheck-{kind}-{}", getpid()))
            .map_err(|_| Failure::new("a name with a zero in it"))?;
        let queue = mailbox::make(&name, messages_max, 256)?;
        Ok(Self { name, queue })
    }

    fn receive(&self) -> Result<Option<(u32, Vec<u8>)>, Failure> {
        Ok(mailbox::receive(self.queue.as_fd(), 256)?)
    }
}

impl Drop for Mailbox {
    fn drop(&mut self) {
        // It may be gone already.
        let _ = mailbox::unlink(&self.name);
    }
}

fn text(number: u64) -> Vec<u8> {
    format!("letter {number} ").repeat(1 + number as usize % 9).into_bytes()
}

pub(super) fn letters(context: &mut Context) -> Result<(), Failure> {
    let mailbox = Mailbox::new("letters", 10)?;
    // The highest priority first, and in it the oldest.
    let mut held = BinaryHeap::new();
    let mut next = 0;
    while context.step(Duration::from_millis(6))? {
        while held.len() < 7 {
            let priority = (next * 7 % 4) as u32 * 1000;
            mailbox::send(mailbox.queue.as_fd(), priority, &text(next))?;
            held.push((priority, Reverse(next)));
            next += 1;
        }
        let attributes = mailbox::attributes(mailbox.queue.as_fd())?;
        same("letters", (attributes.messages, attributes.messages_max), (7, 10))?;
        if context.progress.plant() {
            mailbox.receive()?;
        }
        let expected = held.pop().map(|(priority, Reverse(number))| (priority, text(number)));
        same("a letter", mailbox.receive()?, expected)?;
    }
    Ok(())
}

pub(super) fn full(context: &mut Context) -> Result<(), Failure> {
    let mailbox = Mailbox::new("full", 4)?;
    (0..4).try_for_each(|number| mailbox::send(mailbox.queue.as_fd(), 1, &text(number)))?;
    let mut oldest = 0;
    while context.step(Duration::from_millis(8))? {
        let more =
            mailbox::send(mailbox.queue.as_fd(), 9, b"").map_err(|error| error.raw_os_error());
        same("one more letter", more, Err(Some(libc::EAGAIN)))?;
        same("the oldest letter", mailbox.receive()?, Some((1, text(oldest))))?;
        mailbox::send(mailbox.queue.as_fd(), 1, &text(oldest + 4))?;
        oldest += 1;
        if context.progress.plant() {
            mailbox.receive()?;
        }
    }
    Ok(())
}

pub(in crate::workload) fn unlinked(context: &mut Context) -> Result<(), Failure> {
    let mailbox = Mailbox::new("unlinked", 3)?;
    mailbox::unlink(&mailbox.name)?;
    // Another one with the same name is not the same.
    let other = Mailbox::new("unlinked", 3)?;
    mailbox::send(mailbox.queue.as_fd(), 2, &text(0))?;
    mailbox::send(other.queue.as_fd(), 2, b"other")?;
    let mut turn = 0;
    while context.step(Duration::from_millis(8))? {
        same("a letter without a name", mailbox.receive()?, Some((2, text(turn))))?;
        same("a letter of another", other.receive()?, Some((2, b"other".to_vec())))?;
        turn += 1;
        mailbox::send(mailbox.queue.as_fd(), 2, &text(turn))?;
        mailbox::send(other.queue.as_fd(), 2, b"other")?;
        let link = std::fs::read_link(format!("/proc/self/fd/{}", mailbox.queue.as_raw_fd()))?;
        let link = link.to_string_lossy().into_owned();
        ensure(link.ends_with(" (deleted)"), || format!("its name is back: {link}"))?;
        if context.progress.plant() {
            mailbox.receive()?;
        }
    }
    Ok(())
}

/// Waits for a letter.
fn take(queue: &OwnedFd) -> Result<(u32, Vec<u8>), Failure> {
    loop {
        let mut fds = [PollFd::new(queue.as_fd(), PollFlags::POLLIN)];
        match poll(&mut fds, PollTimeout::NONE) {
            Err(nix::Error::EINTR) => continue,
            waited => waited?,
        };
        if let Some(letter) = mailbox::receive(queue.as_fd(), 256)? {
            return Ok(letter);
        }
    }
}

pub(super) fn wait(context: &mut Context) -> Result<(), Failure> {
    let (ask, answer) = (Mailbox::new("ask", 5)?, Mailbox::new("answer", 5)?);
    let child = Child::start(context, "reader", |_| {
        loop {
            let (priority, text) = take(&ask.queue)?;
            if priority == 7 {
                return Ok(());
            }
            mailbox::send(answer.queue.as_fd(), priority, &text)?;
        }
    })?;
    let mut turn = 0;
    while context.step(Duration::from_millis(5))? {
        child.check()?;
        turn += 1;
        mailbox::send(ask.queue.as_fd(), 3, &text(turn))?;
        let planted = u64::from(context.progress.plant());
        same("an answer", take(&answer.queue)?, (3, text(turn + planted)))?;
    }
    mailbox::send(ask.queue.as_fd(), 7, b"")?;
    child.finish()
}
