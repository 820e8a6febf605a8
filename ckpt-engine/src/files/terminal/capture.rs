//! Reading pseudo terminals.

use std::io;

use ckpt_format::files::{Kind, Terminal};

use super::{
    super::{
        Source,
        capture::Capture,
        find::{Found, Object, Refusal},
    },
    Drained, look,
};
use crate::{
    procfs::Status,
    sys::tty::{self, Query},
};

/// Which side of a pseudo terminal a descriptor is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in super::super) enum Side {
    Master,
    Slave,
    /// The slave, opened as `/dev/tty`.
    Controlling,
}

/// The side, for a character device that is one.
pub(in super::super) fn side(object: &Object) -> Option<Side> {
    let (major, minor) = (libc::major(object.status.special), libc::minor(object.status.special));
    match (major, minor) {
        (5, 2) => Some(Side::Master),
        (5, 0) => Some(Side::Controlling),
        (136..=143, _) => Some(Side::Slave),
        _ => None,
    }
}

/// Which terminal of the VE it is. All of a VE's terminals come from one file system.
fn index(object: &Object, side: Side) -> io::Result<u32> {
    let number = |device: u64| (libc::major(device) - 136) * 256 + libc::minor(device);
    Ok(match side {
        Side::Master => tty::query(object.fd(), Query::Index)?.cast_unsigned(),
        Side::Slave => number(object.status.special),
        Side::Controlling => {
            // The old encoding: twelve bits of major between eight and twelve of minor.
            let device = tty::query(object.fd(), Query::Device)?.cast_unsigned();
            let major = device >> 8 & 0xfff;
            let minor = device & 0xff | device >> 12 & 0xfff00;
            number(libc::makedev(major, minor))
        }
    })
}

/// The first object that is this side of this terminal.
fn find(found: &Found, wanted: u32, master: bool) -> Option<usize> {
    found.objects.iter().position(|object| {
        let is_wanted = |side| index(object, side).is_ok_and(|index| index == wanted);
        let device = object.file_type() == libc::S_IFCHR && !object.is_path_only();
        device
            && side(object).is_some_and(|side| (side == Side::Master) == master && is_wanted(side))
    })
}

fn is_hung(object: &Object) -> bool {
    tty::settings(object.fd()).is_err()
}

/// Refuses a slave whose master is outside the VE.
pub(in super::super) fn check(found: &Found, object: &Object, side: Side) -> Result<(), Refusal> {
    look::prepare();
    if side == Side::Master || is_hung(object) || find(found, index(object, side)?, true).is_some()
    {
        return Ok(());
    }
    Err(Refusal::new(
        "a terminal whose other side is outside the VE",
        "close the session (vzctl enter or a console) that was opened from the host",
    ))
}

pub(in super::super) fn capture(
    capture: &mut Capture<'_>,
    place: usize,
    side: Side,
) -> Result<Kind, Refusal> {
    let object = &capture.found.objects[place];
    let index = index(object, side)?;
    let terminal = match capture.terminals.get(&index) {
        Some(&terminal) => terminal,
        None => {
            let terminal =
                u32::try_from(capture.files.terminals.len()).map_err(io::Error::other)?;
            let read = read(capture, place, index)?;
            capture.terminals.insert(index, terminal);
            capture.files.terminals.push(read);
            terminal
        }
    };
    Ok(match side {
        Side::Master => Kind::PtyMaster { terminal },
        Side::Slave | Side::Controlling => {
            let by_controlling_name = side == Side::Controlling;
            Kind::PtySlave { terminal, by_controlling_name }
        }
    })
}

fn read(capture: &mut Capture<'_>, place: usize, index: u32) -> Result<Terminal, Refusal> {
    let source = capture.source;
    let objects = &capture.found.objects;
    let slave = find(&capture.found, index, false).map(|place| &objects[place]);
    let node = slave.map_or(&objects[place], |slave| slave).status;
    let mut terminal = Terminal {
        index,
        mode: node.mode & 0o7777,
        uid: source.inside(node.uid),
        gid: source.inside(node.gid),
        ..Terminal::default()
    };
    let Some(master) = find(&capture.found, index, true).map(|place| &objects[place]) else {
        // The master is closed: whoever holds the slave sees its end.
        terminal.hung_up = true;
        return Ok(terminal);
    };
    let fd = master.fd();
    terminal.settings = tty::settings(fd)?.to_vec();
    terminal.window = tty::window(fd)?;
    terminal.packet_mode = tty::query(fd, Query::PacketMode)? != 0;
    terminal.exclusive = tty::query(fd, Query::Exclusive)? != 0;
    terminal.locked = tty::query(fd, Query::Locked)? != 0;
    terminal.hung_up = slave.is_none() && is_left(master)?;
    if slave.is_none() {
        // Nobody has changed the node of a terminal that only its master holds.
        (terminal.mode, terminal.gid) = (0o620, 5);
    }
    // Without a session these fail, and so they do for a session outside the VE.
    terminal.session = tty::query(fd, Query::Session).map_or(0, |pid| inside(source, pid));
    terminal.foreground = tty::query(fd, Query::Foreground).map_or(0, |pid| inside(source, pid));
    let slave = slave.map(Object::fd);
    if let Ok(sight) = look::at(fd, slave) {
        return Ok(sight.add_to(terminal));
    }
    if let Some(drained) = Drained::new(fd, slave)? {
        terminal.output.clone_from(&drained.output);
        terminal.input.clone_from(&drained.input);
        capture.undo.terminals.push(drained);
    }
    Ok(terminal)
}

fn is_left(master: &Object) -> io::Result<bool> {
    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
    let mut polled = [PollFd::new(master.fd(), PollFlags::POLLIN)];
    poll(&mut polled, PollTimeout::ZERO)?;
    Ok(polled[0].revents().is_some_and(|events| events.contains(PollFlags::POLLHUP)))
}

/// The number inside the VE of a session or group, whose first process may be gone.
fn inside(source: &Source<'_>, host_pid: i32) -> i32 {
    if host_pid <= 0 {
        return 0;
    }
    if let Some(pid) = source.pid_inside(host_pid) {
        return pid;
    }
    source.processes.iter().find_map(|holder| in_status(holder.host_pid, host_pid)).unwrap_or(0)
}

/// "NSpgid: 4711 12" and "NSsid: ..." of a member: the number outside and the one inside.
fn in_status(member: i32, host_pid: i32) -> Option<i32> {
    let status = Status::read(member).ok()?;
    ["NSpgid", "NSsid"].into_iter().find_map(|key| {
        let outside = status.number(key, 10).ok()?;
        (outside == u64::from(host_pid.unsigned_abs())).then(|| status.in_ve(key).ok())?
    })
}
