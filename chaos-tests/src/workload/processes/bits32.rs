//! Programs of 32 bits, for the i386 interface of the kernel.

use std::fs;
use std::io::{ErrorKind, PipeReader, Read};
use std::os::fd::AsFd;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use ckpt_engine::sys::program::bits32::{Within, image};
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::workload::context::Context;
use crate::workload::outcome::{Failure, LATE, ensure, same};

/// A program that checks itself, and tells of each round.
struct Program {
    child: Child,
    rounds: PipeReader,
    heard: Instant,
}

impl Program {
    fn start(file: &Path, mode: &str) -> Result<Self, Failure> {
        let (rounds, told) = std::io::pipe()?;
        fcntl(rounds.as_fd(), FcntlArg::F_SETFL(OFlag::O_NONBLOCK))?;
        let child = Command::new(file).arg(mode).stdin(Stdio::null()).stdout(told).spawn()?;
        Ok(Self { child, rounds, heard: Instant::now() })
    }

    /// Fails if it has ended, which it does at the first wrong result, or stands still.
    #[track_caller]
    fn check(&mut self) -> Result<(), Failure> {
        let mut told = [0; 4096];
        match self.rounds.read(&mut told) {
            Ok(1..) => self.heard = Instant::now(),
            Ok(_) => {}
            Err(error) if error.kind() == ErrorKind::WouldBlock => {}
            Err(error) => return Err(error.into()),
        }
        if let Some(status) = self.child.try_wait()? {
            return Err(Failure::new(format!("a program of 32 bits ended: {status}")));
        }
        ensure(self.heard.elapsed() < LATE, || "a program of 32 bits stands still".to_owned())
    }

    /// A signal that it does not expect from anybody but itself.
    fn disturb(&self) -> Result<(), Failure> {
        let pid = Pid::from_raw(self.child.id().cast_signed());
        Ok(kill(pid, Signal::SIGUSR1)?)
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn write_program(context: &Context) -> Result<PathBuf, Failure> {
    let file = context.path("program");
    fs::write(&file, image())?;
    fs::set_permissions(&file, fs::Permissions::from_mode(0o755))?;
    Ok(file)
}

/// Runs it in one of its ways. In between it is started anew, and has to end well.
fn run(context: &mut Context, mode: &str) -> Result<(), Failure> {
    const PAUSE: Duration = Duration::from_millis(20);
    let file = write_program(context)?;
    let mut program = Program::start(&file, mode)?;
    let mut steps = 0_u32;
    while context.step(PAUSE)? {
        if context.progress.plant() {
            program.disturb()?;
        }
        program.check()?;
        steps += 1;
        if steps.is_multiple_of(10) {
            let status = Command::new(&file).arg("once").stdin(Stdio::null()).status()?;
            ensure(status.success(), || format!("a new program of 32 bits ended: {status}"))?;
        }
    }
    Ok(())
}

/// Thread-locals, registers, signals with their stack, an interval timer, a heap.
pub(super) fn all(context: &mut Context) -> Result<(), Failure> {
    run(context, "all")
}

/// Waits with an end, long enough to be interrupted several times.
pub(super) fn waits(context: &mut Context) -> Result<(), Failure> {
    run(context, "waits")
}

/// Threads with thread-locals, a futex, and threads that come and go.
pub(super) fn threads(context: &mut Context) -> Result<(), Failure> {
    run(context, "threads")
}

/// A process that is a program of 32 bits and one of 64 in turn.
pub(super) fn executing(context: &mut Context) -> Result<(), Failure> {
    run(context, "executing")
}

/// A program of 64 bits that is in code of 32 most of the time.
pub(super) fn within(context: &mut Context) -> Result<(), Failure> {
    const TURNS: u32 = 10_000_000;
    let mut within = Within::new()?;
    let mut from = 1_u32;
    while context.step(Duration::from_millis(2))? {
        let expected = from.wrapping_add(TURNS.wrapping_mul(3));
        let turns = if context.progress.plant() { TURNS - 1 } else { TURNS };
        from = within.count(turns, from);
        same("a sum that code of 32 bits has made", from, expected)?;
    }
    Ok(())
}
