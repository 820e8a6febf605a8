//! A pseudo terminal: at one end a program that types, at the other a session that it controls.

use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::path::PathBuf;
use std::time::Duration;

use ckpt_engine::sys::program::terminal;
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
