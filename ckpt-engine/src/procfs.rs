//! What `/proc` tells about processes (proc(5)), read from the host.

use std::{
    borrow::Cow,
    fs::{self, File},
    io::{self, Read},
    path::{Path, PathBuf},
    str::FromStr,
    sync::OnceLock,
};

use ckpt_format::memory::Advice;
use serde::{Deserialize, Serialize};

use crate::errno;

/// A file of `/proc` that could not be read or understood.
#[derive(Debug, thiserror::Error, Serialize, Deserialize)]
pub enum ProcError {
    /// The file could not be read: most often the process has ended.
    #[error("cannot read {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        #[serde(with = "errno")]
        source: io::Error,
    },
    /// The file does not look as proc(5) says.
    #[error("{} has no usable field {field}", path.display())]
    Field {
        /// The file.
        path: PathBuf,
        /// What was looked for.
        field: Cow<'static, str>,
    },
}

impl ProcError {
    /// True when the process has ended, so that nothing is wrong with the host.
    pub fn is_gone(&self) -> bool {
        match self {
            Self::Read { source, .. } => {
                source.kind() == io::ErrorKind::NotFound
                    || source.raw_os_error() == Some(libc::ESRCH)
            }
            Self::Field { .. } => false,
        }
    }
}

/// `/proc/PID/NAME`.
pub fn path(pid: i32, name: &str) -> PathBuf {
    PathBuf::from(format!("/proc/{pid}/{name}"))
}

