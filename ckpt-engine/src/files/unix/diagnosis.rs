//! The kernel's list of the unix sockets of one network (`unix_diag`).

use std::{collections::HashMap, io, os::fd::BorrowedFd};

use crate::sys::socket::{self, Along};

const HEADER: usize = 16;
const SOCK_DIAG_BY_FAMILY: u16 = 20;
const DONE: u16 = 3;
const ERROR: u16 = 2;
/// Name, inode, peer, waiting clients, queue lengths, memory.
const SHOW: u32 = 0x3f;

/// What the kernel tells about one socket.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(in super::super) struct Entry {
    /// `TCP_*`: 1 connected, 7 not, 10 listening.
    pub(super) state: u8,
    /// As it was passed to bind(2), without the final NUL of a path.
    pub(super) name: Option<Vec<u8>>,
    /// The peer's inode; 0 for one that is gone.
    pub(super) peer: Option<u32>,
    /// Of a listener: the inodes of clients not yet accepted; 0 for one that is gone.
    pub(super) waiting: Vec<u32>,
    /// Of a listener: listen(2).
    pub(super) backlog: u32,
    /// What it has sent and nobody has read, in bytes of kernel memory.
    pub(super) sent: u32,
    /// 1: no more reading, 2: no more writing.
    pub(super) shutdown: u8,
}

/// All sockets by inode.
#[derive(Debug, Default)]
pub(in super::super) struct Diagnosis {
    sockets: HashMap<u32, Entry>,
    /// The listener that a client waits for, by the client's inode.
    listeners: HashMap<u32, u32>,
}

impl Diagnosis {
    pub(super) fn get(&self, inode: u64) -> Option<&Entry> {
        self.sockets.get(&u32::try_from(inode).ok()?)
    }

    /// Adds those of another network.
    pub(in super::super) fn add(&mut self, other: Self) {
        self.sockets.extend(other.sockets);
        self.listeners.extend(other.listeners);
    }

    pub(super) fn listener_of(&self, inode: u64) -> Option<u32> {
        self.listeners.get(&u32::try_from(inode).ok()?).copied()
    }
}

fn invalid() -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, "a short netlink message")
}

pub(in super::super) fn half(bytes: &[u8], at: usize) -> io::Result<u16> {
    let part = bytes.get(at..at + 2).and_then(|part| part.try_into().ok());
    part.map(u16::from_ne_bytes).ok_or_else(invalid)
}

pub(in super::super) fn word(bytes: &[u8], at: usize) -> io::Result<u32> {
    let part = bytes.get(at..at + 4).and_then(|part| part.try_into().ok());
    part.map(u32::from_ne_bytes).ok_or_else(invalid)
}

/// Asks a socket-diagnosis socket for all unix sockets of its network.
pub(in super::super) fn dump(netlink: BorrowedFd<'_>) -> io::Result<Diagnosis> {
    let mut request = vec![libc::AF_UNIX as u8, 0, 0, 0];
    // All states, any inode.
    request.extend(u32::MAX.to_ne_bytes());
    request.extend(0u32.to_ne_bytes());
    request.extend(SHOW.to_ne_bytes());
    request.extend([0xff; 8]);
    let mut diagnosis = Diagnosis::default();
    ask(netlink, &request, Many::All, |body| {
        let (inode, entry) = read_entry(body)?;
        diagnosis.sockets.insert(inode, entry);
        Ok(())
    })?;
    for (&listener, entry) in &diagnosis.sockets {
        for &client in entry.waiting.iter().filter(|&&client| client != 0) {
            diagnosis.listeners.insert(client, listener);
        }
    }
    Ok(diagnosis)
}

/// How many sockets are asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in super::super) enum Many {
    /// All of a family.
    All,
    /// The one that the question names.
    One,
}

/// Asks for sockets, and calls `each` with what is told about one.
pub(in super::super) fn ask(
    netlink: BorrowedFd<'_>,
    question: &[u8],
    many: Many,
    mut each: impl FnMut(&[u8]) -> io::Result<()>,
) -> io::Result<()> {
    // The end of a list is told by itself, that of one answer only if it is wanted.
    let flags = libc::NLM_F_REQUEST
        | match many {
            Many::All => libc::NLM_F_DUMP,
            Many::One => libc::NLM_F_ACK,
        };
    let length = u32::try_from(HEADER + question.len()).map_err(io::Error::other)?;
    let mut request = length.to_ne_bytes().to_vec();
    request.extend(SOCK_DIAG_BY_FAMILY.to_ne_bytes());
    request.extend((flags as u16).to_ne_bytes());
    request.extend([0; 8]);
    request.extend(question);
    socket::send(netlink, &request, &Along::default(), 0)?;
    let mut buffer = vec![0; 64 << 10];
    loop {
        let length = socket::receive(netlink, &mut buffer, 0)?.length;
        if read_messages(&buffer[..length], &mut each)? {
            return Ok(());
        }
    }
}

/// Reads one datagram of messages; true when it holds the end of the list.
fn read_messages(
    mut bytes: &[u8],
    each: &mut impl FnMut(&[u8]) -> io::Result<()>,
) -> io::Result<bool> {
    while !bytes.is_empty() {
        let length = word(bytes, 0)? as usize;
        let body = bytes.get(HEADER..length).ok_or_else(invalid)?;
        match half(bytes, 4)? {
            // The end can say that the list is not whole.
            kind @ (DONE | ERROR) => {
                let code = word(body, 0)?.cast_signed();
                return match (kind, code) {
                    (DONE, 0..) | (ERROR, 0) => Ok(true),
                    _ => Err(io::Error::from_raw_os_error(-code)),
                };
            }
            SOCK_DIAG_BY_FAMILY => each(body)?,
            _ => {}
        }
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or(&[]);
    }
    Ok(false)
}

fn read_entry(body: &[u8]) -> io::Result<(u32, Entry)> {
    let mut entry = Entry { state: *body.get(2).ok_or_else(invalid)?, ..Entry::default() };
    let inode = word(body, 4)?;
    let mut attributes = body.get(16..).ok_or_else(invalid)?;
    while attributes.len() >= 4 {
        let length = usize::from(half(attributes, 0)?);
        let value = attributes.get(4..length).ok_or_else(invalid)?;
        match half(attributes, 2)? {
            0 if value.first() == Some(&0) => entry.name = Some(value.to_vec()),
            0 => {
                let end = value.iter().position(|&byte| byte == 0).unwrap_or(value.len());
                entry.name = Some(value[..end].to_vec());
            }
            2 => entry.peer = Some(word(value, 0)?),
            3 => {
                let places = (0..value.len() / 4).map(|place| word(value, place * 4));
                entry.waiting = places.collect::<io::Result<_>>()?;
            }
            4 => entry.backlog = word(value, 4)?,
            5 => entry.sent = word(value, 8)?,
            6 => entry.shutdown = *value.first().ok_or_else(invalid)?,
            _ => {}
        }
        attributes = attributes.get(length.next_multiple_of(4)..).unwrap_or(&[]);
    }
    Ok((inode, entry))
}
