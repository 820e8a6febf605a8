//! Sockets at the level of bytes: addresses, options and messages as the kernel lays them out.

use std::{
    io, mem,
    os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
    ptr,
};

use super::descriptor::own;

fn check(value: libc::c_int) -> io::Result<()> {
    if value < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

fn length(bytes: &[u8]) -> io::Result<libc::socklen_t> {
    bytes.len().try_into().map_err(|_| io::ErrorKind::InvalidInput.into())
}

/// socket(2), closed on exec.
pub fn socket(domain: i32, kind: i32, protocol: i32) -> io::Result<OwnedFd> {
    // SAFETY: the call takes three integers and touches no memory of ours.
    own(libc::c_long::from(unsafe { libc::socket(domain, kind | libc::SOCK_CLOEXEC, protocol) }))
}

/// socketpair(2) of unix sockets, closed on exec.
pub fn pair(kind: i32) -> io::Result<(OwnedFd, OwnedFd)> {
    let mut fds = [0i32; 2];
    // SAFETY: the kernel writes two i32, which `fds` is.
    check(unsafe {
        libc::socketpair(libc::AF_UNIX, kind | libc::SOCK_CLOEXEC, 0, fds.as_mut_ptr())
    })?;
    Ok((own(fds[0].into())?, own(fds[1].into())?))
}

/// Options whose value holds a pointer, which would reach behind the bytes passed here.
fn holds_pointer(level: i32, name: i32) -> bool {
    const TCP_ZEROCOPY_RECEIVE: i32 = 35;
    match level {
        libc::SOL_SOCKET => {
            matches!(name, libc::SO_ATTACH_FILTER | libc::SO_ATTACH_REUSEPORT_CBPF)
        }
        libc::IPPROTO_TCP => name == TCP_ZEROCOPY_RECEIVE,
        // The tables of netfilter, of ARP and of bridges.
        libc::IPPROTO_IP => matches!(name, 64 | 65 | 96 | 97 | 128..=131),
        libc::IPPROTO_IPV6 => matches!(name, 64 | 65),
        _ => false,
    }
}

/// getsockopt(2) into `value`; returns how many bytes there are.
pub fn option(fd: BorrowedFd<'_>, level: i32, name: i32, value: &mut [u8]) -> io::Result<usize> {
    if holds_pointer(level, name) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let mut size = length(value)?;
    // SAFETY: the kernel writes at most `size` bytes to `value`; options that would make it
    // follow a pointer inside are refused above.
    check(unsafe {
        libc::getsockopt(fd.as_raw_fd(), level, name, value.as_mut_ptr().cast(), &raw mut size)
    })?;
    Ok(size as usize)
}

/// setsockopt(2).
pub fn set_option(fd: BorrowedFd<'_>, level: i32, name: i32, value: &[u8]) -> io::Result<()> {
    if holds_pointer(level, name) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let size = length(value)?;
    // SAFETY: the kernel reads `size` bytes of `value`; options that hold a pointer are refused.
    check(unsafe { libc::setsockopt(fd.as_raw_fd(), level, name, value.as_ptr().cast(), size) })
}

/// bind(2) to an address as bytes.
pub fn bind(fd: BorrowedFd<'_>, address: &[u8]) -> io::Result<()> {
    let size = length(address)?;
    // SAFETY: the kernel reads `size` bytes of `address`.
    check(unsafe { libc::bind(fd.as_raw_fd(), address.as_ptr().cast(), size) })
}

/// connect(2) to an address as bytes.
pub fn connect(fd: BorrowedFd<'_>, address: &[u8]) -> io::Result<()> {
    let size = length(address)?;
    // SAFETY: the kernel reads `size` bytes of `address`.
    check(unsafe { libc::connect(fd.as_raw_fd(), address.as_ptr().cast(), size) })
}

/// listen(2).
pub fn listen(fd: BorrowedFd<'_>, backlog: u32) -> io::Result<()> {
    let backlog = i32::try_from(backlog).unwrap_or(i32::MAX);
    // SAFETY: the call takes two integers and touches no memory of ours.
    check(unsafe { libc::listen(fd.as_raw_fd(), backlog) })
}

/// accept4(2) without waiting for more than is there, closed on exec.
pub fn accept(fd: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    // SAFETY: no address is asked for, so only integers are passed.
    own(libc::c_long::from(unsafe {
        libc::accept4(fd.as_raw_fd(), ptr::null_mut(), ptr::null_mut(), libc::SOCK_CLOEXEC)
    }))
}

/// shutdown(2): `SHUT_RD`, `SHUT_WR` or `SHUT_RDWR`.
pub fn shutdown(fd: BorrowedFd<'_>, how: i32) -> io::Result<()> {
    // SAFETY: the call takes two integers and touches no memory of ours.
    check(unsafe { libc::shutdown(fd.as_raw_fd(), how) })
}

/// Which address of a socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// getsockname(2).
    Local,
    /// getpeername(2).
    Remote,
}

