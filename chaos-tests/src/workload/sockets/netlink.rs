//! Conversations with the kernel over netlink.

use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use ckpt_engine::sys::socket::{self, End};

use super::plain::{receive, send, set};
use crate::workload::context::Context;
use crate::workload::outcome::{Failure, ensure, same};

const PAUSE: Duration = Duration::from_millis(5);

fn open(protocol: i32) -> Result<OwnedFd, Failure> {
    let netlink = socket::socket(libc::AF_NETLINK, libc::SOCK_RAW, protocol)?;
    socket::bind(netlink.as_fd(), &[libc::AF_NETLINK as u8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0])?;
    Ok(netlink)
}

fn port(netlink: &OwnedFd) -> Result<u32, Failure> {
    let address = socket::address(netlink.as_fd(), End::Local)?;
    let bytes = address.get(4..8).and_then(|bytes| bytes.try_into().ok());
    bytes.map(u32::from_ne_bytes).ok_or_else(|| Failure::new("a short address"))
}

fn request(kind: u16, flags: u16, number: u32, body: &[u8]) -> Vec<u8> {
    let mut bytes = ((16 + body.len()) as u32).to_ne_bytes().to_vec();
    bytes.extend(kind.to_ne_bytes());
    bytes.extend((flags | 1).to_ne_bytes());
    bytes.extend(number.to_ne_bytes());
    bytes.extend([0; 4]);
    bytes.extend(body);
    bytes
}

/// One message of an answer: kind, number, body.
type Message = (u16, u32, Vec<u8>);

fn messages(mut bytes: &[u8]) -> Result<Vec<Message>, Failure> {
    let mut found = Vec::new();
    while bytes.len() >= 16 {
        let word = |at: usize| u32::from_ne_bytes([0, 1, 2, 3].map(|by| bytes[at + by]));
        let length = word(0) as usize;
        ensure((16..=bytes.len()).contains(&length), || format!("a message of {length} bytes"))?;
        found.push((word(4) as u16, word(8), bytes[16..length].to_vec()));
        bytes = &bytes[length.next_multiple_of(4).min(bytes.len())..];
    }
    Ok(found)
}

const DONE: u16 = 3;
const DUMP: u16 = 0x300;

/// Reads a list to its end; returns how many entries of this kind it has.
fn list(netlink: &OwnedFd, kind: u16, number: u32) -> Result<usize, Failure> {
    let mut count = 0;
    let mut buffer = vec![0; 64 << 10];
    loop {
        let length = receive(netlink.as_fd(), &mut buffer)?;
        for (found, answered, _) in messages(&buffer[..length])? {
            same("number of an answer", answered, number)?;
            if found == DONE {
                return Ok(count);
            }
            same("kind of an answer", found, kind)?;
            count += 1;
        }
    }
}

/// Lists of links and addresses; the socket keeps its port.
pub(super) fn lists(context: &mut Context) -> Result<(), Failure> {
    let netlink = open(libc::NETLINK_ROUTE)?;
    let own = port(&netlink)?;
    let mut number = 0;
    while context.step(PAUSE)? {
        for (kind, body) in [(libc::RTM_NEWLINK, 16), (libc::RTM_NEWADDR, 8)] {
            number += 1;
            send(netlink.as_fd(), &request(kind + 2, DUMP, number, &vec![0; body]), &[])?;
            let count = list(&netlink, kind, number)?;
            ensure(count > 0, || "an empty list".to_owned())?;
        }
        same("port of a netlink socket", port(&netlink)?, own)?;
        if context.progress.plant() {
            send(netlink.as_fd(), &request(libc::RTM_GETLINK, DUMP, 0, &[0; 16]), &[])?;
        }
    }
    Ok(())
}

/// A question is asked, and its answer read a while later.
pub(super) fn waiting(context: &mut Context) -> Result<(), Failure> {
    let netlink = open(libc::NETLINK_ROUTE)?;
    let mut number = 0;
    let ask = |number: u32| {
        send(netlink.as_fd(), &request(libc::RTM_GETADDR, DUMP, number, &[0; 8]), &[])
    };
    ask(number)?;
    while context.step(Duration::from_millis(20))? {
        let count = list(&netlink, libc::RTM_NEWADDR, number)?;
        ensure(count > 0, || "an empty list".to_owned())?;
        number += 1;
        ask(number)?;
        if context.progress.plant() {
            number += 1;
        }
    }
    Ok(())
}

