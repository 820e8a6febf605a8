//! Ten thousand open files of several kinds in one process.

use std::fs::File;
use std::io::{PipeReader, PipeWriter, Read, Write};
use std::os::unix::fs::FileExt;
use std::time::Duration;

use nix::fcntl::{FcntlArg, fcntl};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::resource::{Resource, getrlimit, setrlimit};

use crate::workload::context::Context;
use crate::workload::outcome::{Failure, same};

/// How many of each kind: a pipe has two ends.
const EACH: usize = 2500;

pub(super) fn raise_limit() -> Result<(), Failure> {
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    Ok(setrlimit(Resource::RLIMIT_NOFILE, hard, hard)?)
}

struct Pipe {
    read: PipeReader,
    write: PipeWriter,
    number: u32,
}

impl Pipe {
    fn turn(&mut self) -> Result<(), Failure> {
        let mut bytes = [0; 4];
        self.read.read_exact(&mut bytes)?;
        same("number in a pipe", u32::from_le_bytes(bytes), self.number)?;
        self.number += 1;
        Ok(self.write.write_all(&self.number.to_le_bytes())?)
    }
}

pub(super) fn run(context: &mut Context) -> Result<(), Failure> {
    raise_limit()?;
    let path = context.path("file");
    std::fs::write(&path, vec![7; EACH])?;
    let (mut pipes, mut files, mut events) = (Vec::new(), Vec::new(), Vec::new());
    for number in 0..EACH {
        let (read, mut write) = std::io::pipe()?;
        let number = number as u32;
        write.write_all(&number.to_le_bytes())?;
        pipes.push(Pipe { read, write, number });
        files.push(File::open(&path)?);
        events.push(EventFd::from_value_and_flags(number + 1, EfdFlags::empty())?);
    }
    // It stays open under this number until the process ends.
    let limit = getrlimit(Resource::RLIMIT_NOFILE)?.0.min(1 << 16);
    let highest = fcntl(&files[0], FcntlArg::F_DUPFD((limit - 1) as i32))?;
    let highest = format!("/proc/self/fd/{highest}");
    let mut at = 0;
    while context.step(Duration::from_millis(1))? {
        for _ in 0..20 {
            pipes[at].turn()?;
            let mut byte = [0];
            files[at].read_exact_at(&mut byte, at as u64)?;
            same("a byte of a file", byte, [7])?;
            let value = events[at].read()?;
            same("a counter", value, at as u64 + 1)?;
            events[at].write(value)?;
            at = (at + 1) % EACH;
        }
        same("the highest descriptor", std::fs::read_link(&highest)?, path.clone())?;
        if context.progress.plant() {
            pipes[at].number += 1;
        }
    }
    Ok(())
}
