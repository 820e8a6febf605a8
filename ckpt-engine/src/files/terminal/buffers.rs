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

fn word(settings: &Settings, at: usize) -> u32 {
    let mut word = [0; 4];
    word.copy_from_slice(&settings[at..at + 4]);
    u32::from_ne_bytes(word)
}

fn flags(settings: &mut Settings, at: usize, change: impl FnOnce(u32) -> u32) {
    let word = change(word(settings, at));
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
    // The settings may change when it has arrived.
    arrive(slave)?;
    tty::set_settings(slave, settings)?;
    filled
}

/// Fills the input so that each byte is what it was: `marks` tells which end a read. The settings
/// stay as given but for the time of writing, in nothing of which packet mode tells news.
pub(super) fn type_in(
    master: BorrowedFd<'_>,
    slave: BorrowedFd<'_>,
    settings: &Settings,
    input: &[u8],
    marks: &[u32],
) -> io::Result<()> {
    if input.is_empty() {
        return Ok(());
    }
    let mut literal = literal(settings);
    let flow = word(settings, INPUT) & libc::IXON;
    let flow_characters = [libc::VSTART, libc::VSTOP].map(|place| settings[CHARACTERS + place]);
    let mut text = input.to_vec();
    if word(settings, LOCAL) & libc::ICANON != 0 {
        let is_unused =
            |byte: &u8| *byte != b'\n' && !flow_characters.contains(byte) && !input.contains(byte);
        let mut unused = (1..=u8::MAX).filter(is_unused);
        let (Some(end), Some(next)) = (unused.next(), unused.next()) else {
            return Err(io::Error::other("a line of a terminal with all characters there are"));
        };
        text = keystrokes(input, marks, (end, next), flow_characters);
        literal[CHARACTERS + libc::VEOF] = end;
        literal[CHARACTERS + libc::VLNEXT] = next;
        literal[CHARACTERS + libc::VEOL] = 0;
        literal[CHARACTERS + libc::VEOL2] = 0;
        flags(&mut literal, LOCAL, |word| word | libc::IEXTEN);
    }
    // Without lines nothing is literal that means to stop or to go on.
    let is_lines = text.len() != input.len() || word(settings, LOCAL) & libc::ICANON != 0;
    if is_lines || !input.iter().any(|byte| flow_characters.contains(byte)) {
        flags(&mut literal, INPUT, |_| flow);
        for (place, character) in [libc::VSTART, libc::VSTOP].into_iter().zip(flow_characters) {
            literal[CHARACTERS + place] = character;
        }
    }
    tty::set_settings(slave, &literal)?;
    let written = write_all(master, &text);
    arrive(slave)?;
    tty::set_settings(slave, settings)?;
    written
}

/// What is to be typed for these bytes, with a character that ends the input and one that makes the
/// next one literal.
fn keystrokes(input: &[u8], marks: &[u32], (end, next): (u8, u8), flow: [u8; 2]) -> Vec<u8> {
    let mut typed = Vec::with_capacity(input.len());
    let mut marks = marks.iter().copied().peekable();
    for (place, &byte) in (0..).zip(input) {
        let ends = marks.next_if_eq(&place).is_some();
        match byte {
            b'\n' if ends => typed.push(byte),
            0 if ends => typed.push(end),
            // Another character that ended a line: whatever was that then.
            _ if ends => typed.extend([next, byte, end]),
            b'\n' => typed.extend([next, byte]),
            _ if flow.contains(&byte) => typed.extend([next, byte]),
            _ => typed.push(byte),
        }
    }
    typed
}

/// What the master has written is on its way to the slave; polling makes it arrive.
fn arrive(slave: BorrowedFd<'_>) -> io::Result<()> {
    let mut polled = [PollFd::new(slave, PollFlags::POLLIN)];
    poll(&mut polled, PollTimeout::ZERO).map(drop).map_err(io::Error::from)
}

/// Fills the output, which is not to be processed again.
pub(super) fn print(slave: BorrowedFd<'_>, settings: &Settings, output: &[u8]) -> io::Result<()> {
    if output.is_empty() {
        return Ok(());
    }
    let mut plain = *settings;
    flags(&mut plain, OUTPUT, |word| word & !libc::OPOST);
    tty::set_settings(slave, &plain)?;
    let written = write_all(slave, output);
    tty::set_settings(slave, settings)?;
    written
}

/// Stops what the slave writes as the stop character does.
pub(super) fn stop(
    master: BorrowedFd<'_>,
    slave: BorrowedFd<'_>,
    settings: &Settings,
) -> io::Result<()> {
    write_all(master, &settings[CHARACTERS + libc::VSTOP..][..1])?;
    arrive(slave)
}

/// Lets packet mode tell that the use of the characters to stop and to go on has begun or ended.
pub(super) fn tell_of_flow(slave: BorrowedFd<'_>, settings: &Settings) -> io::Result<()> {
    let mut other = *settings;
    let is_on = word(settings, INPUT) & libc::IXON != 0
        && settings[CHARACTERS + libc::VSTART] == 0o21
        && settings[CHARACTERS + libc::VSTOP] == 0o23;
    if is_on {
        flags(&mut other, INPUT, |word| word & !libc::IXON);
    } else {
        flags(&mut other, INPUT, |word| word | libc::IXON);
        other[CHARACTERS + libc::VSTART] = 0o21;
        other[CHARACTERS + libc::VSTOP] = 0o23;
    }
    tty::set_settings(slave, &other)?;
    tty::set_settings(slave, settings)
}

pub(super) fn write_all(fd: BorrowedFd<'_>, data: &[u8]) -> io::Result<()> {
    if data.is_empty() {
        return Ok(());
    }
    let flags = query(fd, Query::GetFlags)?;
    change(fd, Change::SetFlags, flags | libc::O_NONBLOCK)?;
    let written = File::from(fd.try_clone_to_owned()?).write_all(data);
    change(fd, Change::SetFlags, flags)?;
    written
}
