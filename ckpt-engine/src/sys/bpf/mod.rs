//! bpf(2): maps, a program that sees packets and the place where it sees them, and a program that
//! looks at a task.

pub mod code;

use std::{
    fs::File,
    io::{self, Read},
    os::fd::{AsRawFd, BorrowedFd, OwnedFd},
};

use super::{check, descriptor::own};

/// A kind of map, by its number in the kernel's interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MapKind {
    /// Values by index.
    Array = 2,
    /// Values by index, for each processor one.
    PerProcessor = 6,
    /// Sockets by index; the value that is set is a descriptor.
    Sockets = 15,
}

const MAP_CREATE: i32 = 0;
const MAP_UPDATE: i32 = 2;
const MAP_DELETE: i32 = 3;
const PROGRAM_LOAD: i32 = 5;
const LINK_CREATE: i32 = 28;
const ITERATOR_CREATE: i32 = 33;
/// `BPF_TRACE_ITER`.
const TRACE_ITERATOR: u32 = 28;

fn pair(low: u32, high: u32) -> u64 {
    u64::from(low) | u64::from(high) << 32
}

fn number(fd: BorrowedFd<'_>) -> u32 {
    fd.as_raw_fd().cast_unsigned()
}

/// `BPF_MAP_CREATE`: a map with one entry, whose value has this many bytes.
pub fn map(kind: MapKind, value_size: u32) -> io::Result<OwnedFd> {
    let attributes = [pair(kind as u32, 4), pair(value_size, 1)];
    // SAFETY: the kernel reads the 16 bytes of `attributes`, which hold only integers.
    own(unsafe {
        libc::syscall(libc::SYS_bpf, MAP_CREATE, attributes.as_ptr(), size_of_val(&attributes))
    })
}

/// `BPF_MAP_UPDATE_ELEM` of the only entry of a map made with this size of value.
pub fn set_entry<const SIZE: usize>(map: BorrowedFd<'_>, value: &[u8; SIZE]) -> io::Result<()> {
    let key = 0u32;
    let attributes =
        [pair(number(map), 0), (&raw const key).addr() as u64, value.as_ptr().addr() as u64, 0];
    // SAFETY: the kernel reads the 32 bytes of `attributes`, four bytes at `key`, and at `value`
    // as many as the map was made for; all live across the call. A map with larger values than
    // SIZE would make it read on behind them, within this process, and reading is all it does.
    check(unsafe {
        libc::syscall(libc::SYS_bpf, MAP_UPDATE, attributes.as_ptr(), size_of_val(&attributes))
    })
    .map(drop)
}

/// `BPF_MAP_DELETE_ELEM` of the only entry of a map.
pub fn clear_entry(map: BorrowedFd<'_>) -> io::Result<()> {
    let key = 0u32;
    let attributes = [pair(number(map), 0), (&raw const key).addr() as u64];
    // SAFETY: the kernel reads the 16 bytes of `attributes` and four bytes at `key`, which live
    // across the call.
    check(unsafe {
        libc::syscall(libc::SYS_bpf, MAP_DELETE, attributes.as_ptr(), size_of_val(&attributes))
    })
    .map(drop)
}

/// `BPF_PROG_LOAD` of a program that sees packets (`BPF_PROG_TYPE_SCHED_CLS`).
pub fn load(instructions: &[u64]) -> io::Result<OwnedFd> {
    const CLASSIFIER: u32 = 3;
    const LICENCE: &std::ffi::CStr = c"GPL";
    let count = u32::try_from(instructions.len()).map_err(io::Error::other)?;
    let attributes = [
        pair(CLASSIFIER, count),
        instructions.as_ptr().addr() as u64,
        LICENCE.as_ptr().addr() as u64,
    ];
    // SAFETY: the kernel reads the 24 bytes of `attributes`, `count` instructions of eight bytes,
    // and a text that ends with NUL; all live across the call. It checks the program itself.
    own(unsafe {
        libc::syscall(libc::SYS_bpf, PROGRAM_LOAD, attributes.as_ptr(), size_of_val(&attributes))
    })
}

