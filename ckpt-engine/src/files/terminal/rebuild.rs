//! Making pseudo terminals.

use std::{
    collections::{BTreeMap, HashMap},
    io,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::fs::fchown,
    },
};

use ckpt_format::{
    files::{FileId, Files, Kind, Terminal},
    process::Descriptor,
};
use nix::{
    fcntl::OFlag,
    sys::stat::{Mode, fchmod},
};

use super::{
    super::{
        Argument, Remote,
        rebuild::{Rebuild, RebuildError},
    },
    buffers,
};
use crate::sys::tty::{self, Query, Settings};

/// `TIOCPKT_*`. That of a stop comes with the stop.
const FLUSH_READ: u8 = 1;
const FLUSH_WRITE: u8 = 2;
const START: u8 = 8;
const NO_STOP: u8 = 16;
const DO_STOP: u8 = 32;

/// Where the VE's terminals come from.
const PTMX: &str = "/dev/pts/ptmx";

/// A terminal that is being made.
#[derive(Debug)]
pub(in super::super) struct Made {
    master: OwnedFd,
    /// Kept open until all is settled, because what is written to a master without a slave is
    /// lost, and so that no master sees its slaves come and go.
    slave: Option<OwnedFd>,
    /// The master as it was opened may be given out once.
    master_free: bool,
}

/// By place in [`Files::terminals`].
pub(in super::super) type Terminals = HashMap<u32, Made>;

fn failed(source: io::Error) -> RebuildError {
    RebuildError::Kernel { object: "pseudo terminal", source }
}

/// Opens terminals in the order of their numbers: the kernel gives out the lowest free one.
fn make_all(files: &Files) -> Result<Terminals, RebuildError> {
    let mut order: Vec<(u32, u32)> = Vec::new();
    for (place, terminal) in files.terminals.iter().enumerate() {
        order.push((terminal.index, u32::try_from(place).map_err(|_| RebuildError::Damaged)?));
    }
    order.sort_unstable();
    let mut passed = Vec::new();
    let mut made = Terminals::new();
    for (index, place) in order {
        loop {
            let flags = OFlag::O_RDWR | OFlag::O_NOCTTY | OFlag::O_CLOEXEC;
            let master = nix::fcntl::open(PTMX, flags, Mode::empty()).map_err(|errno| {
                RebuildError::Open { path: PTMX.to_owned(), source: errno.into() }
            })?;
            let number = tty::query(master.as_fd(), Query::Index).map_err(failed)?.cast_unsigned();
            if number > index {
                return Err(failed(io::ErrorKind::AddrInUse.into()));
            }
            if number == index {
                made.insert(place, Made { master, slave: None, master_free: true });
                break;
            }
            passed.push(master);
        }
    }
    for (place, terminal) in files.terminals.iter().enumerate() {
        let place = u32::try_from(place).map_err(|_| RebuildError::Damaged)?;
        let has_slave = files
            .files
            .iter()
            .any(|file| matches!(file.kind, Kind::PtySlave { terminal, .. } if terminal == place));
        let Some(made) = made.get_mut(&place) else { return Err(RebuildError::Damaged) };
        tty::set_locked(made.master.as_fd(), false).map_err(failed)?;
        if has_slave || terminal.hung_up {
            let slave = tty::slave(made.master.as_fd(), libc::O_RDWR).map_err(failed)?;
            made.slave = Some(slave);
        }
    }
    Ok(made)
}

/// Makes one description of a side of a terminal.
pub(in super::super) fn rebuild(
    rebuild: &mut Rebuild<'_>,
    terminal: u32,
    master: bool,
    flags: u32,
) -> Result<OwnedFd, RebuildError> {
    if rebuild.terminals.is_empty() {
        rebuild.terminals = make_all(rebuild.files)?;
    }
    let made = rebuild.terminals.get_mut(&terminal).ok_or(RebuildError::Damaged)?;
    let wanted = flags.cast_signed() & (libc::O_ACCMODE | libc::O_NONBLOCK);
    if !master {
        return tty::slave(made.master.as_fd(), wanted).map_err(failed);
    }
    // A master cannot be opened again: each opening makes a terminal of its own.
    if !std::mem::take(&mut made.master_free) {
        return Err(RebuildError::Damaged);
    }
    let fd = made.master.try_clone().map_err(failed)?;
    super::super::rebuild::set_status(fd.as_fd(), flags).map_err(failed)?;
    Ok(fd)
}

/// Gives the terminals their state, once all their descriptions are there.
pub(in super::super) fn settle(rebuild: &mut Rebuild<'_>) -> Result<(), RebuildError> {
    let id_base = rebuild.target.id_base;
    for (place, made) in &rebuild.terminals {
        let terminal = rebuild.files.terminals.get(*place as usize).ok_or(RebuildError::Damaged)?;
        set_state(made, terminal, id_base).map_err(failed)?;
    }
    Ok(())
}

