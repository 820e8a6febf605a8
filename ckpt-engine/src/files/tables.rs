//! The descriptor tables of a VE that stands still, as the kernel keeps them.
//!
//! Processes inherit most of what they have open: a thousand of them may have three files. A
//! program in the kernel (a BPF iterator) is shown every process of the VE and copies the addresses
//! of its open files, so that each is fetched and looked at once, by one of its holders. Nothing is
//! told of large tables, nor where the kernel has no BPF with type information: those are looked at
//! in `/proc`.

use std::{
    collections::HashMap,
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    sync::{Mutex, OnceLock, PoisonError},
};

use crate::{
    btf::Types,
    eye::{self, Eye},
    sys::bpf::{
        self, MapKind,
        code::{
            ADD, ADD_REGISTER, COPY, Code, EXIT, IF_AT_MOST, IF_EQUAL, IF_SAME, LOAD, LOAD_WORD,
            SET, STORE, helper,
        },
    },
};

/// How many descriptors a table has room for at first (`NR_OPEN_DEFAULT`).
const FIRST: usize = 64;
/// How many one may have room for to be told. bash(1) gives all that it starts a table of this size.
const MOST: usize = 256;

/// One entry of a table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Entry {
    /// Its number.
    pub(super) fd: i32,
    /// Where the kernel keeps the open file. Nothing else is there as long as the VE stands still.
    pub(super) file: u64,
    /// `FD_CLOEXEC`.
    pub(super) close_on_exec: bool,
    /// Nobody has ever locked the file.
    pub(super) unlocked: bool,
}

/// Loads the program, before there is a hurry.
pub(super) fn prepare() -> Option<&'static Mutex<Reader>> {
    static READER: OnceLock<Option<Mutex<Reader>>> = OnceLock::new();
    let load = || {
        eye::prepare();
        let reader = Reader::new();
        if let Err(error) = &reader {
            tracing::info!(%error, "descriptor tables are looked at in /proc");
        }
        reader.ok().map(Mutex::new)
    };
    READER.get_or_init(load).as_ref()
}

/// The tables of the processes in the pid namespace of this one and below it, by their numbers on
/// the host, as far as they are told.
pub(super) fn read(init: i32) -> HashMap<i32, Vec<Entry>> {
    let Some(reader) = prepare() else { return HashMap::new() };
    let read = reader.lock().unwrap_or_else(PoisonError::into_inner).read(init);
    read.unwrap_or_else(|error| {
        tracing::warn!(%error, "cannot read descriptor tables");
        HashMap::new()
    })
}

/// Where things are, in bytes.
#[derive(Clone, Copy, Debug)]
struct Places {
    iterator: u32,
    task_number: u32,
    task_process: u32,
    task_thread: u32,
    task_files: u32,
    number_level: u32,
    number_numbers: u32,
    files_table: u32,
    table_size: u32,
    table_closing: u32,
    table_files: u32,
    file_inode: u32,
    inode_locks: u32,
}

impl Places {
    fn find() -> io::Result<Self> {
        let types = Types::read()?;
        Ok(Self {
            iterator: types.function("bpf_iter_task")?,
            task_number: types.offset("task_struct", "thread_pid")?,
            task_process: types.offset("task_struct", "tgid")?,
            task_thread: types.offset("task_struct", "pid")?,
            task_files: types.offset("task_struct", "files")?,
            number_level: types.offset("pid", "level")?,
            number_numbers: types.offset("pid", "numbers")?,
            files_table: types.offset("files_struct", "fdt")?,
            table_size: types.offset("fdtable", "max_fds")?,
            table_closing: types.offset("fdtable", "close_on_exec")?,
            table_files: types.offset("fdtable", "fd")?,
            file_inode: types.offset("file", "f_inode")?,
            inode_locks: types.offset("inode", "i_flctx")?,
        })
    }
}

/// The program, loaded.
#[derive(Debug)]
pub(super) struct Reader {
    places: Places,
    question: OwnedFd,
    program: OwnedFd,
}

/// `struct upid`: the number, and at 8 the namespace.
const NUMBER: u64 = 16;

