//! Looks at what the kernel keeps about a process and tells nobody.
//!
//! A small program shown the task (a BPF iterator) says where the memory description is, and what
//! stands at an address that it is given; where in the kernel's structures things are, the kernel
//! itself describes ([`Types`]). Counters that each processor has for itself are found by a map of
//! that kind: where the kernel has put its parts tells where those of others are.

use std::{
    fs,
    io::{self, Read},
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    sync::{Mutex, OnceLock, PoisonError},
};

use crate::{
    btf::Types,
    sys::bpf::{
        self, MapKind,
        code::{ADD, COPY, Code, EXIT, IF_EQUAL, LOAD, SET, STORE, STORE_REGISTER, helper},
    },
};

/// Where things are that lead from a task to the rest, in bytes.
#[derive(Clone, Copy, Debug)]
struct Places {
    iterator: u32,
    task_memory: u32,
    map_parts: u32,
}

impl Places {
    fn find() -> io::Result<Self> {
        let types = Types::read()?;
        Ok(Self {
            iterator: types.function("bpf_iter_task")?,
            task_memory: types.offset("task_struct", "mm")?,
            map_parts: types.offset("bpf_array", "pptrs")?,
        })
    }

    /// Whether the program has room for all it reads.
    fn fit(&self) -> bool {
        self.map_parts.is_multiple_of(8) && self.map_parts + 8 <= u32::from(MAP_MAX.unsigned_abs())
    }

    fn known() -> io::Result<&'static Self> {
        static PLACES: OnceLock<Option<Places>> = OnceLock::new();
        PLACES
            .get_or_init(|| Self::find().ok().filter(Self::fit))
            .as_ref()
            .ok_or(io::ErrorKind::Unsupported.into())
    }
}

/// What leads from a memory description to the sockets of its process, in bytes.
#[derive(Clone, Copy, Debug)]
struct Paths {
    memory_owner: u32,
    task_files: u32,
    files_table: u32,
    table_size: u32,
    table_files: u32,
    file_private: u32,
    file_inode: u32,
    inode_number: u32,
    inode_writers: u32,
    socket_sock: u32,
}

impl Paths {
    fn find() -> io::Result<Self> {
        let types = Types::read()?;
        Ok(Self {
            memory_owner: types.offset("mm_struct", "owner")?,
            task_files: types.offset("task_struct", "files")?,
            files_table: types.offset("files_struct", "fdt")?,
            table_size: types.offset("fdtable", "max_fds")?,
            table_files: types.offset("fdtable", "fd")?,
            file_private: types.offset("file", "private_data")?,
            file_inode: types.offset("file", "f_inode")?,
            inode_number: types.offset("inode", "i_ino")?,
            inode_writers: types.offset("inode", "i_writecount")?,
            socket_sock: types.offset("socket", "sk")?,
        })
    }

    fn known() -> io::Result<&'static Self> {
        static PATHS: OnceLock<Option<Paths>> = OnceLock::new();
        PATHS.get_or_init(|| Self::find().ok()).as_ref().ok_or(io::ErrorKind::Unsupported.into())
    }
}

/// Finds out what takes long, before there is a hurry.
pub(crate) fn prepare() {
    // What is missing for it is told when it is needed.
    let _ = Shared::known();
}

/// The program, loaded, and the map in which it is asked. They, and the map that shows where the
/// parts of processors are, are the same for all tasks.
#[derive(Debug)]
struct Shared {
    program: OwnedFd,
    /// Held by whoever asks.
    question: Mutex<OwnedFd>,
}

impl Shared {
    fn new() -> io::Result<Self> {
        let places = Places::known()?;
        let question = bpf::map(MapKind::Array, 16)?;
        let parts = bpf::map(MapKind::PerProcessor, 8)?;
        let program = program(question.as_fd(), parts.as_fd(), places);
        let program = bpf::load_for_tasks(&program, places.iterator)?;
        Ok(Self { program, question: Mutex::new(question) })
    }

    fn known() -> io::Result<&'static Self> {
        static SHARED: OnceLock<Shared> = OnceLock::new();
        match SHARED.get() {
            Some(shared) => Ok(shared),
            None => Self::new().map(|shared| SHARED.get_or_init(|| shared)),
        }
    }
}

