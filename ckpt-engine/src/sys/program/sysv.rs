//! System V shared memory, semaphores and messages.

use std::io;
use std::mem::zeroed;
use std::ptr::{self, NonNull};
use std::sync::atomic::AtomicU64;

use super::map::PAGE_BYTES;

/// shmget(2). Makes it with this mode, or finds it when `mode` is none.
pub fn segment(key: i32, bytes: usize, mode: Option<i32>) -> io::Result<i32> {
    // SAFETY: integers only.
    number(unsafe { libc::shmget(key, bytes, flags(mode)) })
}

/// The same, made of huge pages.
pub fn segment_of_huge_pages(key: i32, bytes: usize, mode: i32) -> io::Result<i32> {
    // SAFETY: integers only.
    number(unsafe { libc::shmget(key, bytes, flags(Some(mode)) | libc::SHM_HUGETLB) })
}

/// What `IPC_STAT` tells about a segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SegmentState {
    /// Its size.
    pub bytes: usize,
    /// How often it is attached.
    pub attached: u64,
    /// The mode bits.
    pub mode: u32,
    /// Owner, group, creator's user and group.
    pub owners: [u32; 4],
    /// The key.
    pub key: i32,
}

/// `IPC_STAT` of a segment.
pub fn segment_state(id: i32) -> io::Result<SegmentState> {
    // SAFETY: all bits zero is valid for this plain structure.
    let mut found: libc::shmid_ds = unsafe { zeroed() };
    // SAFETY: the kernel fills one structure, which lives during the call.
    number(unsafe { libc::shmctl(id, libc::IPC_STAT, &raw mut found) })?;
    let who = found.shm_perm;
    Ok(SegmentState {
        bytes: found.shm_segsz,
        attached: found.shm_nattch,
        mode: u32::from(who.mode),
        owners: [who.uid, who.gid, who.cuid, who.cgid],
        key: who.__key,
    })
}

/// `IPC_RMID` of a segment.
pub fn remove_segment(id: i32) -> io::Result<()> {
    // SAFETY: this command takes no structure.
    number(unsafe { libc::shmctl(id, libc::IPC_RMID, ptr::null_mut()) }).map(drop)
}

/// An attached segment, detached when dropped.
#[derive(Debug)]
pub struct Attached {
    start: NonNull<u8>,
    bytes: usize,
}

impl Attached {
    /// shmat(2) of a segment of this size.
    pub fn new(id: i32, bytes: usize, read_only: bool) -> io::Result<Self> {
        let flags = if read_only { libc::SHM_RDONLY } else { 0 };
        // SAFETY: no address is asked for, so no existing map is replaced.
        let start = unsafe { libc::shmat(id, ptr::null(), flags) };
        if start.addr() == usize::MAX {
            return Err(io::Error::last_os_error());
        }
        let start = NonNull::new(start.cast()).ok_or_else(io::Error::last_os_error)?;
        Ok(Self { start, bytes })
    }

    /// Where it is.
    pub fn address(&self) -> usize {
        self.start.as_ptr() as usize
    }

    /// One word. Panics when there is no such word. In a segment attached for reading it must
    /// only be read.
    pub fn word(&self, index: usize) -> &AtomicU64 {
        assert!((index + 1) * size_of::<AtomicU64>() <= self.bytes, "word {index}");
        // SAFETY: the word lies in the segment, as checked.
        let word = unsafe { self.start.cast::<AtomicU64>().add(index) };
        // SAFETY: aligned to pages, attached as long as `self`, valid for every bit pattern, and
        // all access is atomic.
        unsafe { word.as_ref() }
    }

    /// Gives up all but the first pages.
    pub fn shorten(&mut self, pages: usize) -> io::Result<()> {
        let keep = pages * PAGE_BYTES;
        assert!(keep > 0 && keep < self.bytes, "{pages} pages");
        // SAFETY: the range lies in the segment, and `&mut self` proves that no word is borrowed.
        let result = unsafe {
            libc::munmap(self.start.as_ptr().wrapping_add(keep).cast(), self.bytes - keep)
        };
        self.bytes = keep;
        number(result).map(drop)
    }
}

impl Drop for Attached {
    fn drop(&mut self) {
        // SAFETY: it was attached here, and nothing borrows it any more.
        unsafe { libc::shmdt(self.start.as_ptr().cast()) };
    }
}

/// semget(2). Makes it with this mode, or finds it when `mode` is none.
pub fn semaphores(key: i32, count: i32, mode: Option<i32>) -> io::Result<i32> {
    // SAFETY: integers only.
    number(unsafe { libc::semget(key, count, flags(mode)) })
}

/// One operation on one semaphore: which, what is added, and `SEM_UNDO` and the like.
pub type Operation = (u16, i16, i32);

