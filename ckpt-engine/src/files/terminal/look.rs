//! What waits in a terminal, as the kernel keeps it: seen without being taken.
//!
//! Each side has a buffer of what it can read (`struct n_tty_data`), and before it a list of what
//! the other side has written and the line discipline has not taken yet (`struct tty_buffer`).

use std::{
    io,
    os::fd::{AsRawFd, BorrowedFd},
    sync::{Mutex, OnceLock, PoisonError},
};

use ckpt_format::files::Terminal;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::{
    btf::Types,
    eye::Eye,
    look::Look,
    sys::{descriptor, tty},
};

/// The size of the buffer (`N_TTY_BUF_SIZE`).
const BUFFER: usize = 4096;
/// How much may be on its way: more than the kernel allows.
const PIECES_MAX: usize = 1024;
/// Where the number of the line discipline is in `struct termios2`.
const DISCIPLINE: usize = 16;

/// Where things are, in bytes.
#[derive(Debug)]
struct Places {
    file_tty: u32,
    tty_link: u32,
    tty_port: u32,
    tty_buffer: u32,
    tty_stopped: u32,
    tty_held: u32,
    tty_news: u32,
    port_pieces: u32,
    piece_next: u32,
    piece_commit: u32,
    piece_read: u32,
    piece_data: u32,
    buffer_len: u32,
    head: u32,
    tail: u32,
    bytes: u32,
    marks: u32,
}

impl Places {
    fn find(types: &Types) -> io::Result<Self> {
        let flow = |inner: &str| types.offset("tty_struct", &format!("flow.{inner}"));
        let pieces = types.offset("tty_port", "buf")? + types.offset("tty_bufhead", "head")?;
        Ok(Self {
            file_tty: types.offset("tty_file_private", "tty")?,
            tty_link: types.offset("tty_struct", "link")?,
            tty_port: types.offset("tty_struct", "port")?,
            tty_buffer: types.offset("tty_struct", "disc_data")?,
            tty_stopped: flow("stopped")?,
            tty_held: flow("tco_stopped")?,
            tty_news: types.offset("tty_struct", "ctrl.pktstatus")?,
            port_pieces: pieces,
            piece_next: types.offset("tty_buffer", "next")?,
            piece_commit: types.offset("tty_buffer", "commit")?,
            piece_read: types.offset("tty_buffer", "read")?,
            piece_data: types.offset("tty_buffer", "data")?,
            buffer_len: types.size("n_tty_data")?,
            head: types.offset("n_tty_data", "read_head")?,
            tail: types.offset("n_tty_data", "read_tail")?,
            bytes: types.offset("n_tty_data", "read_buf")?,
            marks: types.offset("n_tty_data", "read_flags")?,
        })
    }
}

#[derive(Debug)]
pub(super) struct Reader {
    places: Places,
    look: Look,
    /// On this process, which has a descriptor of the terminal.
    eye: Eye,
}

/// Loads the programs, before there is a hurry.
pub(super) fn prepare() -> Option<&'static Mutex<Reader>> {
    static READER: OnceLock<Option<Mutex<Reader>>> = OnceLock::new();
    let load = || {
        let reader = Types::read().and_then(|types| {
            let look = Look::new(types.function("bpf_iter_task")?)?;
            let eye = Eye::on(std::process::id().cast_signed())?;
            Ok(Reader { places: Places::find(&types)?, look, eye })
        });
        if let Err(error) = &reader {
            tracing::info!(%error, "what waits in terminals is read out and put back");
        }
        reader.ok().map(Mutex::new)
    };
    READER.get_or_init(load).as_ref()
}

/// What there is to be seen.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Sight {
    input: Vec<u8>,
    marks: Vec<u32>,
    typed: Vec<u8>,
    output: Vec<u8>,
    stopped: bool,
    held: bool,
    master_held: bool,
    news: u8,
}

impl Sight {
    /// Adds it to what else is known.
    pub(super) fn add_to(self, terminal: Terminal) -> Terminal {
        let Self { input, marks, typed, output, stopped, held, master_held, news } = self;
        let marks = Some(marks);
        Terminal { input, marks, typed, output, stopped, held, master_held, news, ..terminal }
    }
}