/// Reads the rest of an open file whose size nobody knows, in as few calls as there can be: each
/// one has the kernel look for its place again, and files of `/proc` have no size to prepare for.
pub fn read_rest(mut file: &File) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    let mut buffer = [0; 16 << 10];
    loop {
        match file.read(&mut buffer) {
            Ok(0) => return Ok(bytes),
            Ok(length) => bytes.extend_from_slice(&buffer[..length]),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

/// Reads a whole file of a process.
pub fn read(pid: i32, name: &str) -> Result<Vec<u8>, ProcError> {
    let path = path(pid, name);
    let bytes = File::open(&path).and_then(|file| read_rest(&file));
    bytes.map_err(|source| ProcError::Read { path, source })
}

/// Reads a whole text file of a process.
pub fn read_text(pid: i32, name: &str) -> Result<String, ProcError> {
    read(pid, name).map(|bytes| String::from_utf8_lossy(&bytes).into_owned())
}

/// Reads the target of a link such as `exe` or `cwd`.
pub fn link(pid: i32, name: &str) -> Result<String, ProcError> {
    let path = path(pid, name);
    match fs::read_link(&path) {
        Ok(target) => Ok(target.to_string_lossy().into_owned()),
        Err(source) => Err(ProcError::Read { path, source }),
    }
}

/// The numbers of the threads of a process, the leader first.
pub fn threads(pid: i32) -> Result<Vec<i32>, ProcError> {
    let path = path(pid, "task");
    let entries = fs::read_dir(&path).map_err(|source| ProcError::Read { path, source })?;
    let mut threads: Vec<i32> =
        entries.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect();
    threads.sort_unstable_by_key(|&tid| (tid != pid, tid));
    Ok(threads)
}

/// The children of all threads of a process, zombies too (proc_pid_children(5)).
pub fn children(pid: i32) -> Result<Vec<i32>, ProcError> {
    let mut children = Vec::new();
    for tid in threads(pid)? {
        let text = read_text(pid, &format!("task/{tid}/children"))?;
        children.extend(text.split_whitespace().filter_map(|word| word.parse::<i32>().ok()));
    }
    Ok(children)
}

/// A living thread of a process whose first one has ended, by its number on the host: below `/proc`
/// it shows what the first does not show any more. None for any other process.
pub fn stand_in(pid: i32) -> Option<i32> {
    if Stat::read(pid).ok()?.state != 'Z' {
        return None;
    }
    let lives = |tid: i32| Stat::read(tid).is_ok_and(|stat| !"ZX".contains(stat.state));
    threads(pid).ok()?.into_iter().find(|&tid| tid != pid && lives(tid))
}

/// As [`threads`], without the first one if it has ended before others.
pub fn living_threads(pid: i32) -> Result<Vec<i32>, ProcError> {
    let mut all = threads(pid)?;
    if all.len() > 1 && Stat::read(pid)?.state == 'Z' {
        all.retain(|&tid| tid != pid);
    }
    Ok(all)
}

/// As [`cgroup_processes`], with a [`stand_in`] for each whose first thread has ended.
pub fn cgroup_members(cgroup: &Path) -> io::Result<Vec<i32>> {
    let all = cgroup_processes(cgroup)?;
    Ok(all.into_iter().map(|pid| stand_in(pid).unwrap_or(pid)).collect())
}

/// The processes in a cgroup and all below it.
pub fn cgroup_processes(cgroup: &Path) -> io::Result<Vec<i32>> {
    let mut pids = Vec::new();
    let mut pending = vec![cgroup.to_owned()];
    while let Some(directory) = pending.pop() {
        let procs = match fs::read_to_string(directory.join("cgroup.procs")) {
            // It holds threads, whose processes are told further up.
            Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => String::new(),
            // Removed by a VE that runs.
            Err(_) if directory != cgroup => continue,
            procs => procs?,
        };
        pids.extend(procs.lines().filter_map(|line| line.parse::<i32>().ok()));
        for entry in fs::read_dir(&directory).into_iter().flatten().flatten() {
            if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                pending.push(entry.path());
            }
        }
    }
    pids.sort_unstable();
    pids.dedup();
    Ok(pids)
}

/// `/proc/PID/stat`.
#[derive(Debug)]
pub struct Stat {
    pid: i32,
    /// `R`, `S`, `D`, `Z`, `T`, `t` …
    pub state: char,
    /// What follows the name.
    fields: String,
}

impl Stat {
    /// Reads it.
    pub fn read(pid: i32) -> Result<Self, ProcError> {
        Self::parse(&read_text(pid, "stat")?, pid)
    }

    fn parse(text: &str, pid: i32) -> Result<Self, ProcError> {
        let missing =
            |field: &'static str| ProcError::Field { path: path(pid, "stat"), field: field.into() };
        let (_, fields) = text.rsplit_once(')').ok_or_else(|| missing("comm"))?;
        let fields = fields.trim_start();
        let state = fields.chars().next().ok_or_else(|| missing("state"))?;
        Ok(Self { pid, state, fields: fields.to_owned() })
    }

    /// The field with its number in proc(5); `state` is number 3.
    pub fn field<T: FromStr>(&self, number: usize, field: &'static str) -> Result<T, ProcError> {
        let found = self.fields.split_ascii_whitespace().nth(number - 3);
        found
            .and_then(|text| text.parse().ok())
            .ok_or_else(|| ProcError::Field { path: path(self.pid, "stat"), field: field.into() })
    }
}

/// `/proc/PID/status`.
#[derive(Debug)]
pub struct Status {
    path: PathBuf,
    text: String,
}

impl Status {
    /// Reads that of a process.
    pub fn read(pid: i32) -> Result<Self, ProcError> {
        Ok(Self { path: path(pid, "status"), text: read_text(pid, "status")? })
    }

    /// Reads that of a thread.
    pub fn of_thread(pid: i32, tid: i32) -> Result<Self, ProcError> {
        let name = format!("task/{tid}/status");
        Ok(Self { path: path(pid, &name), text: read_text(pid, &name)? })
    }

    /// The text behind a key.
    pub fn text(&self, key: &'static str) -> Result<&str, ProcError> {
        self.text
            .lines()
            .find_map(|line| line.strip_prefix(key)?.strip_prefix(':').map(str::trim))
            .ok_or_else(|| ProcError::Field { path: self.path.clone(), field: key.into() })
    }

    /// All numbers behind a key, in the base given.
    pub fn numbers(&self, key: &'static str, radix: u32) -> Result<Vec<u64>, ProcError> {
        self.text(key)?
            .split_whitespace()
            .map(|word| u64::from_str_radix(word, radix))
            .collect::<Result<_, _>>()
            .map_err(|_| ProcError::Field { path: self.path.clone(), field: key.into() })
    }

    /// One number behind a key.
    pub fn number(&self, key: &'static str, radix: u32) -> Result<u64, ProcError> {
        self.numbers(key, radix)?
            .first()
            .copied()
            .ok_or_else(|| ProcError::Field { path: self.path.clone(), field: key.into() })
    }

    /// What the pid namespace of the VE sees, for the `NS…` keys. For a process that is in none
    /// but ours it is what we see.
    pub fn in_ve(&self, key: &'static str) -> Result<i32, ProcError> {
        let numbers = self.numbers(key, 10)?;
        let number = numbers.get(namespace_depth()?).or(numbers.last());
        number
            .map(|&number| number as i32)
            .ok_or_else(|| ProcError::Field { path: self.path.clone(), field: key.into() })
    }

    /// What the pid namespaces below that of the VE see, the outermost first.
    pub fn below_ve(&self, key: &'static str) -> Result<Vec<i32>, ProcError> {
        let numbers = self.numbers(key, 10)?.into_iter().skip(namespace_depth()? + 1);
        Ok(numbers.map(|number| number as i32).collect())
    }
}

/// How many pid namespaces we ourselves are in, as far as `/proc` shows.
fn namespace_depth() -> Result<usize, ProcError> {
    static DEPTH: OnceLock<usize> = OnceLock::new();
    if let Some(&depth) = DEPTH.get() {
        return Ok(depth);
    }
    let own = Status::read(std::process::id().cast_signed())?.numbers("NSpid", 10)?;
    Ok(*DEPTH.get_or_init(|| own.len()))
}

/// One line of `/proc/PID/maps`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MapLine {
    /// First address.
    pub start: u64,
    /// First address behind.
    pub end: u64,
    /// `PROT_*` bits.
    pub protection: u8,
    /// `MAP_SHARED`.
    pub shared: bool,
    /// Offset in the file.
    pub offset: u64,
    /// The device, as shown.
    pub device: String,
    /// The inode number.
    pub inode: u64,
    /// The path or the name in brackets; empty for anonymous memory.
    pub name: String,
}