impl Reader {
    fn new() -> io::Result<Self> {
        let places = Places::find()?;
        let question = bpf::map(MapKind::Array, 16)?;
        let room = bpf::map(MapKind::Array, record_len(MOST) as u32)?;
        let program = program(question.as_fd(), room.as_fd(), &places);
        let program = bpf::load_for_tasks(&program, places.iterator)?;
        Ok(Self { places, question, program })
    }

    fn read(&self, init: i32) -> io::Result<HashMap<i32, Vec<Entry>>> {
        let eye = Eye::on(init)?;
        let number = eye.number(eye.task()?, self.places.task_number)?;
        let level = eye.word(number, self.places.number_level)?;
        let own = u64::from(self.places.number_numbers) + NUMBER * u64::from(level) + 8;
        let offset = u32::try_from(own).map_err(io::Error::other)?;
        let namespace = eye.number(number, offset)?;
        let mut question = [0u8; 16];
        question[..8].copy_from_slice(&namespace.to_ne_bytes());
        question[8..].copy_from_slice(&own.to_ne_bytes());
        bpf::set_entry(self.question.as_fd(), &question)?;
        let link = bpf::link_to_tasks(self.program.as_fd())?;
        let bytes = bpf::read_all(link.as_fd())?;
        let (mut tables, mut rest) = (HashMap::new(), bytes.as_slice());
        while let Some((process, size, record)) = next(&mut rest) {
            if size <= MOST {
                tables.insert(process, entries(size, record));
            }
        }
        Ok(tables)
    }
}

/// A record: the process; the size of its table; which descriptors close; the files of the first
/// ones, and their locks; for a larger table the same for the others.
const PROCESS_AT: usize = 0;
const SIZE_AT: usize = 8;
const CLOSING_AT: usize = 16;
const FILES_AT: usize = CLOSING_AT + MOST / 8;

/// How long the record of a table is with so many descriptors.
const fn record_len(count: usize) -> usize {
    FILES_AT + 16 * count
}

/// Where the file of a descriptor is in a record, and how far behind it its locks.
const fn file_at(fd: usize) -> (usize, usize) {
    match fd < FIRST {
        true => (FILES_AT + 8 * fd, 8 * FIRST),
        false => (record_len(FIRST) + 8 * (fd - FIRST), 8 * (MOST - FIRST)),
    }
}

fn number(record: &[u8], at: usize) -> u64 {
    let mut word = [0; 8];
    let bytes = record.get(at..at + 8).unwrap_or_default();
    word[..bytes.len()].copy_from_slice(bytes);
    u64::from_ne_bytes(word)
}

/// Takes the next record off: of which process, and how large its table is.
fn next<'a>(rest: &mut &'a [u8]) -> Option<(i32, usize, &'a [u8])> {
    let size = number(rest, SIZE_AT) as u32 as usize;
    let len = record_len(if (FIRST + 1..=MOST).contains(&size) { MOST } else { FIRST });
    let (record, others) = rest.split_at_checked(len)?;
    *rest = others;
    Some((number(record, PROCESS_AT) as i32, size, record))
}

fn entries(size: usize, record: &[u8]) -> Vec<Entry> {
    let entry = |fd: usize| {
        let (at, locks) = file_at(fd);
        let closing = number(record, CLOSING_AT + fd / 64 * 8);
        Entry {
            fd: fd as i32,
            file: number(record, at),
            close_on_exec: closing >> (fd % 64) & 1 != 0,
            unlocked: number(record, at + locks) == 0,
        }
    };
    (0..size).map(entry).filter(|entry| entry.file != 0).collect()
}

/// Where on the stack the key of both maps is, what was found last, the table, and its files.
const KEY: i16 = -8;
const FOUND: i16 = -16;
const TABLE: i16 = -24;
const FILES: i16 = -32;