/// `BPF_LINK_CREATE`: shows a program what an interface of the calling thread's network
/// receives, as long as the returned descriptor is open.
pub fn attach_to_ingress(program: BorrowedFd<'_>, interface: u32) -> io::Result<OwnedFd> {
    const TCX_INGRESS: u32 = 46;
    let attributes = [pair(number(program), interface), pair(TCX_INGRESS, 0)];
    // SAFETY: the kernel reads the 16 bytes of `attributes`, which hold only integers.
    own(unsafe {
        libc::syscall(libc::SYS_bpf, LINK_CREATE, attributes.as_ptr(), size_of_val(&attributes))
    })
}

/// `BPF_PROG_LOAD` of a program that is shown tasks or their files; `target` is the number of the
/// kernel's function `bpf_iter_task` or `bpf_iter_task_file`.
pub fn load_for_tasks(instructions: &[u64], target: u32) -> io::Result<OwnedFd> {
    const TRACING: u32 = 26;
    const LICENCE: &std::ffi::CStr = c"GPL";
    let count = u32::try_from(instructions.len()).map_err(io::Error::other)?;
    let mut attributes = [0u64; 15];
    attributes[0] = pair(TRACING, count);
    attributes[1] = instructions.as_ptr().addr() as u64;
    attributes[2] = LICENCE.as_ptr().addr() as u64;
    // `expected_attach_type` and `attach_btf_id`.
    attributes[8] = pair(0, TRACE_ITERATOR);
    attributes[13] = pair(0, target);
    // SAFETY: the kernel reads the 120 bytes of `attributes`, `count` instructions of eight bytes,
    // and a text that ends with NUL; all live across the call. It checks the program itself.
    own(unsafe {
        libc::syscall(libc::SYS_bpf, PROGRAM_LOAD, attributes.as_ptr(), size_of_val(&attributes))
    })
}

/// `BPF_LINK_CREATE`: for a program that is to be shown all threads that the caller can see.
pub fn link_to_tasks(program: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    let attributes = [pair(number(program), 0), pair(TRACE_ITERATOR, 0), 0, 0];
    // SAFETY: the kernel reads the 32 bytes of `attributes`, which hold only integers.
    own(unsafe {
        libc::syscall(libc::SYS_bpf, LINK_CREATE, attributes.as_ptr(), size_of_val(&attributes))
    })
}

/// `BPF_LINK_CREATE`: for a program that is to be shown this one thread.
pub fn link_to_task(program: BorrowedFd<'_>, tid: i32) -> io::Result<OwnedFd> {
    // `union bpf_iter_link_info`: tid, pid, descriptor.
    let task = [pair(tid.cast_unsigned(), 0), 0];
    let attributes = [
        pair(number(program), 0),
        pair(TRACE_ITERATOR, 0),
        task.as_ptr().addr() as u64,
        size_of_val(&task) as u64,
    ];
    // SAFETY: the kernel reads the 32 bytes of `attributes` and the 16 of `task`, which live
    // across the call.
    own(unsafe {
        libc::syscall(libc::SYS_bpf, LINK_CREATE, attributes.as_ptr(), size_of_val(&attributes))
    })
}

/// `BPF_ITER_CREATE`: a descriptor to read what the program of a link says.
pub fn iterator(link: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    let attributes = [pair(number(link), 0)];
    // SAFETY: the kernel reads the 8 bytes of `attributes`, which hold only integers.
    own(unsafe {
        libc::syscall(libc::SYS_bpf, ITERATOR_CREATE, attributes.as_ptr(), size_of_val(&attributes))
    })
}

/// All that the program of a link says.
pub fn read_all(link: BorrowedFd<'_>) -> io::Result<Vec<u8>> {
    let mut iterator = File::from(iterator(link)?);
    let mut records = Vec::new();
    // More than the kernel gives at once.
    let mut buffer = vec![0; 64 << 10];
    loop {
        match iterator.read(&mut buffer) {
            Ok(0) => return Ok(records),
            Ok(len) => records.extend_from_slice(&buffer[..len]),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            // Nothing to show up to here.
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error),
        }
    }
}
