//! System V messages.

use std::collections::VecDeque;
use std::time::Duration;

use ckpt_engine::sys::program::sysv;

use super::key;
use crate::workload::context::Context;
use crate::workload::outcome::{Failure, same};
use crate::workload::process::Child;

/// A queue that goes with the workload.
struct Queue(i32);

impl Queue {
    fn new(number: i32) -> Result<Self, Failure> {
        Ok(Self(sysv::messages(key(number), Some(0o600))?))
    }
}

impl Drop for Queue {
    fn drop(&mut self) {
        // It may be gone already.
        let _ = sysv::remove_messages(self.0);
    }
}

fn text(number: u64) -> Vec<u8> {
    let length = (number * 37 % 400) as usize;
    number
        .to_le_bytes()
        .into_iter()
        .chain((0..length).map(|at| (at as u64 ^ number) as u8))
        .collect()
}

pub(in crate::workload) fn queue(context: &mut Context) -> Result<(), Failure> {
    let queue = Queue::new(1)?;
    let mut held: VecDeque<(i64, u64)> = VecDeque::new();
    let mut next = 0;
    let mut turn = 0i64;
    while context.step(Duration::from_millis(5))? {
        while held.len() < 24 {
            let kind = 1 + (next % 5) as i64;
            sysv::send(queue.0, kind, &text(next))?;
            held.push_back((kind, next));
            next += 1;
        }
        same("messages in a queue", sysv::queue_state(queue.0)?.0, held.len() as u64)?;
        // The oldest of one type, of all, or of the lowest types.
        turn += 1;
        let wanted = turn % 7 - 1;
        let lowest = held.iter().map(|(kind, _)| *kind).filter(|kind| *kind <= -wanted).min();
        let place = held.iter().position(|(kind, _)| match wanted {
            0 => true,
            1.. => *kind == wanted,
            _ => Some(*kind) == lowest,
        });
        let expected = place.and_then(|place| held.remove(place));
        if context.progress.plant() {
            sysv::receive(queue.0, 0, false)?;
        }
        match (sysv::receive(queue.0, wanted, false), expected) {
            (Ok(found), Some((kind, number))) => {
                same("a message", found, (kind, text(number)))?;
            }
            (found, None) => {
                let found = found.map_err(|error| error.raw_os_error());
                same("a message of a type that is not there", found, Err(Some(libc::ENOMSG)))?;
            }
            (Err(error), _) => return Err(error.into()),
        }
    }
    Ok(())
}

pub(super) fn full(context: &mut Context) -> Result<(), Failure> {
    let queue = Queue::new(2)?;
    sysv::limit_queue(queue.0, 4096)?;
    for number in 0..4u8 {
        sysv::send(queue.0, 1, &[number; 1024])?;
    }
    let mut oldest = 0u8;
    while context.step(Duration::from_millis(8))? {
        same("a full queue", sysv::queue_state(queue.0)?, (4, 4096))?;
        let more = sysv::send(queue.0, 1, b"x").map_err(|error| error.raw_os_error());
        same("one more message", more, Err(Some(libc::EAGAIN)))?;
        let (_, found) = sysv::receive(queue.0, 0, false)?;
        same("the oldest message", found, vec![oldest; 1024])?;
        sysv::send(queue.0, 1, &[oldest.wrapping_add(4); 1024])?;
        oldest = oldest.wrapping_add(1);
        if context.progress.plant() {
            oldest = oldest.wrapping_add(1);
        }
    }
    Ok(())
}

pub(super) fn wait(context: &mut Context) -> Result<(), Failure> {
    let (ask, answer) = (Queue::new(3)?, Queue::new(4)?);
    let (asked, answered) = (ask.0, answer.0);
    let child = Child::start(context, "reader", |_| {
        loop {
            // A wait for a message is never begun again by itself.
            let (kind, text) = match sysv::receive(asked, 0, true) {
                Err(error) if error.raw_os_error() == Some(libc::EINTR) => continue,
                received => received?,
            };
            if kind == 2 {
                return Ok(());
            }
            sysv::send(answered, 1, &text)?;
        }
    })?;
    let mut turn = 0;
    while context.step(Duration::from_millis(5))? {
        child.check()?;
        turn += 1;
        sysv::send(ask.0, 1, &text(turn))?;
        let found = loop {
            match sysv::receive(answer.0, 0, true) {
                Err(error) if error.raw_os_error() == Some(libc::EINTR) => {}
                received => break received?.1,
            }
        };
        let planted = u64::from(context.progress.plant());
        same("an answer", found, text(turn + planted))?;
    }
    sysv::send(ask.0, 2, b"")?;
    child.finish()
}