/// The address of one end as bytes.
pub fn address(fd: BorrowedFd<'_>, end: End) -> io::Result<Vec<u8>> {
    let mut bytes = vec![0u8; size_of::<libc::sockaddr_storage>()];
    let mut size = length(&bytes)?;
    let (raw, pointer) = (fd.as_raw_fd(), bytes.as_mut_ptr().cast());
    check(match end {
        // SAFETY: the kernel writes at most `size` bytes to `bytes`.
        End::Local => unsafe { libc::getsockname(raw, pointer, &raw mut size) },
        // SAFETY: as above.
        End::Remote => unsafe { libc::getpeername(raw, pointer, &raw mut size) },
    })?;
    bytes.truncate(size as usize);
    Ok(bytes)
}

/// A message as recvmsg(2) gives it.
#[derive(Debug, Default)]
pub struct Received {
    /// How many bytes were written to the buffer.
    pub length: usize,
    /// `MSG_*`.
    pub flags: i32,
    /// The sender's address as bytes.
    pub sender: Vec<u8>,
    /// `SCM_RIGHTS`: descriptors, ours now.
    pub rights: Vec<OwnedFd>,
    /// `SCM_CREDENTIALS`: pid, uid, gid as our own namespaces number them.
    pub credentials: Option<(i32, u32, u32)>,
}

/// recvmsg(2) with all that can come along.
pub fn receive(fd: BorrowedFd<'_>, buffer: &mut [u8], flags: i32) -> io::Result<Received> {
    // Room for 253 descriptors, the most that one message can carry, and for credentials.
    let mut control = [0u64; 160];
    let mut sender = vec![0u8; size_of::<libc::sockaddr_storage>()];
    let mut part = libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.len() };
    // SAFETY: msghdr is integers and pointers, for which all zero is a valid value.
    let mut header: libc::msghdr = unsafe { mem::zeroed() };
    header.msg_iov = &raw mut part;
    header.msg_iovlen = 1;
    header.msg_control = control.as_mut_ptr().cast();
    header.msg_controllen = size_of_val(&control);
    header.msg_name = sender.as_mut_ptr().cast();
    header.msg_namelen = length(&sender)?;
    // SAFETY: every pointer in `header` leads to a live buffer of the length beside it.
    let received =
        unsafe { libc::recvmsg(fd.as_raw_fd(), &raw mut header, flags | libc::MSG_CMSG_CLOEXEC) };
    let length = usize::try_from(received).map_err(|_| io::Error::last_os_error())?;
    sender.truncate(header.msg_namelen as usize);
    let mut result =
        Received { length, flags: header.msg_flags, sender, rights: vec![], credentials: None };
    let bytes: Vec<u8> = control.iter().flat_map(|word| word.to_ne_bytes()).collect();
    read_control(&bytes[..header.msg_controllen.min(bytes.len())], &mut result);
    Ok(result)
}

const CONTROL_HEADER: usize = size_of::<libc::cmsghdr>();

fn word(bytes: &[u8], at: usize) -> i32 {
    let mut value = [0; 4];
    value.copy_from_slice(&bytes[at..at + 4]);
    i32::from_ne_bytes(value)
}

