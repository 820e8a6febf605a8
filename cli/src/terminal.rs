//! `vzctl enter`: a terminal of the VE, shown on the user's own.
//!
//! The daemon only opens it: everything typed and printed goes through this program, so a
//! session survives a restart of the daemon.

use std::{
    fs::File,
    io::{self, Read, Write},
    os::fd::{AsFd, OwnedFd},
    sync::mpsc,
    thread,
};

use nix::sys::{
    signal::{SigSet, Signal},
    termios::{SetArg, Termios, cfmakeraw, tcgetattr, tcsetattr},
};
use node::{
    api::{Event, ExecRequest, Failure, Request, VeRequest},
    ve::Exec,
};

use crate::{talk::Common, vzctl::interactive};

/// Opens a shell in a VE, or runs a command there on a terminal.
pub(crate) fn enter(common: &Common, ve: &str, command: Option<String>) -> Result<u8, Failure> {
    let arguments = match command {
        Some(command) => vec!["/bin/sh".to_owned(), "-c".to_owned(), command],
        None => ["/bin/sh", "-c", "[ -x /bin/bash ] && exec /bin/bash -l; exec /bin/sh -l"]
            .map(str::to_owned)
            .into(),
    };
    let kind = std::env::var("TERM").unwrap_or_else(|_| "dumb".to_owned());
    let exec = Exec { arguments, terminal: Some(kind) };
    let request = Request::Ve(VeRequest::Exec(ExecRequest { ve: ve.to_owned(), exec }));
    // Before any thread is started, so that all inherit it and only the one that waits gets it.
    let mut resize = SigSet::empty();
    resize.add(Signal::SIGWINCH);
    let _ = resize.thread_block();
    let raw = interactive().then(Raw::start).transpose();
    let raw = raw.map_err(|source| Failure::new("terminal", 3, format!("terminal: {source}")))?;
    let (done, output_ended) = mpsc::channel();
    let outcome = common.connect()?.call(&request, &[], &mut |event, descriptor| {
        if let (Event::Terminal, Some(master)) = (event, descriptor) {
            relay(master, resize, done.clone());
        }
    });
    drop(done);
    let code: i32 = outcome?;
    // The last output is still on its way when the end of the program is known.
    let _ = output_ended.recv();
    drop(raw);
    Ok(u8::try_from(code & 0xff).unwrap_or(255))
}

/// Passes bytes both ways until the other side ends.
fn relay(master: OwnedFd, resize: SigSet, done: mpsc::Sender<()>) {
    let Ok((input, output)) = master.try_clone().and_then(|it| Ok((it, master.try_clone()?)))
    else {
        return;
    };
    let _ = copy_size(&master);
    thread::spawn(move || {
        // Ends with the process; nothing waits for the user's next key.
        let _ = pump(io::stdin(), File::from(input));
    });
    thread::spawn(move || {
        while resize.wait().is_ok() {
            if copy_size(&master).is_err() {
                return;
            }
        }
    });
    thread::spawn(move || {
        // The other side's end is an error of a terminal, not an end of file.
        let _ = pump(File::from(output), io::stdout());
        let _ = done.send(());
    });
}

fn pump(mut from: impl Read, mut to: impl Write) -> io::Result<()> {
    let mut buffer = [0; 8192];
    loop {
        match from.read(&mut buffer) {
            Ok(0) => return Ok(()),
            Ok(length) => {
                to.write_all(&buffer[..length])?;
                to.flush()?;
            }
            Err(source) if source.kind() == io::ErrorKind::Interrupted => (),
            Err(source) => return Err(source),
        }
    }
}

/// Gives the VE's terminal the size of the user's.
fn copy_size(master: &OwnedFd) -> io::Result<()> {
    ckpt_engine::sys::clone::copy_window_size(io::stdin().as_fd(), master.as_fd())
}

/// The user's terminal passing every key on, until dropped.
struct Raw(Termios);

impl Raw {
    fn start() -> io::Result<Self> {
        let before = tcgetattr(io::stdin())?;
        let mut raw = before.clone();
        cfmakeraw(&mut raw);
        tcsetattr(io::stdin(), SetArg::TCSANOW, &raw)?;
        Ok(Self(before))
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        let _ = tcsetattr(io::stdin(), SetArg::TCSANOW, &self.0);
    }
}