/// Registers: 6 the text to be written, 7 the task, 8 the record, 9 the question.
fn program(question: BorrowedFd<'_>, room: BorrowedFd<'_>, places: &Places) -> Vec<u64> {
    let mut code = Code::default();
    let [no_task, no_room, no_question] = code.begin(room, question, KEY);
    for slot in [FOUND, TABLE, FILES] {
        code.add(STORE, 10, 0, slot, 0);
    }

    // Threads have the table of their process.
    let member = |code: &mut Code, offset: u32, at: usize, len: i32| {
        code.add(COPY, 3, 7, 0, 0).add(ADD, 3, 0, 0, offset.cast_signed());
        code.add(COPY, 1, 8, 0, 0).add(ADD, 1, 0, 0, at as i32);
        code.add(SET, 2, 0, 0, len).call(helper::READ_KERNEL);
    };
    member(&mut code, places.task_thread, SIZE_AT, 4);
    member(&mut code, places.task_process, PROCESS_AT, 4);
    code.add(LOAD_WORD, 1, 8, SIZE_AT as i16, 0).add(LOAD_WORD, 2, 8, PROCESS_AT as i16, 0);
    let leader = code.jump_beside(IF_SAME, 1, 2);
    code.add(SET, 0, 0, 0, 0).add(EXIT, 0, 0, 0, 0);
    code.land(leader);

    // Whether it is in the namespace.
    code.add(COPY, 3, 7, 0, 0);
    follow(&mut code, places.task_number, FOUND, 8);
    code.add(LOAD, 3, 10, FOUND, 0);
    let no_number = code.jump(IF_EQUAL, 3, 0);
    code.add(LOAD, 4, 9, 8, 0).add(ADD_REGISTER, 3, 4, 0, 0);
    follow(&mut code, 0, FOUND, 8);
    code.add(LOAD, 1, 9, 0, 0).add(LOAD, 2, 10, FOUND, 0);
    let wanted = code.jump_beside(IF_SAME, 1, 2);
    code.add(SET, 0, 0, 0, 0).add(EXIT, 0, 0, 0, 0);
    code.land(wanted);

    copy_table(&mut code, places);
    code.land(no_task).land(no_room).land(no_question).land(no_number);
    code.add(SET, 0, 0, 0, 0).add(EXIT, 0, 0, 0, 0);
    code.finish()
}

/// Copies the table of the task and writes the record.
fn copy_table(code: &mut Code, places: &Places) {
    // Where a pointer leads nowhere, zeros are read.
    code.add(COPY, 3, 7, 0, 0);
    follow(code, places.task_files, FOUND, 8);
    code.add(LOAD, 3, 10, FOUND, 0);
    follow(code, places.files_table, TABLE, 8);
    let copy = |code: &mut Code, at: usize, len: i32| {
        code.add(COPY, 1, 8, 0, 0).add(ADD, 1, 0, 0, at as i32);
        code.add(SET, 2, 0, 0, len).call(helper::READ_KERNEL);
    };
    code.add(LOAD, 3, 10, TABLE, 0).add(ADD, 3, 0, 0, places.table_size.cast_signed());
    copy(code, SIZE_AT, 4);
    let closing = (places.table_closing, CLOSING_AT, MOST as i32 / 8);
    for (member, at, len) in [closing, (places.table_files, FILES_AT, 8 * FIRST as i32)] {
        code.add(LOAD, 3, 10, TABLE, 0);
        follow(code, member, FILES, 8);
        code.add(LOAD, 3, 10, FILES, 0);
        copy(code, at, len);
    }
    let locks_of = |code: &mut Code, descriptors: std::ops::Range<usize>| {
        for fd in descriptors {
            let (at, locks) = file_at(fd);
            code.add(LOAD, 3, 8, at as i16, 0);
            let closed = code.jump(IF_EQUAL, 3, 0);
            follow(code, places.file_inode, FOUND, 8);
            code.add(LOAD, 3, 10, FOUND, 0).add(ADD, 3, 0, 0, places.inode_locks.cast_signed());
            copy(code, at + locks, 8);
            code.land(closed);
        }
    };
    let write = |code: &mut Code, count: usize| {
        code.add(COPY, 1, 6, 0, 0).add(COPY, 2, 8, 0, 0);
        code.add(SET, 3, 0, 0, record_len(count) as i32).call(helper::WRITE);
    };
    locks_of(code, 0..FIRST);
    code.add(LOAD_WORD, 1, 8, SIZE_AT as i16, 0);
    let small = code.jump(IF_AT_MOST, 1, FIRST as i32);
    let larger = code.jump(IF_AT_MOST, 1, MOST as i32);
    code.land(small);
    write(code, FIRST);
    code.add(SET, 0, 0, 0, 0).add(EXIT, 0, 0, 0, 0);
    code.land(larger);
    code.add(LOAD, 3, 10, FILES, 0).add(ADD, 3, 0, 0, 8 * FIRST as i32);
    copy(code, file_at(FIRST).0, 8 * (MOST - FIRST) as i32);
    locks_of(code, FIRST..MOST);
    write(code, MOST);
}