fn read_control(mut bytes: &[u8], result: &mut Received) {
    while bytes.len() >= CONTROL_HEADER {
        let mut length = [0; 8];
        length.copy_from_slice(&bytes[..8]);
        let end = usize::try_from(u64::from_ne_bytes(length)).unwrap_or(0).min(bytes.len());
        if end < CONTROL_HEADER {
            return;
        }
        let (level, kind) = (word(bytes, 8), word(bytes, 12));
        let data = &bytes[CONTROL_HEADER..end];
        if level == libc::SOL_SOCKET && kind == libc::SCM_RIGHTS {
            for number in data.chunks_exact(4).map(|chunk| word(chunk, 0)) {
                // SAFETY: the kernel has just installed this descriptor for us with the message.
                result.rights.push(unsafe { OwnedFd::from_raw_fd(number) });
            }
        } else if level == libc::SOL_SOCKET && kind == libc::SCM_CREDENTIALS && data.len() >= 12 {
            let ids = (word(data, 4).cast_unsigned(), word(data, 8).cast_unsigned());
            result.credentials = Some((word(data, 0), ids.0, ids.1));
        }
        bytes = &bytes[end.next_multiple_of(8).min(bytes.len())..];
    }
}

/// What sendmsg(2) sends along.
#[derive(Debug, Default)]
pub struct Along<'a> {
    /// The address to send to, as bytes; empty for a connected socket.
    pub receiver: &'a [u8],
    /// Descriptors.
    pub rights: &'a [BorrowedFd<'a>],
    /// pid, uid, gid as our own namespaces number them.
    pub credentials: Option<(i32, u32, u32)>,
}

fn put_control(control: &mut Vec<u8>, kind: i32, data: &[u8]) {
    control.extend(((CONTROL_HEADER + data.len()) as u64).to_ne_bytes());
    control.extend(libc::SOL_SOCKET.to_ne_bytes());
    control.extend(kind.to_ne_bytes());
    control.extend(data);
    control.resize(control.len().next_multiple_of(8), 0);
}

/// sendmsg(2); returns how many bytes were taken.
pub fn send(fd: BorrowedFd<'_>, data: &[u8], along: &Along<'_>, flags: i32) -> io::Result<usize> {
    let mut control = Vec::new();
    if !along.rights.is_empty() {
        let numbers: Vec<u8> =
            along.rights.iter().flat_map(|right| right.as_raw_fd().to_ne_bytes()).collect();
        put_control(&mut control, libc::SCM_RIGHTS, &numbers);
    }
    if let Some((pid, uid, gid)) = along.credentials {
        let ids = [pid.cast_unsigned(), uid, gid];
        let bytes: Vec<u8> = ids.iter().flat_map(|id| id.to_ne_bytes()).collect();
        put_control(&mut control, libc::SCM_CREDENTIALS, &bytes);
    }
    // The kernel wants control data aligned like a u64.
    let words: Vec<u64> = control
        .chunks_exact(8)
        .map(|chunk| u64::from_ne_bytes(chunk.try_into().expect("chunks of eight bytes")))
        .collect();
    let mut part = libc::iovec { iov_base: data.as_ptr().cast_mut().cast(), iov_len: data.len() };
    // SAFETY: msghdr is integers and pointers, for which all zero is a valid value.
    let mut header: libc::msghdr = unsafe { mem::zeroed() };
    header.msg_iov = &raw mut part;
    header.msg_iovlen = 1;
    if !words.is_empty() {
        header.msg_control = words.as_ptr().cast_mut().cast();
        header.msg_controllen = control.len();
    }
    if !along.receiver.is_empty() {
        header.msg_name = along.receiver.as_ptr().cast_mut().cast();
        header.msg_namelen = length(along.receiver)?;
    }
    // SAFETY: every pointer in `header` leads to a live buffer of the length beside it, and
    // sendmsg(2) only reads them.
    let sent =
        unsafe { libc::sendmsg(fd.as_raw_fd(), &raw const header, flags | libc::MSG_NOSIGNAL) };
    usize::try_from(sent).map_err(|_| io::Error::last_os_error())
}

/// A page that can be neither read nor written, behind `room` bytes that can.
#[derive(Debug)]
pub struct Guarded {
    map: memmap2::MmapMut,
    room: usize,
}

const PAGE: usize = 4096;

impl Guarded {
    /// Reserves memory for [`peek_boundary`] of up to `room` bytes.
    pub fn new(room: usize) -> io::Result<Self> {
        let room = room.next_multiple_of(PAGE);
        let mut map = memmap2::MmapMut::map_anon(room + PAGE)?;
        let page = map[room..].as_mut_ptr();
        // SAFETY: the page is the last one of `map`, which nothing reads or writes but the
        // kernel in `peek_boundary`, which then returns EFAULT.
        check(unsafe { libc::mprotect(page.cast(), PAGE, libc::PROT_NONE) })?;
        Ok(Self { map, room })
    }
}

