//! System V memory, semaphores and messages of the calling thread's IPC namespace.

use std::{io, mem, ptr};

use super::check;

/// The three families of objects with numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    /// shmget(2).
    Memory,
    /// semget(2).
    Semaphores,
    /// msgget(2).
    Messages,
}

/// Who may use an object, as the host numbers users and groups.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "the names are those of struct ipc_perm")]
pub struct Permissions {
    pub uid: u32,
    pub gid: u32,
    pub mode: u16,
}

/// shmget(2) of something new; key 0 is a private one. Of huge pages of this size in bytes, or of
/// usual ones (0).
pub fn make_memory(key: i32, size: usize, huge: u64) -> io::Result<i32> {
    let kind = match huge {
        0 => 0,
        page => libc::SHM_HUGETLB | page.trailing_zeros().cast_signed() << libc::MAP_HUGE_SHIFT,
    };
    // SAFETY: integers only.
    made(unsafe { libc::shmget(key, size, CREATE | kind) })
}

/// semget(2) of something new.
pub fn make_semaphores(key: i32, count: usize) -> io::Result<i32> {
    let count = i32::try_from(count).map_err(io::Error::other)?;
    // SAFETY: integers only.
    made(unsafe { libc::semget(key, count, CREATE) })
}

/// msgget(2) of something new.
pub fn make_messages(key: i32) -> io::Result<i32> {
    // SAFETY: integers only.
    made(unsafe { libc::msgget(key, CREATE) })
}

const CREATE: i32 = libc::IPC_CREAT | libc::IPC_EXCL | 0o600;

fn made(id: i32) -> io::Result<i32> {
    if id < 0 { Err(io::Error::last_os_error()) } else { Ok(id) }
}

/// The segment that has this key now.
pub fn memory_with_key(key: i32) -> io::Result<i32> {
    // SAFETY: integers only.
    made(unsafe { libc::shmget(key, 0, 0) })
}

/// `IPC_RMID`. A segment that somebody has attached lives on until the last one detaches it.
pub fn remove(family: Family, id: i32) -> io::Result<()> {
    let none = ptr::null_mut::<libc::shmid_ds>();
    let result = match family {
        // SAFETY: this command takes no structure.
        Family::Memory => unsafe { libc::shmctl(id, libc::IPC_RMID, none) },
        // SAFETY: this command takes no fourth argument.
        Family::Semaphores => unsafe { libc::semctl(id, 0, libc::IPC_RMID) },
        // SAFETY: this command takes no structure.
        Family::Messages => unsafe { libc::msgctl(id, libc::IPC_RMID, none.cast()) },
    };
    check(result.into()).map(drop)
}

/// `IPC_SET`: the owner and the mode.
pub fn set_permissions(family: Family, id: i32, wanted: Permissions) -> io::Result<()> {
    let result = match family {
        Family::Memory => {
            // SAFETY: plain integers, for which all zero is a valid value.
            let mut state: libc::shmid_ds = unsafe { mem::zeroed() };
            change(&mut state.shm_perm, wanted);
            // SAFETY: the kernel reads one structure, which `state` is.
            unsafe { libc::shmctl(id, libc::IPC_SET, &raw mut state) }
        }
        Family::Semaphores => {
            // SAFETY: plain integers, for which all zero is a valid value.
            let mut state: libc::semid_ds = unsafe { mem::zeroed() };
            change(&mut state.sem_perm, wanted);
            // SAFETY: the kernel reads one structure, which `state` is.
            unsafe { libc::semctl(id, 0, libc::IPC_SET, &raw mut state) }
        }
        Family::Messages => {
            let mut state = message_state(id)?;
            change(&mut state.msg_perm, wanted);
            // SAFETY: the kernel reads one structure, which `state` is.
            unsafe { libc::msgctl(id, libc::IPC_SET, &raw mut state) }
        }
    };
    check(result.into()).map(drop)
}

fn change(permissions: &mut libc::ipc_perm, wanted: Permissions) {
    permissions.uid = wanted.uid;
    permissions.gid = wanted.gid;
    permissions.mode = wanted.mode;
}

/// A segment in our own memory, until it is dropped.
#[derive(Debug)]
pub struct Attached(*mut libc::c_void);