/// Looks at one task, a process or a thread.
#[derive(Debug)]
pub(crate) struct Eye {
    shared: &'static Shared,
    /// The program with this task.
    link: OwnedFd,
}

/// What it says.
#[derive(Clone, Copy)]
struct Sight {
    task: u64,
    /// The memory description of the task.
    memory: u64,
    /// How far the part of the processor is from the common address.
    distance: u64,
    /// What stands at the address.
    value: u64,
}

impl Eye {
    /// Looks at the process with this number on the host.
    pub(crate) fn on(host: i32) -> io::Result<Self> {
        let shared = Shared::known()?;
        Ok(Self { shared, link: bpf::link_to_task(shared.program.as_fd(), host)? })
    }

    fn look(&self, address: u64, processor: u64) -> io::Result<Sight> {
        let mut question = [0u8; 16];
        question[..8].copy_from_slice(&address.to_ne_bytes());
        question[8..].copy_from_slice(&processor.to_ne_bytes());
        let alone = self.shared.question.lock().unwrap_or_else(PoisonError::into_inner);
        bpf::set_entry(alone.as_fd(), &question)?;
        let mut answer = [0u8; ANSWER];
        let mut iterator = fs::File::from(bpf::iterator(self.link.as_fd())?);
        // Of a task that is gone nothing is said.
        iterator.read_exact(&mut answer)?;
        drop(alone);
        let number = |index: usize| {
            let bytes = answer[8 * index..][..8].try_into().expect("eight bytes");
            u64::from_ne_bytes(bytes)
        };
        if address != 0 && number(0) != 0 {
            return Err(io::Error::from_raw_os_error(libc::EFAULT));
        }
        let distance = number(2).wrapping_sub(number(3));
        Ok(Sight { task: number(5), memory: number(1), distance, value: number(4) })
    }

    /// A number of 64 bits in a structure.
    pub(crate) fn number(&self, structure: u64, offset: u32) -> io::Result<u64> {
        Ok(self.look(structure.wrapping_add(offset.into()), 0)?.value)
    }

    /// A number of 32 bits in a structure.
    pub(crate) fn word(&self, structure: u64, offset: u32) -> io::Result<u32> {
        // Little-endian: the lower half.
        Ok(self.number(structure, offset)? as u32)
    }

    /// Where the task itself is.
    pub(crate) fn task(&self) -> io::Result<u64> {
        Ok(self.look(0, 0)?.task)
    }

    /// Where the memory description of the process is; 0 for one that has none.
    pub(crate) fn memory(&self) -> io::Result<u64> {
        Ok(self.look(0, 0)?.memory)
    }

    /// What all processors together have added to a counter that each has for itself.
    pub(crate) fn sum(&self, parts: u64) -> io::Result<u32> {
        let mut sum = 0u32;
        for processor in 0..possible_processors()? {
            let distance = self.look(0, processor)?.distance;
            sum = sum.wrapping_add(self.word(parts.wrapping_add(distance), 0)?);
        }
        Ok(sum)
    }

    /// Where the `struct sock` of a socket is that the process has under this number.
    pub(crate) fn socket(&self, fd: i32, inode: u64) -> io::Result<u64> {
        self.number(self.file(fd, inode)?, Paths::known()?.socket_sock)
    }

    /// Where that is which belongs to a file alone (`private_data`).
    pub(crate) fn file(&self, fd: i32, inode: u64) -> io::Result<u64> {
        let places = Paths::known()?;
        let (file, found) = self.opened(fd)?;
        if self.number(found, places.inode_number)? != inode {
            return Err(io::ErrorKind::NotFound.into());
        }
        self.number(file, places.file_private)
    }

    /// How often the file that the process has under this number is open for writing just now, or,
    /// below zero, executed (`i_writecount` in include/linux/fs.h).
    pub(crate) fn writers(&self, fd: i32) -> io::Result<i32> {
        let (_, inode) = self.opened(fd)?;
        Ok(self.word(inode, Paths::known()?.inode_writers)?.cast_signed())
    }

