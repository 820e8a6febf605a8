//! Pipes and FIFOs that are never empty, packets that keep their bounds, and a pair of processes
//! of which one always waits for the other.

use std::fs::File;
use std::io::{PipeReader, PipeWriter, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::time::Duration;

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::stat::Mode;
use nix::unistd::{mkfifo, pipe2};

use crate::client::record::mix;
use crate::workload::context::Context;
use crate::workload::outcome::{Failure, same};
use crate::workload::process::Child;
use crate::workload::stream::Stream;

pub(super) fn run(context: &mut Context) -> Result<(), Failure> {
    let (read, write) = pipe2(OFlag::O_CLOEXEC)?;
    fcntl(&write, FcntlArg::F_SETPIPE_SZ(1 << 17))?;
    let mut plain = Backlog::new(File::from(read), File::from(write), 1)?;
    let path = context.path("fifo");
    mkfifo(&path, Mode::from_bits_truncate(0o600))?;
    let both = File::options().read(true).write(true).open(&path)?;
    let read = File::options().read(true).custom_flags(libc::O_NONBLOCK).open(&path)?;
    let mut fifo = Backlog::new(read, both, 2)?;
    let mut packets = Packets::new()?;
    let (from_child, to_parent) = std::io::pipe()?;
    let (from_parent, to_child) = std::io::pipe()?;
    let echo = Child::start(context, "echo", |_| answer(from_parent, to_parent))?;
    let mut turn = 0u64;
    while context.step(Duration::from_millis(3))? {
        plain.turn()?;
        fifo.turn()?;
        packets.turn()?;
        echo.check()?;
        turn += 1;
        (&to_child).write_all(&turn.to_le_bytes())?;
        let mut bytes = [0; 8];
        (&from_child).read_exact(&mut bytes)?;
        same("answer through a pipe", u64::from_le_bytes(bytes), mix(turn))?;
        same("size of a pipe", fcntl(&plain.write, FcntlArg::F_GETPIPE_SZ)?, 1 << 17)?;
        if context.progress.plant() {
            plain.read.read_exact(&mut [0])?;
        }
    }
    (&to_child).write_all(&0u64.to_le_bytes())?;
    echo.finish()
}

/// Answers each number until it is zero. Most of the time it waits in read(2).
fn answer(mut from_parent: PipeReader, mut to_parent: PipeWriter) -> Result<(), Failure> {
    loop {
        let mut bytes = [0; 8];
        from_parent.read_exact(&mut bytes)?;
        let number = u64::from_le_bytes(bytes);
        if number == 0 {
            return Ok(());
        }
        std::thread::sleep(Duration::from_millis(2));
        to_parent.write_all(&mix(number).to_le_bytes())?;
    }
}

/// A pipe whose reader stays behind its writer.
struct Backlog {
    read: File,
    write: File,
    out: Stream,
    back: Stream,
}

const BEHIND: usize = 20_000;

impl Backlog {
    fn new(read: File, write: File, seed: u64) -> Result<Self, Failure> {
        let mut backlog = Self { read, write, out: Stream::new(seed), back: Stream::new(seed) };
        backlog.put(BEHIND)?;
        Ok(backlog)
    }

    fn put(&mut self, count: usize) -> Result<(), Failure> {
        self.write.write_all(&self.out.next(count))?;
        self.out.advance(count);
        Ok(())
    }

    fn turn(&mut self) -> Result<(), Failure> {
        let count = 1 + (self.out.place() % 900) as usize;
        self.put(count)?;
        let mut bytes = vec![0; count];
        self.read.read_exact(&mut bytes)?;
        self.back.check(&bytes)
    }
}

/// A pipe in packet mode: each read gives one write.
struct Packets {
    read: File,
    write: File,
    sent: u64,
    taken: u64,
}

impl Packets {
    fn new() -> Result<Self, Failure> {
        let (read, write): (OwnedFd, OwnedFd) = pipe2(OFlag::O_CLOEXEC | OFlag::O_DIRECT)?;
        let (read, write) = (File::from(read), File::from(write));
        let mut packets = Self { read, write, sent: 0, taken: 0 };
        for _ in 0..5 {
            packets.put()?;
        }
        Ok(packets)
    }

    fn put(&mut self) -> Result<(), Failure> {
        let packet = vec![self.sent as u8; 1 + (self.sent % 50) as usize];
        self.write.write_all(&packet)?;
        self.sent += 1;
        Ok(())
    }

    fn turn(&mut self) -> Result<(), Failure> {
        self.put()?;
        let mut bytes = [0; 100];
        let count = self.read.read(&mut bytes)?;
        same("length of a packet in a pipe", count, 1 + (self.taken % 50) as usize)?;
        same("content of a packet in a pipe", bytes[0], self.taken as u8)?;
        self.taken += 1;
        Ok(())
    }
}
