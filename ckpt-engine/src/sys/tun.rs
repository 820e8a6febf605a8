//! Files of `/dev/net/tun`, and the tun or tap link that each of them can be a queue of.

use std::{
    io,
    os::fd::{AsRawFd, BorrowedFd, OwnedFd},
};

use super::descriptor::own;

fn check(value: libc::c_int) -> io::Result<()> {
    if value < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Of what kind the link is (`IFF_*` of `TUNSETIFF`).
pub const TUN: u16 = 0x1;
/// Ethernet frames.
pub const TAP: u16 = 0x2;
/// The kernel passes written frames on in batches.
pub const NAPI: u16 = 0x10;
/// The same, with frames in several pieces.
pub const NAPI_FRAGS: u16 = 0x20;
/// Several files can be queues of the link.
pub const MULTI_QUEUE: u16 = 0x100;
/// Let a queue take part again.
pub const ATTACH_QUEUE: u16 = 0x200;
/// The queue takes no part for now.
pub const DETACH_QUEUE: u16 = 0x400;
/// The link stays when its last file is closed.
pub const PERSIST: u16 = 0x800;
/// No header before each frame. As an answer of [`attachment`] the same bit says that no filter is
/// attached, so it tells nothing.
pub const NO_HEADER: u16 = 0x1000;
/// A `virtio_net_hdr` before each frame.
pub const VNET_HEADER: u16 = 0x4000;

/// `struct ifreq`: a name of 16 bytes and a union.
type Request = [u8; 40];

const TUNSETIFF: libc::c_ulong = 0x4004_54ca;
const TUNGETIFF: libc::c_ulong = 0x8004_54d2;
const TUNSETQUEUE: libc::c_ulong = 0x4004_54d9;
const TUNSETIFINDEX: libc::c_ulong = 0x4004_54da;
const TUNGETFILTER: libc::c_ulong = 0x8010_54db;
const TUNGETDEVNETNS: libc::c_ulong = 0x54e3;
const SIOCGSKNS: libc::c_ulong = 0x894c;

fn request(name: &str, flags: u16) -> io::Result<Request> {
    let mut request = [0; 40];
    if name.is_empty() || name.len() >= libc::IFNAMSIZ || name.contains(['\0', '/', '%']) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    request[..name.len()].copy_from_slice(name.as_bytes());
    request[16..18].copy_from_slice(&flags.to_ne_bytes());
    Ok(request)
}

/// The network that the file was opened in.
pub fn network(file: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    // SAFETY: the request takes no argument and returns a new descriptor.
    own(libc::c_long::from(unsafe { libc::ioctl(file.as_raw_fd(), SIOCGSKNS) }))
}

/// The network that the link of the file is in.
pub fn network_of_link(file: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    // SAFETY: the request takes no argument and returns a new descriptor.
    own(libc::c_long::from(unsafe { libc::ioctl(file.as_raw_fd(), TUNGETDEVNETNS) }))
}

/// The name of the link that a file is a queue of, and its flags; none for a file that is not.
pub fn attachment(file: BorrowedFd<'_>) -> io::Result<Option<(String, u16)>> {
    let mut request: Request = [0; 40];
    // SAFETY: the kernel writes one ifreq, 40 bytes, which `request` is.
    match check(unsafe { libc::ioctl(file.as_raw_fd(), TUNGETIFF, request.as_mut_ptr()) }) {
        Err(error) if error.raw_os_error() == Some(libc::EBADFD) => return Ok(None),
        result => result?,
    }
    let end = request[..16].iter().position(|&byte| byte == 0).unwrap_or(16);
    let name = String::from_utf8_lossy(&request[..end]).into_owned();
    Ok(Some((name, u16::from_ne_bytes([request[16], request[17]]))))
}

/// Makes a file a queue of the link with this name, which is made if it is not there.
pub fn attach(file: BorrowedFd<'_>, name: &str, flags: u16) -> io::Result<()> {
    let mut request = request(name, flags)?;
    // SAFETY: the kernel reads and writes one ifreq, 40 bytes, which `request` is.
    check(unsafe { libc::ioctl(file.as_raw_fd(), TUNSETIFF, request.as_mut_ptr()) })
}

/// The number of the link that [`attach`] is going to make.
pub fn choose_index(file: BorrowedFd<'_>, index: u32) -> io::Result<()> {
    // SAFETY: the request reads one u32, which `index` is.
    check(unsafe { libc::ioctl(file.as_raw_fd(), TUNSETIFINDEX, &raw const index) })
}

/// `TUNSETQUEUE` with [`ATTACH_QUEUE`] or [`DETACH_QUEUE`].
pub fn set_queue(file: BorrowedFd<'_>, flags: u16) -> io::Result<()> {
    let mut request: Request = [0; 40];
    request[16..18].copy_from_slice(&flags.to_ne_bytes());
    // SAFETY: the kernel reads one ifreq, 40 bytes, which `request` is.
    check(unsafe { libc::ioctl(file.as_raw_fd(), TUNSETQUEUE, request.as_ptr()) })
}

/// Whether a program has ever attached a filter to the tap.
pub fn had_filter(file: BorrowedFd<'_>) -> io::Result<bool> {
    // struct sock_fprog: a count, and a pointer that is nobody's any more.
    let mut program = [0u64; 2];
    // SAFETY: the kernel writes one sock_fprog, 16 bytes, which `program` is.
    let result =
        check(unsafe { libc::ioctl(file.as_raw_fd(), TUNGETFILTER, program.as_mut_ptr()) });
    match result {
        // A tun has none.
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => Ok(false),
        result => result.map(|()| program[0] & 0xffff != 0),
    }
}

/// `TUNATTACHFILTER`: of the frames for the reader of a tap, those pass that the filter likes.
pub fn attach_filter(file: BorrowedFd<'_>, instructions: &[u8]) -> io::Result<()> {
    const ATTACH: libc::c_ulong = 0x4010_54d5;
    let words = instructions.as_chunks::<8>().0.iter();
    let mut words: Vec<u64> = words.map(|chunk| u64::from_ne_bytes(*chunk)).collect();
    let program = libc::sock_fprog {
        len: words.len().try_into().map_err(|_| io::ErrorKind::InvalidInput)?,
        filter: words.as_mut_ptr().cast(),
    };
    // SAFETY: `program` tells how many instructions of eight bytes `words` holds, and the kernel
    // checks them before it keeps a copy.
    check(unsafe { libc::ioctl(file.as_raw_fd(), ATTACH, &raw const program) })
}

/// What can be asked of a file that is a queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Query {
    /// How much may be written and not passed on, in bytes.
    SendBuffer,
    /// The length of the `virtio_net_hdr`.
    HeaderSize,
    /// That header is little-endian whatever the host is.
    LittleEndian,
}