/// semop(2).
pub fn operate(id: i32, operations: &[Operation]) -> io::Result<()> {
    let mut list: Vec<libc::sembuf> = operations
        .iter()
        .map(|&(number, change, flags)| libc::sembuf {
            sem_num: number,
            sem_op: change,
            sem_flg: flags as i16,
        })
        .collect();
    // SAFETY: the list has the length given.
    number(unsafe { libc::semop(id, list.as_mut_ptr(), list.len()) }).map(drop)
}

/// The commands that ask for one number of a semaphore.
#[derive(Clone, Copy, Debug)]
pub enum Ask {
    /// `GETVAL`.
    Value,
    /// `GETNCNT`: how many wait for more.
    Waiting,
}

/// Asks about one semaphore.
pub fn semaphore(id: i32, which: i32, ask: Ask) -> io::Result<i32> {
    let command = match ask {
        Ask::Value => libc::GETVAL,
        Ask::Waiting => libc::GETNCNT,
    };
    // SAFETY: these commands take no fourth argument.
    number(unsafe { libc::semctl(id, which, command) })
}

/// `SETVAL`.
pub fn set_semaphore(id: i32, which: i32, value: i32) -> io::Result<()> {
    // SAFETY: this command takes an integer.
    number(unsafe { libc::semctl(id, which, libc::SETVAL, value) }).map(drop)
}

/// `IPC_RMID` of a set.
pub fn remove_semaphores(id: i32) -> io::Result<()> {
    // SAFETY: this command takes no fourth argument.
    number(unsafe { libc::semctl(id, 0, libc::IPC_RMID) }).map(drop)
}

/// msgget(2). Makes it with this mode, or finds it when `mode` is none.
pub fn messages(key: i32, mode: Option<i32>) -> io::Result<i32> {
    // SAFETY: integers only.
    number(unsafe { libc::msgget(key, flags(mode)) })
}

/// msgsnd(2) without waiting.
pub fn send(id: i32, kind: i64, text: &[u8]) -> io::Result<()> {
    let mut bytes = kind.to_ne_bytes().to_vec();
    bytes.extend(text);
    // SAFETY: the type, then as many bytes as the length tells.
    number(unsafe { libc::msgsnd(id, bytes.as_ptr().cast(), text.len(), libc::IPC_NOWAIT) })
        .map(drop)
}

/// msgrcv(2) of the next message of this type (see there), with its type.
pub fn receive(id: i32, kind: i64, wait: bool) -> io::Result<(i64, Vec<u8>)> {
    let mut bytes = vec![0u64; (16 << 10) / 8 + 1];
    let room = (bytes.len() - 1) * 8;
    let flags = if wait { 0 } else { libc::IPC_NOWAIT };
    // SAFETY: the buffer has room for the type and so many bytes.
    let length = unsafe { libc::msgrcv(id, bytes.as_mut_ptr().cast(), room, kind, flags) };
    let length = usize::try_from(length).map_err(|_| io::Error::last_os_error())?;
    let text = bytes[1..].iter().flat_map(|word| word.to_ne_bytes()).take(length).collect();
    Ok((bytes[0].cast_signed(), text))
}

/// What `IPC_STAT` tells about a queue: messages in it, and how many bytes it may hold.
pub fn queue_state(id: i32) -> io::Result<(u64, u64)> {
    // SAFETY: all bits zero is valid for this plain structure.
    let mut found: libc::msqid_ds = unsafe { zeroed() };
    // SAFETY: the kernel fills one structure, which lives during the call.
    number(unsafe { libc::msgctl(id, libc::IPC_STAT, &raw mut found) })?;
    Ok((found.msg_qnum, found.msg_qbytes))
}

/// Lets a queue hold fewer bytes.
pub fn limit_queue(id: i32, bytes: u64) -> io::Result<()> {
    // SAFETY: all bits zero is valid for this plain structure.
    let mut state: libc::msqid_ds = unsafe { zeroed() };
    // SAFETY: the kernel fills one structure, which lives during the call.
    number(unsafe { libc::msgctl(id, libc::IPC_STAT, &raw mut state) })?;
    state.msg_qbytes = bytes;
    // SAFETY: the kernel reads one structure, which lives during the call.
    number(unsafe { libc::msgctl(id, libc::IPC_SET, &raw mut state) }).map(drop)
}

/// `IPC_RMID` of a queue.
pub fn remove_messages(id: i32) -> io::Result<()> {
    // SAFETY: this command takes no structure.
    number(unsafe { libc::msgctl(id, libc::IPC_RMID, ptr::null_mut()) }).map(drop)
}

fn flags(mode: Option<i32>) -> i32 {
    mode.map_or(0, |mode| mode | libc::IPC_CREAT | libc::IPC_EXCL)
}

fn number(result: libc::c_int) -> io::Result<i32> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}
