//! Makes the contexts of a process anew.

use std::{fs::File, io, os::unix::fs::FileExt};

use ckpt_format::process::Ring;

use super::{EVENT, HEAD, HEADER};
use crate::inject::{Batch, Gate, InjectError, Stopped};

/// How many empty requests are made at once.
const STRIDE: u32 = 256;
/// `struct iocb`.
const REQUEST: usize = 64;

/// Makes the contexts in a process of the target. At the addresses of their rings there is other
/// memory, which holds the places. Descriptor `fd` of the process is always ready to be read and
/// always at its end.
pub(crate) fn rebuild(
    thread: &Stopped,
    gate: Gate,
    memory: &File,
    rings: &[Ring],
    fd: u64,
) -> Result<(), InjectError> {
    for ring in rings {
        // Of the parent, and what a child has of it is only memory.
        if ring.requests > 0 {
            make(thread, gate, memory, ring)?;
            advance(thread, gate, memory, ring, fd)?;
        }
        let skipped = if ring.requests > 0 { HEADER } else { 0 };
        if let Some(contents) = ring.contents.get(skipped..) {
            write(thread, memory, ring.start + skipped as u64, contents)?;
        }
    }
    Ok(())
}

fn write(thread: &Stopped, memory: &File, address: u64, bytes: &[u8]) -> Result<(), InjectError> {
    memory.write_all_at(bytes, address).map_err(|source| control(thread, source))
}

fn control(thread: &Stopped, source: io::Error) -> InjectError {
    InjectError::Control { tid: thread.tid, source }
}

/// A context whose ring is where it was.
fn make(thread: &Stopped, gate: Gate, memory: &File, ring: &Ring) -> Result<(), InjectError> {
    let mut batch = gate.batch();
    let context = batch.room(8);
    let requests = u64::from(ring.requests);
    let setup = batch.call("io_setup", libc::SYS_io_setup, &[requests, context]);
    let done = batch.run(thread)?;
    done.value(setup)?;
    let address = done.number(context);
    let mut header = [0; HEADER];
    memory.read_exact_at(&mut header, address).map_err(|source| control(thread, source))?;
    let events = super::word(&header, 4).unwrap_or(0);
    if events != ring.events {
        // A host with more processors makes larger rings of few requests.
        return Err(control(thread, io::Error::from_raw_os_error(libc::EXDEV)));
    }
    let size = (HEADER + EVENT * events as usize) as u64;
    let size = size.next_multiple_of(ckpt_format::memory::PAGE);
    let how = (libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED) as u64;
    let mut batch = gate.batch();
    batch.call("mremap", libc::SYS_mremap, &[address, size, size, how, ring.start]);
    batch.run(thread)?.all()
}

/// Completes empty requests until the kernel's tail is where it was. Those before the head are
/// taken out again; the others stay, and what they say is overwritten.
fn advance(
    thread: &Stopped,
    gate: Gate,
    memory: &File,
    ring: &Ring,
    fd: u64,
) -> Result<(), InjectError> {
    let stride = STRIDE.min(ring.events / 4).max(1);
    let unread = (ring.tail + ring.events - ring.head) % ring.events;
    let mut gone = 0;
    while gone < ring.head {
        let count = stride.min(ring.head - gone);
        let mut batch = gate.batch();
        let submitted = submit(&mut batch, ring, count, fd);
        let room = batch.room(EVENT * count as usize);
        let arguments = [ring.start, count.into(), count.into(), room, 0];
        let taken = batch.call("io_getevents", libc::SYS_io_getevents, &arguments);
        let done = batch.run(thread)?;
        same(thread, done.value(submitted)?, count)?;
        same(thread, done.value(taken)?, count)?;
        gone += count;
    }
    let mut left = 0;
    while left < unread {
        let count = stride.min(unread - left);
        let mut batch = gate.batch();
        let submitted = submit(&mut batch, ring, count, fd);
        same(thread, batch.run(thread)?.value(submitted)?, count)?;
        left += count;
    }
    // As it is; a program that reads the ring by itself may also write it.
    write(thread, memory, ring.start + HEAD as u64, &ring.head.to_ne_bytes())
}

fn submit(batch: &mut Batch, ring: &Ring, count: u32, fd: u64) -> usize {
    let mut request = [0; REQUEST];
    request[20..24].copy_from_slice(&(fd as u32).to_ne_bytes());
    let request = batch.bytes(&request);
    let list: Vec<u8> = (0..count).flat_map(|_| request.to_ne_bytes()).collect();
    let list = batch.bytes(&list);
    batch.call("io_submit", libc::SYS_io_submit, &[ring.start, count.into(), list])
}

/// All of them, or the kernel does not do what we think.
fn same(thread: &Stopped, found: u64, wanted: u32) -> Result<(), InjectError> {
    match found == u64::from(wanted) {
        true => Ok(()),
        false => Err(control(thread, io::ErrorKind::WouldBlock.into())),
    }
}
