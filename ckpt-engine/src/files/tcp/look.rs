//! What the kernel keeps about the open files of a process and about its TCP sockets, copied in one
//! pass.
//!
//! A program in the kernel (a BPF iterator) is shown every open file of a process and copies the
//! structure behind those that are sockets ([`Layout`]). What is read is what the options of a socket are kept in, and what a connection has
//! for itself ([`Record`]); which of them can be told by it, [`super::proof`] finds out. What the
//! kernel tells of a descriptor only in fdinfo, at the cost of ten other calls, is read as well.

use std::{
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

use super::{
    ESTABLISHED,
    layout::Layout,
    record::{Record, long, part},
};
use crate::sys::bpf::{
    self, MapKind,
    code::{
        ADD, ADD_REGISTER, AND, COPY, Code, EXIT, IF_EQUAL, LOAD, LOAD_WORD, SET, SHIFT_LEFT,
        SHIFT_RIGHT, STORE, STORE_REGISTER, UNLESS_EQUAL, helper,
    },
};

/// One TCP socket, as the kernel keeps it.
#[derive(Debug, PartialEq, Eq)]
pub(in super::super) struct Sight {
    pub(super) v6: bool,
    pub(super) state: u8,
    /// Whether nothing but TCP handles its data.
    pub(super) is_plain: bool,
    /// Everything its options are kept in, and its network.
    pub(super) options: Vec<u8>,
    /// What it has for itself.
    pub(super) record: Option<Record>,
}

impl Sight {
    /// Whether it is an open connection whose record tells all about it.
    pub(super) fn is_open(&self) -> bool {
        self.state == ESTABLISHED && self.record.as_ref().is_some_and(Record::is_complete)
    }
}

/// One descriptor.
#[derive(Debug)]
pub(super) struct Opened {
    pub(super) fd: i32,
    /// Where the kernel keeps the open file.
    pub(super) file: u64,
    /// The number of its inode.
    pub(super) inode: u64,
    /// `F_GETFL`.
    pub(super) flags: i32,
    /// Whether execve(2) closes it.
    pub(super) closes: bool,
    /// Nobody has ever locked the file.
    pub(super) unlocked: bool,
    /// What says who gets its signals: zero if nobody ever does.
    pub(super) owner: u64,
    /// The TCP socket, if it is one.
    pub(super) socket: Option<Sight>,
}

/// The program, loaded.
#[derive(Debug)]
pub(super) struct Look {
    layout: Layout,
    program: OwnedFd,
}

impl Look {
    pub(super) fn new() -> io::Result<Self> {
        let layout = Layout::find()?;
        let room = bpf::map(MapKind::Array, (HEAD + layout.len()).next_multiple_of(8) as u32)?;
        let program = bpf::load_for_tasks(&program(room.as_fd(), &layout), layout.iterator)?;
        Ok(Self { layout, program })
    }

    /// Whether there is a member with this name in which an option is kept.
    pub(super) fn has(&self, member: &str) -> bool {
        self.layout.names.contains(&member)
    }

    /// The descriptors of the process with this number on the host, in their order.
    pub(super) fn at(&self, host: i32) -> io::Result<Vec<Opened>> {
        let bytes = bpf::read_all(bpf::link_to_task(self.program.as_fd(), host)?.as_fd())?;
        let (mut all, mut rest, len) = (Vec::new(), bytes.as_slice(), self.layout.len());
        while let Some((head, behind)) = rest.split_at_checked(HEAD) {
            let size = if word(head, SOCKET_AT) == 0 { 0 } else { len };
            let Some((sock, others)) = behind.split_at_checked(size) else { break };
            rest = others;
            all.extend(self.opened(head, sock));
        }
        all.sort_unstable_by_key(|opened: &Opened| opened.fd);
        Ok(all)
    }

    fn opened(&self, head: &[u8], sock: &[u8]) -> Option<Opened> {
        let fd = i32::try_from(word(head, NUMBER_AT)).ok()?;
        Some(Opened {
            fd,
            file: word(head, FILE_AT),
            inode: word(head, INODE_AT),
            flags: word(head, FLAGS_AT) as i32,
            closes: word(head, CLOSING_AT) >> (fd % 64) & 1 != 0,
            unlocked: word(head, LOCKS_AT) == 0,
            owner: word(head, OWNER_AT),
            socket: self.sight(sock),
        })
    }

    fn sight(&self, sock: &[u8]) -> Option<Sight> {
        let layout = &self.layout;
        // What could not be copied is zero, which is no family.
        let v6 = match i32::from(u16::from_ne_bytes(part(sock, layout.family)?)) {
            libc::AF_INET => false,
            libc::AF_INET6 => true,
            _ => return None,
        };
        if i32::from(u16::from_ne_bytes(part(sock, layout.protocol)?)) != libc::IPPROTO_TCP {
            return None;
        }
        Some(Sight {
            v6,
            state: *sock.get(layout.state)?,
            is_plain: long(sock, layout.upper)? == 0,
            options: layout.options[usize::from(v6)].take(sock)?,
            record: layout.states.as_ref().and_then(|states| states.record(sock, v6)),
        })
    }
}

fn word(head: &[u8], at: usize) -> u64 {
    long(head, at).unwrap_or(0)
}

/// The bytes before the structure: the number of the inode, where the structure is, the number of
/// the descriptor, the word with the bit that says whether execve(2) closes it, where the file is,
/// its flags, what says who gets its signals, and its locks.
const HEAD: usize = 64;
const INODE_AT: usize = 0;
const SOCKET_AT: usize = 8;
const NUMBER_AT: usize = 16;
const CLOSING_AT: usize = 24;
const FILE_AT: usize = 32;
const FLAGS_AT: usize = 40;
const OWNER_AT: usize = 48;
const LOCKS_AT: usize = 56;

/// Where on the stack the key of the map is, what was found last, the mode, and the socket.
const KEY: i16 = -8;
const INODE: i16 = -16;
const MODE: i16 = -24;
const SOCKET: i16 = -32;

/// Reads what stands behind register 3 to the stack.
fn read(code: &mut Code, from: u32, to: i16, len: i32) {
    code.add(ADD, 3, 0, 0, from.cast_signed()).stack(1, to).add(SET, 2, 0, 0, len);
    code.call(helper::READ_KERNEL);
}

/// Reads what stands behind register 3 into the record.
fn keep(code: &mut Code, from: u32, at: usize, len: i32) {
    code.add(ADD, 3, 0, 0, from.cast_signed()).add(COPY, 1, 8, 0, 0);
    code.add(ADD, 1, 0, 0, at as i32).add(SET, 2, 0, 0, len).call(helper::READ_KERNEL);
}

/// Registers: 6 the text to be written, 7 the file, 8 the room, 9 the context.
fn program(room: BorrowedFd<'_>, layout: &Layout) -> Vec<u64> {
    const TASK_IN_CONTEXT: i16 = 8;
    const NUMBER_IN_CONTEXT: i16 = 16;
    const FILE_IN_CONTEXT: i16 = 24;
    let mut code = Code::default();
    code.add(COPY, 9, 1, 0, 0);
    code.add(LOAD, 7, 1, FILE_IN_CONTEXT, 0).add(LOAD, 6, 1, 0, 0).add(LOAD, 6, 6, 0, 0);
    // At the end of all.
    let no_file = code.jump(IF_EQUAL, 7, 0);
    for at in (SOCKET..=KEY).step_by(8) {
        code.add(STORE, 10, 0, at, 0);
    }
    code.map(1, room).stack(2, KEY).call(helper::LOOK_UP);
    let no_room = code.jump(IF_EQUAL, 0, 0);
    code.add(COPY, 8, 0, 0, 0);
    code.add(STORE_REGISTER, 8, 7, FILE_AT as i16, 0).add(STORE, 8, 0, SOCKET_AT as i16, 0);
    for (member, at, len) in [(layout.file_flags, FLAGS_AT, 4), (layout.file_owner, OWNER_AT, 8)] {
        code.add(COPY, 3, 7, 0, 0);
        keep(&mut code, member, at, len);
    }
    code.add(COPY, 3, 7, 0, 0);
    read(&mut code, layout.file_inode, INODE, 8);
    for (member, at) in [(layout.inode_number, INODE_AT), (layout.inode_locks, LOCKS_AT)] {
        code.add(LOAD, 3, 10, INODE, 0);
        keep(&mut code, member, at, 8);
    }
    code.add(LOAD, 3, 10, INODE, 0);
    read(&mut code, layout.inode_mode, MODE, 2);
    // The bit of its descriptor: each word has 64.
    code.add(LOAD, 3, 9, TASK_IN_CONTEXT, 0);
    let no_task = code.jump(IF_EQUAL, 3, 0);
    for member in [layout.task_files, layout.files_table, layout.table_closing] {
        read(&mut code, member, INODE, 8);
        code.add(LOAD, 3, 10, INODE, 0);
    }
    code.add(LOAD_WORD, 4, 9, NUMBER_IN_CONTEXT, 0).add(STORE_REGISTER, 8, 4, NUMBER_AT as i16, 0);
    code.add(SHIFT_RIGHT, 4, 0, 0, 6).add(SHIFT_LEFT, 4, 0, 0, 3).add(ADD_REGISTER, 3, 4, 0, 0);
    keep(&mut code, 0, CLOSING_AT, 8);
    write_with_socket(&mut code, layout);
    write(&mut code, HEAD);
    code.land(no_file).land(no_room).land(no_task);
    code.add(SET, 0, 0, 0, 0).add(EXIT, 0, 0, 0, 0);
    code.finish()
}

/// Ends with the record of a socket; goes on if it is none.
fn write_with_socket(code: &mut Code, layout: &Layout) {
    code.add(LOAD, 1, 10, MODE, 0).add(AND, 1, 0, 0, libc::S_IFMT.cast_signed());
    let no_socket = code.jump(UNLESS_EQUAL, 1, libc::S_IFSOCK.cast_signed());
    code.add(COPY, 3, 7, 0, 0);
    read(code, layout.file_private, SOCKET, 8);
    code.add(LOAD, 3, 10, SOCKET, 0);
    read(code, layout.socket_sock, SOCKET, 8);
    code.add(LOAD, 3, 10, SOCKET, 0);
    let closed = code.jump(IF_EQUAL, 3, 0);
    code.add(STORE_REGISTER, 8, 3, SOCKET_AT as i16, 0);
    let mut end = HEAD;
    for piece in &layout.pieces {
        code.add(LOAD, 3, 10, SOCKET, 0);
        keep(code, piece.start as u32, end, piece.len() as i32);
        end += piece.len();
    }
    write(code, end);
    code.land(no_socket).land(closed);
}

/// Writes so much of the record, and ends.
fn write(code: &mut Code, len: usize) {
    code.add(COPY, 1, 6, 0, 0).add(COPY, 2, 8, 0, 0).add(SET, 3, 0, 0, len as i32);
    code.call(helper::WRITE).add(SET, 0, 0, 0, 0).add(EXIT, 0, 0, 0, 0);
}
