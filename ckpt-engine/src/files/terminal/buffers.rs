//! The two buffers of a terminal: reading them out, and filling them again.

use std::{
    fs::File,
    io::{self, Read, Write},
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::sys::{
    descriptor::{Change, Count, Query, change, count, query},
    tty::{self, Settings},
};

const INPUT: usize = 0;
const OUTPUT: usize = 4;
const LOCAL: usize = 12;
const CHARACTERS: usize = 17;

fn flags(settings: &mut Settings, at: usize, change: impl FnOnce(u32) -> u32) {
    let mut word = [0; 4];
    word.copy_from_slice(&settings[at..at + 4]);
    let word = change(u32::from_ne_bytes(word));
    settings[at..at + 4].copy_from_slice(&word.to_ne_bytes());
}

/// Nothing that is written is changed or answered; lines are still lines.
fn literal(settings: &Settings) -> Settings {
    let mut literal = *settings;
    flags(&mut literal, INPUT, |_| 0);
    flags(&mut literal, OUTPUT, |word| word & !libc::OPOST);
    flags(&mut literal, LOCAL, |word| {
        word & !(libc::ECHO | libc::ECHONL | libc::ISIG | libc::IEXTEN)
    });
    for character in [
        libc::VINTR,
        libc::VQUIT,
        libc::VERASE,
        libc::VKILL,
        libc::VSTART,
        libc::VSTOP,
        libc::VSUSP,
        libc::VREPRINT,
        libc::VDISCARD,
        libc::VWERASE,
        libc::VLNEXT,
    ] {
        literal[CHARACTERS + character] = 0;
    }
    literal
}

/// Everything can be read at once, a line that is not complete too.
fn raw(settings: &Settings) -> Settings {
    let mut raw = literal(settings);
    flags(&mut raw, LOCAL, |word| word & !libc::ICANON);
    raw[CHARACTERS + libc::VMIN] = 0;
    raw[CHARACTERS + libc::VTIME] = 0;
    raw
}

/// Reads all there is. The poll makes the kernel pass on what it has not yet.
fn read_out(fd: BorrowedFd<'_>) -> io::Result<Vec<u8>> {
    let mut all = Vec::new();
    let mut buffer = [0; 4096];
    let flags = query(fd, Query::GetFlags)?;
    change(fd, Change::SetFlags, flags | libc::O_NONBLOCK)?;
    let result = loop {
        let mut polled = [PollFd::new(fd, PollFlags::POLLIN)];
        poll(&mut polled, PollTimeout::ZERO)?;
        let readable = polled[0].revents().is_some_and(|events| events.contains(PollFlags::POLLIN));
        if !readable {
            break Ok(());
        }
        match File::from(fd.try_clone_to_owned()?).read(&mut buffer) {
            Ok(0) => break Ok(()),
            Ok(length) => all.extend_from_slice(&buffer[..length]),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => break Ok(()),
            // A master without a slave.
            Err(error) if error.raw_os_error() == Some(libc::EIO) => break Ok(()),
            Err(error) => break Err(error),
        }
    };
    change(fd, Change::SetFlags, flags)?;
    result.map(|()| all)
}

/// What was read out of a terminal of the VE; put back when this is dropped.
#[derive(Debug)]
pub(in super::super) struct Drained {
    master: OwnedFd,
    slave: Option<OwnedFd>,
    settings: Settings,
    pub(super) output: Vec<u8>,
    pub(super) input: Vec<u8>,
}

impl Drained {
    /// Reads out both buffers; `None` when both are empty.
    pub(super) fn new(
        master: BorrowedFd<'_>,
        slave: Option<BorrowedFd<'_>>,
    ) -> io::Result<Option<Self>> {
        let settings = tty::settings(master)?;
        let mut drained = Self {
            master: master.try_clone_to_owned()?,
            slave: slave.map(|slave| slave.try_clone_to_owned()).transpose()?,
            settings,
            output: Vec::new(),
            input: Vec::new(),
        };
        if has_output(master)? {
            // In packet mode the first byte of each read says what follows.
            let packets = tty::query(master, tty::Query::PacketMode)? != 0;
            if packets {
                tty::set_packet_mode(master, false)?;
            }
            drained.output = read_out(master)?;
            if packets {
                tty::set_packet_mode(master, true)?;
            }
        }
        if let Some(slave) = slave {
            tty::set_settings(slave, &raw(&settings))?;
            let input = read_out(slave);
            tty::set_settings(slave, &settings)?;
            drained.input = input?;
        }
        Ok((!drained.output.is_empty() || !drained.input.is_empty()).then_some(drained))
    }

    /// The originals will not run again.
    pub(in super::super) fn seal(mut self) {
        self.output.clear();
        self.input.clear();
    }
}

fn has_output(master: BorrowedFd<'_>) -> io::Result<bool> {
    let mut polled = [PollFd::new(master, PollFlags::POLLIN)];
    poll(&mut polled, PollTimeout::ZERO)?;
    Ok(count(master, Count::Readable)? > 0)
}

impl Drop for Drained {
    fn drop(&mut self) {
        let slave = self.slave.as_ref().map(AsFd::as_fd);
        let (output, input) = (&self.output, &self.input);
        if let Err(error) = fill(self.master.as_fd(), slave, &self.settings, output, input) {
            tracing::warn!(%error, "a terminal has lost what was not read yet");
        }
    }
}

/// Fills both buffers, and leaves the settings as given.
pub(super) fn fill(
    master: BorrowedFd<'_>,
    slave: Option<BorrowedFd<'_>>,
    settings: &Settings,
    output: &[u8],
    input: &[u8],
) -> io::Result<()> {
    let Some(slave) = slave.filter(|_| !output.is_empty() || !input.is_empty()) else {
        return Ok(());
    };
    tty::set_settings(slave, &literal(settings))?;
    let filled = write_all(slave, output).and_then(|()| write_all(master, input));
    // What the master has written is on its way to the slave; the settings may change when it
    // has arrived, and polling makes it arrive.
    let mut polled = [PollFd::new(slave, PollFlags::POLLIN)];
    poll(&mut polled, PollTimeout::ZERO)?;
    tty::set_settings(slave, settings)?;
    filled
}

fn write_all(fd: BorrowedFd<'_>, data: &[u8]) -> io::Result<()> {
    if data.is_empty() {
        return Ok(());
    }
    let flags = query(fd, Query::GetFlags)?;
    change(fd, Change::SetFlags, flags | libc::O_NONBLOCK)?;
    let written = File::from(fd.try_clone_to_owned()?).write_all(data);
    change(fd, Change::SetFlags, flags)?;
    written
}
