//! A pseudo terminal: at one end a program that types, at the other a session that it controls.

use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::path::PathBuf;
use std::time::Duration;

use ckpt_engine::sys::program::terminal;
use ckpt_engine::sys::tty;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::pty::{Winsize, openpty};
use nix::sys::termios::{
    LocalFlags, SetArg, SpecialCharacterIndices, tcgetattr, tcgetsid, tcsetattr,
};
use nix::unistd::{getpgrp, getpid, setsid, tcgetpgrp};

use crate::workload::context::Context;
use crate::workload::outcome::{Failure, ensure, same};
use crate::workload::process::Child;

const SIZE: (u16, u16) = (43, 132);

pub(super) fn run(context: &mut Context) -> Result<(), Failure> {
    let size = Winsize { ws_row: SIZE.0, ws_col: SIZE.1, ws_xpixel: 0, ws_ypixel: 0 };
    let pty = openpty(&size, None)?;
    let mut settings = tcgetattr(&pty.slave)?;
    settings.local_flags.remove(LocalFlags::ECHO);
    settings.control_chars[SpecialCharacterIndices::VERASE as usize] = b'#';
    tcsetattr(&pty.slave, SetArg::TCSANOW, &settings)?;
    let path = std::fs::read_link(format!("/proc/self/fd/{}", pty.slave.as_raw_fd()))?;
    let shell = Child::start(context, "shell", |_| shell(&path))?;
    drop(pty.slave);
    let mut keyboard = File::from(pty.master);
    let mut screen = BufReader::new(keyboard.try_clone()?);
    // One question ahead, so that an answer is always on its way.
    keyboard.write_all(b"question 0\n")?;
    let mut turn = 0u64;
    while context.step(Duration::from_millis(10))? {
        shell.check()?;
        // The erase character takes back one wrong letter.
        let next = turn + 1;
        keyboard.write_all(format!("questionz# {next}\n").as_bytes())?;
        if context.progress.plant() {
            keyboard.write_all(b"noise\n")?;
        }
        let mut line = String::new();
        screen.read_line(&mut line)?;
        same("answer from a terminal", line.trim_end(), &format!("answer {turn}"))?;
        turn = next;
        same("window size", terminal::window(keyboard.as_fd())?, SIZE)?;
        let settings = tcgetattr(&keyboard)?;
        ensure(!settings.local_flags.contains(LocalFlags::ECHO), || "echo is on".to_owned())?;
        let erase = settings.control_chars[SpecialCharacterIndices::VERASE as usize];
        same("erase character", erase, b'#')?;
    }
    keyboard.write_all(b"exit\n")?;
    // What it still says must be read, or the terminal would be full.
    screen.read_line(&mut String::new())?;
    shell.finish()
}

/// A session with this terminal that answers lines.
fn shell(path: &PathBuf) -> Result<(), Failure> {
    setsid()?;
    // The first terminal that a leader without one opens becomes its own.
    let tty = File::options().read(true).write(true).open(path)?;
    let mut input = BufReader::new(tty.try_clone()?);
    let mut line = String::new();
    loop {
        line.clear();
        input.read_line(&mut line)?;
        if line == "exit\n" {
            return Ok(());
        }
        same("session of a terminal", tcgetsid(&tty)?, getpid())?;
        same("foreground group", tcgetpgrp(&tty)?, getpgrp())?;
        let own = File::open("/dev/tty")?;
        same("window size at /dev/tty", terminal::window(own.as_fd())?, SIZE)?;
        let number = line.trim_end().strip_prefix("question ");
        let number = number.ok_or_else(|| Failure::new(format!("typed: {line:?}")))?;
        (&tty).write_all(format!("answer {number}\n").as_bytes())?;
    }
}

/// What a terminal holds that is easily lost: where ends of input (^D) stand in it, that it was
/// stopped (^S), that packet mode has not told that yet, and what a program has said last.
pub(super) fn marks(context: &mut Context) -> Result<(), Failure> {
    let mut held = Held::new()?;
    let mut turn = 0u32;
    while context.step(Duration::from_millis(8))? {
        turn += 1;
        ensure(!is_writable(&held.program)?, || "a stopped terminal goes on".to_owned())?;
        if context.progress.plant() {
            held.keyboard.write_all(b"\x11")?;
        }
        if turn.is_multiple_of(40) {
            std::mem::replace(&mut held, Held::new()?).check()?;
        }
    }
    held.check()
}

struct Held {
    keyboard: File,
    program: File,
    /// Of another terminal, whose program has ended.
    left: File,
}

impl Held {
    fn new() -> Result<Self, Failure> {
        let pty = openpty(None, None)?;
        let mut settings = tcgetattr(&pty.slave)?;
        settings.local_flags.remove(LocalFlags::ECHO);
        tcsetattr(&pty.slave, SetArg::TCSANOW, &settings)?;
        let (mut keyboard, mut program) = (File::from(pty.master), File::from(pty.slave));
        program.write_all(b"said\n")?;
        tty::set_packet_mode(keyboard.as_fd(), true)?;
        // ^D ends the input, ^V makes the next character one of the text.
        keyboard.write_all(b"one\x04\x04two\x16\x04\x16\n\x16\0 \x16\x13end\nhalf\x13")?;
        let other = openpty(None, None)?;
        File::from(other.slave).write_all(b"last words")?;
        let held = Self { keyboard, program, left: other.master.into() };
        while is_writable(&held.program)? {
            std::thread::yield_now();
        }
        Ok(held)
    }

    fn check(mut self) -> Result<(), Failure> {
        same("news of a stop", next(&mut self.keyboard)?, b"\x04".to_vec())?;
        same("what was said before", next(&mut self.keyboard)?, b"\0said\r\n".to_vec())?;
        for text in [&b"one"[..], b"", b"two\x04\n\0 \x13end\n"] {
            same("up to an end of input", next(&mut self.program)?, text.to_vec())?;
        }
        self.keyboard.write_all(b"\x11 done\n")?;
        same("the rest of a line", next(&mut self.program)?, b"half done\n".to_vec())?;
        same("news of going on", next(&mut self.keyboard)?, b"\x08".to_vec())?;
        self.program.write_all(b"again")?;
        same("what is said then", next(&mut self.keyboard)?, b"\0again".to_vec())?;
        same("what was said last", next(&mut self.left)?, b"last words".to_vec())?;
        let end = self.left.read(&mut [0]).err().and_then(|error| error.raw_os_error());
        same("behind it", end, Some(libc::EIO))
    }
}

fn next(file: &mut File) -> Result<Vec<u8>, Failure> {
    let mut bytes = [0; 100];
    let count = file.read(&mut bytes)?;
    Ok(bytes[..count].to_vec())
}

fn is_writable(program: &File) -> Result<bool, Failure> {
    let mut polled = [PollFd::new(program.as_fd(), PollFlags::POLLOUT)];
    Ok(poll(&mut polled, PollTimeout::ZERO)? > 0)
}