impl Attached {
    /// shmat(2) where the kernel finds room.
    pub fn new(id: i32, read_only: bool) -> io::Result<Self> {
        let flags = if read_only { libc::SHM_RDONLY } else { 0 };
        // SAFETY: no address is asked for, so no existing map is replaced.
        let start = unsafe { libc::shmat(id, ptr::null(), flags) };
        if start.addr() == usize::MAX { Err(io::Error::last_os_error()) } else { Ok(Self(start)) }
    }

    /// Where it begins.
    pub fn address(&self) -> u64 {
        self.0.addr() as u64
    }
}

impl Drop for Attached {
    fn drop(&mut self) {
        // SAFETY: the segment was attached here by `new`, and nothing refers to its bytes.
        unsafe { libc::shmdt(self.0) };
    }
}

/// `SHM_LOCK`.
pub fn lock_memory(id: i32) -> io::Result<()> {
    // SAFETY: this command takes no structure.
    check(unsafe { libc::shmctl(id, libc::SHM_LOCK, ptr::null_mut()) }.into()).map(drop)
}

/// `GETALL` of a set of so many semaphores.
pub fn semaphore_values(id: i32, count: usize) -> io::Result<Vec<u16>> {
    let mut values = vec![0u16; count];
    // SAFETY: the kernel writes as many values as the set has; its size never changes.
    check(unsafe { libc::semctl(id, 0, libc::GETALL, values.as_mut_ptr()) }.into())?;
    Ok(values)
}

/// `SETALL`.
pub fn set_semaphore_values(id: i32, values: &[u16]) -> io::Result<()> {
    // SAFETY: the kernel reads as many values as the set has, and it was made for these.
    check(unsafe { libc::semctl(id, 0, libc::SETALL, values.as_ptr()) }.into()).map(drop)
}

fn message_state(id: i32) -> io::Result<libc::msqid_ds> {
    // SAFETY: plain integers, for which all zero is a valid value.
    let mut state: libc::msqid_ds = unsafe { mem::zeroed() };
    // SAFETY: the kernel writes one structure, which `state` is.
    check(unsafe { libc::msgctl(id, libc::IPC_STAT, &raw mut state) }.into())?;
    Ok(state)
}

/// How many bytes a queue may hold.
pub fn queue_limit(id: i32) -> io::Result<u64> {
    message_state(id).map(|state| state.msg_qbytes)
}

/// Sets how many bytes a queue may hold.
pub fn set_queue_limit(id: i32, bytes: u64) -> io::Result<()> {
    let mut state = message_state(id)?;
    state.msg_qbytes = bytes;
    // SAFETY: the kernel reads one structure, which `state` is.
    check(unsafe { libc::msgctl(id, libc::IPC_SET, &raw mut state) }.into()).map(drop)
}

/// The message at a place in a queue, with its type, which stays there; `None` behind the last.
pub fn peek_message(id: i32, place: i64, size_max: usize) -> io::Result<Option<(i64, Vec<u8>)>> {
    const MSG_COPY: i32 = 0o40000;
    // A long for the type, then the text.
    let mut room = vec![0u64; 1 + size_max.div_ceil(8)];
    let flags = MSG_COPY | libc::IPC_NOWAIT;
    // SAFETY: the buffer holds the type and `size_max` bytes.
    let length = unsafe { libc::msgrcv(id, room.as_mut_ptr().cast(), size_max, place, flags) };
    if length < 0 {
        let error = io::Error::last_os_error();
        return if error.raw_os_error() == Some(libc::ENOMSG) { Ok(None) } else { Err(error) };
    }
    let text = room[1..].iter().flat_map(|word| word.to_ne_bytes()).take(length as usize).collect();
    Ok(Some((room[0].cast_signed(), text)))
}

/// msgsnd(2) without waiting.
pub fn send_message(id: i32, kind: i64, text: &[u8]) -> io::Result<()> {
    let mut room = kind.to_ne_bytes().to_vec();
    room.extend(text);
    // SAFETY: the buffer holds the type and `text.len()` bytes; the kernel copies bytes, so it
    // need not be aligned.
    check(unsafe { libc::msgsnd(id, room.as_ptr().cast(), text.len(), libc::IPC_NOWAIT) }.into())
        .map(drop)
}