fn set_state(made: &Made, terminal: &Terminal, id_base: u32) -> io::Result<()> {
    let master = made.master.as_fd();
    if let Some(slave) = &made.slave {
        fchown(slave, Some(id_base + terminal.uid), Some(id_base + terminal.gid))?;
        fchmod(slave.as_fd(), Mode::from_bits_truncate(terminal.mode))?;
    }
    // One whose master was closed has no state any more.
    let Ok(settings) = Settings::try_from(terminal.settings.as_slice()) else { return Ok(()) };
    tty::set_settings(master, &settings)?;
    tty::set_window(master, &terminal.window)?;
    let slave = made.slave.as_ref().map(AsFd::as_fd);
    if let Some(slave) = slave {
        set_contents(master, slave, terminal, &settings)?;
    } else if terminal.packet_mode {
        tty::set_packet_mode(master, true)?;
    }
    if terminal.exclusive {
        tty::set_exclusive(slave.unwrap_or(master))?;
    }
    if terminal.locked {
        tty::set_locked(master, true)?;
    }
    Ok(())
}

/// Fills the buffers, stops what was stopped, and lets packet mode tell what it had to tell, no more.
fn set_contents(
    master: BorrowedFd<'_>,
    slave: BorrowedFd<'_>,
    terminal: &Terminal,
    settings: &Settings,
) -> io::Result<()> {
    let is_news = |bits: u8| terminal.packet_mode && terminal.news & bits != 0;
    let has_news = is_news(u8::MAX);
    if has_news {
        tty::set_packet_mode(master, true)?;
        // Of empty buffers.
        for (bit, which) in [(FLUSH_READ, libc::TCIFLUSH), (FLUSH_WRITE, libc::TCOFLUSH)] {
            if is_news(bit) {
                tty::flush(slave, which)?;
            }
        }
        if is_news(NO_STOP | DO_STOP) {
            buffers::tell_of_flow(slave, settings)?;
        }
    }
    match &terminal.marks {
        Some(marks) => {
            buffers::print(slave, settings, &terminal.output)?;
            buffers::type_in(master, slave, settings, &terminal.input, marks)?;
        }
        None => {
            buffers::fill(master, Some(slave), settings, &terminal.output, &terminal.input)?;
        }
    }
    buffers::write_all(master, &terminal.typed)?;
    if is_news(START) {
        tty::set_flow(slave, false)?;
        tty::set_flow(slave, true)?;
    }
    if terminal.held {
        tty::set_flow(slave, false)?;
    }
    if terminal.stopped {
        buffers::stop(master, slave, settings)?;
    }
    if terminal.master_held {
        tty::set_flow(master, false)?;
    }
    // Last, because changes before it would be told to the reader of the packets.
    if terminal.packet_mode && !has_news {
        tty::set_packet_mode(master, true)?;
    }
    Ok(())
}

/// Lets session leaders take their controlling terminals, and set the foreground groups.
pub(in super::super) fn finish(
    files: &Files,
    tables: &BTreeMap<i32, Vec<Descriptor>>,
    remote: &mut dyn Remote,
) -> Result<(), RebuildError> {
    for (place, terminal) in files.terminals.iter().enumerate() {
        // A leader that is gone has left its terminal to nobody.
        let Some(table) = tables.get(&terminal.session) else { continue };
        let is_slave = |file: FileId| {
            matches!(
                files.get(file).map(|file| &file.kind),
                Some(Kind::PtySlave { terminal, .. }) if *terminal as usize == place
            )
        };
        let pid = terminal.session;
        let foreground = remote.number(pid, terminal.foreground);
        let mut call = |number: i64, arguments: [Argument<'_>; 3]| {
            let [a, b, c] = arguments;
            let none = || Argument::Value(0);
            remote.call(pid, number, [a, b, c, none(), none(), none()]).map_err(|source| {
                RebuildError::Remote { pid, object: "controlling terminal", source }
            })
        };
        let value = |value: u64| Argument::Value(value);
        let held = table.iter().find(|held| is_slave(held.file));
        let path = format!("/dev/pts/{}\0", terminal.index);
        let fd = match held {
            Some(held) => u64::from(held.fd.cast_unsigned()),
            None => {
                let flags = (libc::O_RDWR | libc::O_NOCTTY) as u64;
                call(libc::SYS_open, [Argument::In(path.as_bytes()), value(flags), value(0)])?
            }
        };
        call(libc::SYS_ioctl, [value(fd), value(libc::TIOCSCTTY), value(0)])?;
        if terminal.foreground != 0 {
            let group = foreground.ok_or(RebuildError::Damaged)?.to_ne_bytes();
            call(libc::SYS_ioctl, [value(fd), value(libc::TIOCSPGRP), Argument::In(&group)])?;
        }
        if held.is_none() {
            call(libc::SYS_close, [value(fd), value(0), value(0)])?;
        }
    }
    Ok(())
}