/// Reads what stands behind register 3 into the stack.
fn follow(code: &mut Code, offset: u32, slot: i16, len: i32) {
    code.add(ADD, 3, 0, 0, offset.cast_signed());
    code.stack(1, slot).add(SET, 2, 0, 0, len).call(helper::READ_KERNEL);
}

#[cfg(test)]
mod tests {
    use std::{
        fs,
        io::{BufRead, BufReader},
        process::{Child, Command, Stdio},
        time::Instant,
    };

    use super::*;
    use crate::procfs;

    /// A process with a table of the first size: its parent has little open, unlike we ourselves.
    struct Sleeper {
        shell: Child,
        host: i32,
    }

    impl Sleeper {
        /// Runs `sleep` in the end.
        fn start(command: &str) -> Self {
            let script = format!("{command} & echo $!; wait");
            let mut shell = Command::new("sh");
            shell.args(["-c", &script]).stdin(Stdio::null()).stdout(Stdio::piped());
            let mut shell = shell.spawn().unwrap();
            let mut line = String::new();
            BufReader::new(shell.stdout.take().unwrap()).read_line(&mut line).unwrap();
            let sleeper = Self { shell, host: line.trim().parse().unwrap() };
            let program = || procfs::link(sleeper.host, "exe").unwrap();
            while program().rsplit('/').next() != Some("sleep") {
                std::thread::yield_now();
            }
            sleeper
        }

        fn table(&self) -> Vec<Entry> {
            // Those that close when a program is executed are closed after its name is there.
            loop {
                let table = read(std::process::id().cast_signed()).remove(&self.host).unwrap();
                if table.iter().all(|entry| !entry.close_on_exec) {
                    return table;
                }
            }
        }
    }

    impl Drop for Sleeper {
        fn drop(&mut self) {
            let sleeper = nix::unistd::Pid::from_raw(self.host);
            let _ = nix::sys::signal::kill(sleeper, nix::sys::signal::Signal::SIGKILL);
            let _ = self.shell.wait();
        }
    }

    #[test]
    fn a_table_is_what_proc_shows() {
        let locked = tempfile::NamedTempFile::new().unwrap();
        let path = locked.path().to_str().unwrap();
        let sleeper = Sleeper::start(&format!("flock --no-fork {path} sleep 100"));
        // Its libraries are open for a moment.
        let shown = || -> Option<Vec<(i32, bool)>> {
            let entries = fs::read_dir(procfs::path(sleeper.host, "fd")).ok()?;
            let each = entries.map(|entry| {
                let entry = entry.ok()?;
                let is_locked = fs::read_link(entry.path()).ok()? == locked.path();
                Some((entry.file_name().to_str()?.parse().ok()?, is_locked))
            });
            each.collect()
        };
        let start = Instant::now();
        let (table, shown) = loop {
            let (table, mut shown) = (sleeper.table(), shown().unwrap_or_default());
            shown.sort_unstable();
            let same = table.iter().map(|entry| entry.fd).eq(shown.iter().map(|(fd, _)| *fd));
            if same {
                break (table, shown);
            }
            assert!(start.elapsed().as_secs() < 10, "{table:?} {shown:?}");
        };
        let locked = |fd: i32| shown.contains(&(fd, true));
        assert!(table.iter().any(|entry| locked(entry.fd)));
        assert!(table.iter().filter(|entry| locked(entry.fd)).all(|entry| !entry.unlocked));
    }

    #[test]
    fn what_children_inherit_is_one_file() {
        let sleepers = ["sleep 100", "sleep 101"].map(Sleeper::start);
        let [first, second] = sleepers.each_ref().map(Sleeper::table);
        let shared = |fd: i32| {
            let file = |table: &[Entry]| table.iter().find(|it| it.fd == fd).map(|it| it.file);
            file(&first).is_some() && file(&first) == file(&second)
        };
        assert!(shared(2), "{first:?} {second:?}");
        assert!(!shared(1), "each has a pipe of its own: {first:?} {second:?}");
    }
}