    /// Where the open file is that the process has under this number, and its inode.
    fn opened(&self, fd: i32) -> io::Result<(u64, u64)> {
        let places = Paths::known()?;
        let gone = || io::Error::from(io::ErrorKind::NotFound);
        let task = self.number(self.memory()?, places.memory_owner)?;
        let table = self.number(self.number(task, places.task_files)?, places.files_table)?;
        let fd = u32::try_from(fd).map_err(|_| gone())?;
        if fd >= self.word(table, places.table_size)? {
            return Err(gone());
        }
        let files = self.number(table, places.table_files)?;
        let file = self.number(files.wrapping_add(8 * u64::from(fd)), 0)?;
        Ok((file, self.number(file, places.file_inode)?))
    }
}

/// "0-3": the last one tells how many there can be.
fn possible_processors() -> io::Result<u64> {
    let text = fs::read_to_string("/sys/devices/system/cpu/possible")?;
    let last = text.trim().rsplit(['-', ',']).next().and_then(|last| last.parse::<u64>().ok());
    last.map(|last| last + 1).ok_or_else(|| io::ErrorKind::InvalidData.into())
}

/// Bytes of an answer: whether the look failed; memory description; the processor's part and the
/// common address of the map; what was seen; the task.
const ANSWER: usize = 48;

/// How much of the description of a map there is room for on the stack.
const MAP_MAX: i16 = 440;

/// Answers the question in the map about the task that it is shown.
fn program(question: BorrowedFd<'_>, parts: BorrowedFd<'_>, places: &Places) -> Vec<u64> {
    /// Where the answer is, and the key of both maps, below the end of the stack.
    const AT: i16 = -(ANSWER as i16);
    const KEY: i16 = AT - 8;
    const MAP: i16 = KEY - MAP_MAX;
    let parts_at = i16::try_from(places.map_parts).unwrap_or(0);
    let mut code = Code::default();
    // 6: the text to be written, 7: the task, 8: the question.
    code.add(LOAD, 7, 1, 8, 0).add(LOAD, 6, 1, 0, 0).add(LOAD, 6, 6, 0, 0);
    let no_task = code.jump(IF_EQUAL, 7, 0);
    for slot in 0..=ANSWER as i16 / 8 {
        code.add(STORE, 10, 0, KEY + 8 * slot, 0);
    }
    code.add(STORE_REGISTER, 10, 7, AT + 40, 0);
    // The memory description.
    code.stack(1, AT + 8).add(SET, 2, 0, 0, 8).add(COPY, 3, 7, 0, 0);
    code.add(ADD, 3, 0, 0, places.task_memory.cast_signed()).call(helper::READ_KERNEL);
    // The question.
    code.map(1, question).stack(2, KEY).call(helper::LOOK_UP);
    let no_question = code.jump(IF_EQUAL, 0, 0);
    code.add(COPY, 8, 0, 0, 0);
    // Where the map has its part of the processor.
    code.map(1, parts).stack(2, KEY).add(LOAD, 3, 8, 8, 0).call(helper::LOOK_UP_OF_PROCESSOR);
    code.add(STORE_REGISTER, 10, 0, AT + 16, 0);
    // All of the map up to there: its address may not be counted with.
    code.stack(1, MAP).add(SET, 2, 0, 0, i32::from(parts_at) + 8).map(3, parts);
    code.call(helper::READ_KERNEL);
    code.add(LOAD, 1, 10, MAP + parts_at, 0).add(STORE_REGISTER, 10, 1, AT + 24, 0);
    // What stands at the address.
    code.add(LOAD, 3, 8, 0, 0);
    let no_address = code.jump(IF_EQUAL, 3, 0);
    code.stack(1, AT + 32).add(SET, 2, 0, 0, 8).call(helper::READ_KERNEL);
    code.add(STORE_REGISTER, 10, 0, AT, 0);
    code.land(no_address);
    code.add(COPY, 1, 6, 0, 0).stack(2, AT).add(SET, 3, 0, 0, ANSWER as i32);
    code.call(helper::WRITE);
    code.land(no_question).land(no_task);
    code.add(SET, 0, 0, 0, 0).add(EXIT, 0, 0, 0, 0);
    code.finish()
}