/// Asks for a number.
pub fn query(file: BorrowedFd<'_>, query: Query) -> io::Result<i32> {
    let request: libc::c_ulong = match query {
        Query::SendBuffer => 0x8004_54d3,
        Query::HeaderSize => 0x8004_54d7,
        Query::LittleEndian => 0x8004_54dd,
    };
    let mut value = 0i32;
    // SAFETY: these requests write one i32, which `value` is.
    check(unsafe { libc::ioctl(file.as_raw_fd(), request, &raw mut value) })?;
    Ok(value)
}

/// What can be set of a link by a file that is a queue of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// It stays without a file, or not.
    Persist,
    /// The user who may attach files, as the caller's user namespace numbers users.
    Owner,
    /// The group that may.
    Group,
    /// `TUN_F_*`: what the reader can do in the place of the kernel.
    Offload,
    /// See [`Query::SendBuffer`].
    SendBuffer,
    /// See [`Query::HeaderSize`].
    HeaderSize,
    /// See [`Query::LittleEndian`].
    LittleEndian,
    /// Whether the link seems to be plugged in.
    Carrier,
}

/// Sets a number.
pub fn change(file: BorrowedFd<'_>, change: Change, value: i32) -> io::Result<()> {
    let (request, by_pointer): (libc::c_ulong, bool) = match change {
        Change::Persist => (0x4004_54cb, false),
        Change::Owner => (0x4004_54cc, false),
        Change::Group => (0x4004_54ce, false),
        Change::Offload => (0x4004_54d0, false),
        Change::SendBuffer => (0x4004_54d4, true),
        Change::HeaderSize => (0x4004_54d8, true),
        Change::LittleEndian => (0x4004_54dc, true),
        Change::Carrier => (0x4004_54e2, true),
    };
    check(if by_pointer {
        // SAFETY: these requests read one i32, which `value` is.
        unsafe { libc::ioctl(file.as_raw_fd(), request, &raw const value) }
    } else {
        // SAFETY: these requests take an integer.
        unsafe { libc::ioctl(file.as_raw_fd(), request, libc::c_long::from(value)) }
    })
}

/// The next frame that waits to be read, with what stands before it. Never blocks, whatever the
/// flags of the file are.
pub fn read_waiting(file: BorrowedFd<'_>, buffer: &mut [u8]) -> io::Result<Option<usize>> {
    let parts = [libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.len() }];
    // SAFETY: the kernel writes at most `iov_len` bytes to the one part, which is `buffer`.
    let read = unsafe { libc::preadv2(file.as_raw_fd(), parts.as_ptr(), 1, -1, libc::RWF_NOWAIT) };
    match usize::try_from(read) {
        Ok(length) => Ok(Some(length)),
        Err(_) => match io::Error::last_os_error() {
            error if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
            error => Err(error),
        },
    }
}