/// Looks at a terminal that is open here. Fails where the kernel does not show it.
pub(super) fn at(master: BorrowedFd<'_>, slave: Option<BorrowedFd<'_>>) -> io::Result<Sight> {
    let reader = prepare().ok_or(io::ErrorKind::Unsupported)?;
    // Another line discipline keeps other things.
    let unknown = || io::Error::from(io::ErrorKind::Unsupported);
    for side in std::iter::once(master).chain(slave) {
        if tty::settings(side)?[DISCIPLINE] != 0 {
            return Err(unknown());
        }
        // The poll makes the kernel pass on what it has not yet.
        poll(&mut [PollFd::new(side, PollFlags::POLLIN)], PollTimeout::ZERO)?;
    }
    reader.lock().unwrap_or_else(PoisonError::into_inner).read(master)
}

impl Reader {
    fn read(&self, master: BorrowedFd<'_>) -> io::Result<Sight> {
        let Self { places, eye, .. } = self;
        let file = eye.file(master.as_raw_fd(), descriptor::status(master)?.inode)?;
        let own = eye.number(file, places.file_tty)?;
        let other = eye.number(own, places.tty_link)?;
        let (mut output, _) = self.buffer(own)?;
        output.extend(self.on_its_way(own)?);
        let (input, marks) = self.buffer(other)?;
        let is_set = |tty, place| Ok::<_, io::Error>(eye.word(tty, place)? & 0xff != 0);
        let held = is_set(other, places.tty_held)?;
        Ok(Sight {
            input,
            marks,
            typed: self.on_its_way(other)?,
            output,
            stopped: is_set(other, places.tty_stopped)? && !held,
            held,
            master_held: is_set(own, places.tty_held)?,
            news: (eye.word(other, places.tty_news)? & 0xff) as u8,
        })
    }

    /// What a side can read, and which of the bytes end a read of lines.
    fn buffer(&self, tty: u64) -> io::Result<(Vec<u8>, Vec<u32>)> {
        let Places { head, tail, bytes, marks, .. } = self.places;
        let buffer = self.eye.number(tty, self.places.tty_buffer)?;
        let seen = self.look.at(&[(buffer, self.places.buffer_len as usize)])?;
        let seen = seen.first().map_or(&[][..], Vec::as_slice);
        let part = |at: u32, len: usize| {
            let found = seen.get(at as usize..at as usize + len);
            found.ok_or_else(|| io::Error::from(io::ErrorKind::UnexpectedEof))
        };
        let number =
            |at| Ok::<_, io::Error>(u64::from_ne_bytes(part(at, 8)?.try_into().unwrap_or([0; 8])));
        let (head, tail) = (number(head)?, number(tail)?);
        let (bytes, marks) = (part(bytes, BUFFER)?, part(marks, BUFFER / 8)?);
        let count = head.wrapping_sub(tail);
        if count > BUFFER as u64 {
            return Err(io::ErrorKind::InvalidData.into());
        }
        let places = || (0..count).map(|at| (tail.wrapping_add(at) % BUFFER as u64) as usize);
        let is_marked = |&(_, at): &(u32, usize)| marks[at / 8] >> (at % 8) & 1 != 0;
        let marked = (0..).zip(places()).filter(is_marked).map(|(place, _)| place).collect();
        Ok((places().map(|at| bytes[at]).collect(), marked))
    }

    /// What was written for a side and is not in its buffer yet.
    fn on_its_way(&self, tty: u64) -> io::Result<Vec<u8>> {
        let Self { places, eye, look } = self;
        let port = eye.number(tty, places.tty_port)?;
        let mut piece = eye.number(port, places.port_pieces)?;
        let mut all = Vec::new();
        for _ in 0..PIECES_MAX {
            if piece == 0 {
                return Ok(all);
            }
            let read = eye.word(piece, places.piece_read)?;
            let len = eye.word(piece, places.piece_commit)?.saturating_sub(read);
            let start = piece.wrapping_add((places.piece_data + read).into());
            all.extend(look.at(&[(start, len as usize)])?.into_iter().flatten());
            piece = eye.number(piece, places.piece_next)?;
        }
        Err(io::ErrorKind::InvalidData.into())
    }
}