/// Parses `/proc/PID/maps`.
pub fn parse_maps(text: &str) -> Vec<MapLine> {
    text.lines().filter_map(parse_map_line).collect()
}

fn parse_map_line(line: &str) -> Option<MapLine> {
    let mut rest = line;
    let mut word = || {
        let trimmed = rest.trim_start();
        let (word, tail) = trimmed.split_once(' ').unwrap_or((trimmed, ""));
        rest = tail;
        word
    };
    let (start, end) = word().split_once('-')?;
    let flags = word().as_bytes();
    let offset = u64::from_str_radix(word(), 16).ok()?;
    let device = word().to_owned();
    let inode = word().parse().ok()?;
    let bit = |index: usize, letter: u8, bit: u8| {
        if flags.get(index) == Some(&letter) { bit } else { 0 }
    };
    Some(MapLine {
        start: u64::from_str_radix(start, 16).ok()?,
        end: u64::from_str_radix(end, 16).ok()?,
        protection: bit(0, b'r', 1) | bit(1, b'w', 2) | bit(2, b'x', 4),
        shared: flags.get(3) == Some(&b's'),
        offset,
        device,
        inode,
        name: unescape(rest.trim_start()),
    })
}

/// Undoes the `\ooo` escapes of line feeds and backslashes.
fn unescape(text: &str) -> String {
    if !text.contains('\\') {
        return text.to_owned();
    }
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&first, tail)) = rest.split_first() {
        let octal = tail.get(..3).and_then(|digits| std::str::from_utf8(digits).ok());
        match octal.and_then(|digits| u8::from_str_radix(digits, 8).ok()) {
            Some(byte) if first == b'\\' => {
                bytes.push(byte);
                rest = &tail[3..];
            }
            _ => {
                bytes.push(first);
                rest = tail;
            }
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

/// What the `VmFlags` line of `/proc/PID/smaps` adds to a [`MapLine`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct AreaFlags {
    /// Set by madvise(2) and its like.
    pub advice: Advice,
    /// `MAP_GROWSDOWN`.
    pub grows_down: bool,
    /// The file was opened for writing: a shared mapping may become writable.
    pub may_write: bool,
    /// The size of a huge page in bytes (hugetlbfs); 0 in other areas.
    pub huge_page: u64,
    /// Device memory: cannot be copied.
    pub io: bool,
    /// A shadow stack.
    pub shadow_stack: bool,
    /// Registered with a userfaultfd that the program itself made, in missing or minor mode.
    pub userfault: bool,
}

/// Parses `/proc/PID/smaps`: the lines of maps, each with its flags.
pub fn parse_smaps(smaps: &str) -> Vec<(MapLine, AreaFlags)> {
    let mut all: Vec<(MapLine, AreaFlags)> = Vec::new();
    let mut page = 0;
    for line in smaps.lines() {
        if let Some(flags) = line.strip_prefix("VmFlags:") {
            if let Some((_, last)) = all.last_mut() {
                *last = parse_flags(flags, page);
            }
        } else if let Some(size) = line.strip_prefix("KernelPageSize:") {
            let kilobytes = size.trim().strip_suffix(" kB").and_then(|it| it.parse::<u64>().ok());
            page = kilobytes.unwrap_or(0) << 10;
        } else if !line.starts_with(|first: char| first.is_ascii_uppercase()) {
            all.extend(parse_map_line(line).map(|line| (line, AreaFlags::default())));
        }
    }
    all
}

fn parse_flags(text: &str, page: u64) -> AreaFlags {
    let mut flags = AreaFlags::default();
    for word in text.split_whitespace() {
        match word {
            "gd" => flags.grows_down = true,
            "mw" => flags.may_write = true,
            "ht" => flags.huge_page = page,
            "io" | "pf" => flags.io = true,
            "sl" => flags.advice.sealed = true,
            "dp" => flags.advice.droppable = true,
            "lf" => flags.advice.locked_on_fault = true,
            "ss" => flags.shadow_stack = true,
            "um" | "ui" => flags.userfault = true,
            "lo" => flags.advice.locked = true,
            "dc" => flags.advice.dont_fork = true,
            "dd" => flags.advice.dont_dump = true,
            "wf" => flags.advice.wipe_on_fork = true,
            "hg" => flags.advice.huge = true,
            "nh" => flags.advice.no_huge = true,
            "mg" => flags.advice.mergeable = true,
            "nr" => flags.advice.no_reserve = true,
            "sr" => flags.advice.sequential = true,
            "rr" => flags.advice.random = true,
            _ => {}
        }
    }
    flags
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_maps_line_with_spaces_and_escapes() {
        let line =
            "7f0-7f1 rw-s 00001000 00:1a 42                         /tmp/a b\\012c (deleted)";
        let map = &parse_maps(line)[0];
        assert_eq!((map.start, map.end, map.protection, map.shared), (0x7f0, 0x7f1, 3, true));
        assert_eq!((map.offset, map.inode), (0x1000, 42));
        assert_eq!(map.name, "/tmp/a b\nc (deleted)");
    }

    #[test]
    fn a_command_name_with_brackets_does_not_shift_the_fields() {
        let stat = Stat::parse("7 (a) b)) S 1 2 3", 7).unwrap();
        assert_eq!(stat.state, 'S');
        assert_eq!(stat.field::<i32>(4, "ppid").unwrap(), 1);
        assert_eq!(stat.field::<i32>(6, "session").unwrap(), 3);
        assert!(stat.field::<i32>(7, "tty_nr").is_err());
    }

    #[test]
    fn area_flags_belong_to_the_line_before() {
        let smaps = "1000-2000 rw-p 00000000 00:00 0 [stack]\nSize: 4 kB\nVmFlags: rd wr mr mw gd\n\
                     3000-4000 r--p 00000000 00:00 0\nSize: 4 kB\nVmFlags: rd hg\n";
        let [(stack, first), (other, second)] = &parse_smaps(smaps)[..] else { panic!() };
        assert_eq!((stack.start, stack.name.as_str(), other.start), (0x1000, "[stack]", 0x3000));
        assert!(first.grows_down && first.may_write);
        assert!(second.advice.huge && !second.grows_down);
    }

    #[test]
    fn our_own_status_has_our_number() {
        let pid = std::process::id() as i32;
        assert_eq!(Status::read(pid).unwrap().in_ve("NSpid").unwrap(), pid);
        assert!(threads(pid).unwrap().starts_with(&[pid]));
    }
}