/// The same for one thing and for an acknowledgement.
pub(super) fn single(context: &mut Context) -> Result<(), Failure> {
    const ACKNOWLEDGE: u16 = 4;
    const ERROR: u16 = 2;
    const NOTHING: u16 = 1;
    let netlink = open(libc::NETLINK_ROUTE)?;
    let mut loopback = vec![0; 16];
    loopback[4] = 1;
    let ask = |number: u32| {
        let asked = if number.is_multiple_of(2) {
            request(libc::RTM_GETLINK, 0, number, &loopback)
        } else {
            request(NOTHING, ACKNOWLEDGE, number, &[])
        };
        send(netlink.as_fd(), &asked, &[])
    };
    let mut number = 0;
    ask(number)?;
    while context.step(Duration::from_millis(20))? {
        let mut buffer = vec![0; 64 << 10];
        let length = receive(netlink.as_fd(), &mut buffer)?;
        let found = messages(&buffer[..length])?;
        let Some((kind, answered, body)) = found.first() else {
            return Err(Failure::new("an empty answer"));
        };
        same("number of an answer", *answered, number)?;
        if number.is_multiple_of(2) {
            same("kind of an answer", *kind, libc::RTM_NEWLINK)?;
            same("number of the loopback device", body[4], 1)?;
        } else {
            same("kind of an answer", *kind, ERROR)?;
            same("error number", body[..4].to_vec(), vec![0; 4])?;
        }
        number += 1;
        ask(number)?;
        if context.progress.plant() {
            number += 1;
        }
    }
    Ok(())
}

/// Memberships in groups, of route, generic and uevent sockets.
pub(super) fn groups(context: &mut Context) -> Result<(), Failure> {
    const ADD: i32 = 1;
    const LIST: i32 = 9;
    let mut sockets = Vec::new();
    for (protocol, groups) in [
        (libc::NETLINK_ROUTE, &[1, 5, 9, 28][..]),
        (libc::NETLINK_KOBJECT_UEVENT, &[1]),
        (libc::NETLINK_GENERIC, &[16]),
    ] {
        let netlink = open(protocol)?;
        for group in groups {
            set(&netlink, (libc::SOL_NETLINK, ADD, *group))?;
        }
        let bits = groups.iter().fold(0u32, |bits, group| bits | 1 << (group - 1));
        sockets.push((netlink, bits));
    }
    while context.step(PAUSE)? {
        for (netlink, bits) in &sockets {
            let mut found = [0; 4];
            socket::option(netlink.as_fd(), libc::SOL_NETLINK, LIST, &mut found)?;
            same("groups of a netlink socket", u32::from_ne_bytes(found), *bits)?;
        }
        if context.progress.plant() {
            set(&sockets[0].0, (libc::SOL_NETLINK, 2, 5))?;
        }
    }
    Ok(())
}

/// The controller of generic netlink is asked who it is.
pub(super) fn generic(context: &mut Context) -> Result<(), Failure> {
    const CONTROLLER: u16 = 16;
    let netlink = open(libc::NETLINK_GENERIC)?;
    let mut number = 0;
    while context.step(PAUSE)? {
        number += 1;
        // CTRL_CMD_GETFAMILY, CTRL_ATTR_FAMILY_ID.
        let body = [3, 1, 0, 0, 6, 0, 1, 0, CONTROLLER as u8, 0, 0, 0];
        send(netlink.as_fd(), &request(CONTROLLER, 0, number, &body), &[])?;
        let mut buffer = vec![0; 16 << 10];
        let length = receive(netlink.as_fd(), &mut buffer)?;
        let found = messages(&buffer[..length])?;
        let head = found.first().map(|(kind, number, _)| (*kind, *number));
        same("answer of the controller", head, Some((CONTROLLER, number)))?;
        let named = found[0].2.windows(6).any(|text| text == b"nlctrl");
        ensure(named, || "the controller does not tell its name".to_owned())?;
        if context.progress.plant() {
            send(netlink.as_fd(), &request(CONTROLLER, 0, 0, &body), &[])?;
        }
    }
    Ok(())
}

/// The socket diagnosis lists unix sockets, of which there are some.
pub(super) fn diagnosis(context: &mut Context) -> Result<(), Failure> {
    const BY_FAMILY: u16 = 20;
    let netlink = open(libc::NETLINK_SOCK_DIAG)?;
    let (_one, two) = std::os::unix::net::UnixStream::pair()?;
    let mut two = Some(two);
    let mut number = 0;
    while context.step(PAUSE)? {
        number += 1;
        let mut body = vec![libc::AF_UNIX as u8, 0, 0, 0];
        body.extend(u32::MAX.to_ne_bytes());
        body.extend([0; 8]);
        body.extend([0xff; 8]);
        send(netlink.as_fd(), &request(BY_FAMILY, DUMP, number, &body), &[])?;
        let count = list(&netlink, BY_FAMILY, number)?;
        ensure(count >= 2 && two.is_some(), || format!("{count} unix sockets"))?;
        if context.progress.plant() {
            two = None;
        }
    }
    Ok(())
}