/// Where in a unix stream's queue a message ends: the last end at or before `limit` bytes.
/// `None` when the first message is longer than `limit`.
pub fn peek_boundary(
    fd: BorrowedFd<'_>,
    guarded: &mut Guarded,
    limit: usize,
) -> io::Result<Option<usize>> {
    let limit = limit.min(guarded.room);
    // The readable bytes end exactly at the guard page, so one part is enough.
    let start = guarded.room - limit;
    let mut part = libc::iovec {
        iov_base: guarded.map[start..guarded.room].as_mut_ptr().cast(),
        iov_len: limit + PAGE,
    };
    // SAFETY: msghdr is integers and pointers, for which all zero is a valid value.
    let mut header: libc::msghdr = unsafe { mem::zeroed() };
    header.msg_iov = &raw mut part;
    header.msg_iovlen = 1;
    let flags = libc::MSG_PEEK | libc::MSG_DONTWAIT;
    // SAFETY: `part` lies inside `guarded.map` as a whole; the kernel cannot write to its last
    // page and says EFAULT instead.
    let received = unsafe { libc::recvmsg(fd.as_raw_fd(), &raw mut header, flags) };
    match usize::try_from(received) {
        Ok(length) => Ok(Some(length)),
        Err(_) => match io::Error::last_os_error() {
            error if error.raw_os_error() == Some(libc::EFAULT) => Ok(None),
            error => Err(error),
        },
    }
}

/// `SIOCUNIXFILE`: an `O_PATH` descriptor of the node that a unix socket is bound to.
pub fn unix_node(fd: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    const SIOCUNIXFILE: libc::c_ulong = 0x89E0;
    // SAFETY: the request takes no argument and returns a new descriptor.
    own(libc::c_long::from(unsafe { libc::ioctl(fd.as_raw_fd(), SIOCUNIXFILE) }))
}

/// The classic packet filter of a socket: eight bytes for each instruction, none without one.
pub fn filter(fd: BorrowedFd<'_>) -> io::Result<Vec<u8>> {
    const SO_GET_FILTER: i32 = libc::SO_ATTACH_FILTER;
    // This option counts instructions, not bytes: asked with a length of 0 it tells how many.
    let mut count: libc::socklen_t = 0;
    // SAFETY: with a length of 0 the kernel writes nothing but the length.
    check(unsafe {
        libc::getsockopt(
            fd.as_raw_fd(),
            libc::SOL_SOCKET,
            SO_GET_FILTER,
            ptr::null_mut(),
            &raw mut count,
        )
    })?;
    let mut instructions = vec![0u64; count as usize];
    if count == 0 {
        return Ok(Vec::new());
    }
    // SAFETY: the kernel writes `count` instructions of eight bytes, which is what there is.
    check(unsafe {
        libc::getsockopt(
            fd.as_raw_fd(),
            libc::SOL_SOCKET,
            SO_GET_FILTER,
            instructions.as_mut_ptr().cast(),
            &raw mut count,
        )
    })?;
    Ok(instructions.iter().flat_map(|instruction| instruction.to_ne_bytes()).collect())
}

/// `SO_ATTACH_FILTER` with the instructions that [`filter`] gives.
pub fn attach_filter(fd: BorrowedFd<'_>, instructions: &[u8]) -> io::Result<()> {
    let words = instructions.as_chunks::<8>().0.iter();
    let mut words: Vec<u64> = words.map(|chunk| u64::from_ne_bytes(*chunk)).collect();
    let program = libc::sock_fprog {
        len: words.len().try_into().map_err(|_| io::ErrorKind::InvalidInput)?,
        filter: words.as_mut_ptr().cast(),
    };
    // SAFETY: `program` tells how many instructions of eight bytes `words` holds, and the kernel
    // checks them before it keeps a copy.
    check(unsafe {
        libc::setsockopt(
            fd.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_ATTACH_FILTER,
            (&raw const program).cast(),
            size_of::<libc::sock_fprog>() as libc::socklen_t,
        )
    })
}
