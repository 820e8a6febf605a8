//! What waits in unix sockets: bytes, messages, and descriptors in flight.

use std::{
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

use ckpt_format::files::{FileId, Kind, PeerCredentials, UnixMessage, UnixSocket, UnixState};

use super::super::{
    address,
    capture::Capture,
    find::Refusal,
    options,
    rebuild::{Rebuild, RebuildError},
};
use super::urgent::Urgent;
use crate::sys::{
    descriptor::{Count, count},
    namespace::StandIn,
    socket::{self, Along, Guarded, Received},
    task,
};

/// Room for the largest datagram that default limits allow, and more.
const DATAGRAM: usize = 1 << 20;

/// The place from which peeking reads, which is put back where it was.
pub(super) struct Peeking<'a> {
    fd: BorrowedFd<'a>,
    before: i32,
}

impl<'a> Peeking<'a> {
    pub(super) fn new(fd: BorrowedFd<'a>) -> io::Result<Self> {
        let before = options::number(fd, libc::SOL_SOCKET, libc::SO_PEEK_OFF)?;
        let peeking = Self { fd, before };
        peeking.from(0)?;
        Ok(peeking)
    }

    fn from(&self, offset: usize) -> io::Result<()> {
        let offset = i32::try_from(offset).map_err(io::Error::other)?;
        options::set(self.fd, libc::SOL_SOCKET, libc::SO_PEEK_OFF, offset)
    }

    /// The next message; `None` at the end of the queue.
    pub(super) fn next(&self, buffer: &mut [u8]) -> io::Result<Option<Received>> {
        match socket::receive(self.fd, buffer, libc::MSG_PEEK | libc::MSG_DONTWAIT) {
            Ok(received) => Ok(Some(received)),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
            // A socket without a connection, and one whose peer has died, hold nothing.
            Err(error)
                if matches!(
                    error.raw_os_error(),
                    Some(libc::ENOTCONN | libc::EINVAL | libc::ECONNRESET)
                ) =>
            {
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }
}

impl Drop for Peeking<'_> {
    fn drop(&mut self) {
        let restored = options::set(self.fd, libc::SOL_SOCKET, libc::SO_PEEK_OFF, self.before);
        if let Err(error) = restored {
            tracing::warn!(%error, "a unix socket keeps a changed SO_PEEK_OFF");
        }
    }
}

/// Lets a socket tell of every message that it is one, with credentials: the end of a way that was
/// closed is an empty packet otherwise, as often as one reads.
struct Telling<'a> {
    fd: BorrowedFd<'a>,
    before: i32,
}

impl<'a> Telling<'a> {
    fn new(fd: BorrowedFd<'a>) -> io::Result<Self> {
        let before = options::number(fd, libc::SOL_SOCKET, libc::SO_PASSCRED)?;
        options::set(fd, libc::SOL_SOCKET, libc::SO_PASSCRED, 1)?;
        Ok(Self { fd, before })
    }
}

impl Drop for Telling<'_> {
    fn drop(&mut self) {
        let restored = options::set(self.fd, libc::SOL_SOCKET, libc::SO_PASSCRED, self.before);
        if let Err(error) = restored {
            tracing::warn!(%error, "a unix socket keeps a changed SO_PASSCRED");
        }
    }
}

pub(super) fn capture(
    capture: &mut Capture<'_>,
    place: usize,
    socket_type: i32,
    passes_credentials: bool,
) -> Result<Vec<UnixMessage>, Refusal> {
    // Our own descriptor, because the list of files grows while this one is read.
    let own = capture.found.objects[place].fd.try_clone()?;
    let fd = own.as_fd();
    let stream = socket_type == libc::SOCK_STREAM;
    let readable = count(fd, Count::Readable).unwrap_or(0) as usize;
    if stream && readable == 0 {
        return Ok(Vec::new());
    }
    let urgent = if stream { Urgent::find(fd, readable)? } else { None };
    let peeking = Peeking::new(fd)?;
    let telling = (socket_type == libc::SOCK_SEQPACKET).then(|| Telling::new(fd)).transpose()?;
    // Larger than the queue: a peek that ends inside a message is given the descriptors of a
    // later one.
    let mut buffer = vec![0; if stream { readable + 1 } else { DATAGRAM }];
    let mut messages = Vec::new();
    let mut offset = 0;
    // Behind a stream's last byte an error may wait, which would be taken.
    while !(stream && offset >= readable)
        && let Some(received) = peeking.next(&mut buffer)?
    {
        let is_message = received.length > 0 || received.credentials.is_some();
        if (stream && received.length == 0) || (telling.is_some() && !is_message) {
            break;
        }
        if received.flags & libc::MSG_TRUNC != 0 {
            return Err(Refusal::new("a unix socket with a huge message in it", "try again"));
        }
        let mut data = &buffer[..received.length];
        let mut plain = None;
        if stream && !received.rights.is_empty() {
            // The kernel joins messages, and stops behind one with descriptors: they belong to
            // the last one, whose start has to be found.
            let start = last_start(&peeking, offset, received.length)?;
            plain = (start > 0).then(|| data[..start].to_vec());
            data = &data[start..];
        }
        let data = data.to_vec();
        let is_urgent = urgent.as_ref().is_some_and(|urgent| urgent.place == offset);
        let begin = messages.len();
        offset += received.length;
        let shown = passes_credentials.then_some(received.credentials).flatten();
        let credentials = shown.and_then(|(pid, uid, gid)| inside(capture, pid, uid, gid));
        let sender = address::decode_unix(&received.sender).map(serde_bytes::ByteBuf::from);
        let mut files = Vec::with_capacity(received.rights.len());
        for right in received.rights {
            files.push(capture.found.add(right)?);
        }
        if let Some(data) = plain {
            messages.push(UnixMessage {
                data,
                files: Vec::new(),
                credentials,
                sender: sender.clone(),
                urgent: false,
            });
        }
        messages.push(UnixMessage { data, files, credentials, sender, urgent: false });
        if is_urgent {
            set_apart(&mut messages, begin);
        }
    }
    Ok(messages)
}

/// Makes the first byte of a message an urgent one.
fn set_apart(messages: &mut Vec<UnixMessage>, place: usize) {
    let Some(message) = messages.get_mut(place) else { return };
    message.urgent = true;
    let rest = message.data.split_off(message.data.len().min(1));
    if !rest.is_empty() {
        // Descriptors go with the first byte.
        let rest = UnixMessage {
            data: rest,
            files: Vec::new(),
            credentials: message.credentials,
            sender: message.sender.clone(),
            urgent: false,
        };
        messages.insert(place + 1, rest);
    }
}

/// Where the last message starts of those that a peek at `offset` has joined.
fn last_start(peeking: &Peeking<'_>, offset: usize, length: usize) -> io::Result<usize> {
    let mut guarded = Guarded::new(length)?;
    peeking.from(offset)?;
    let start = socket::peek_boundary(peeking.fd, &mut guarded, length - 1)?;
    peeking.from(offset + length)?;
    Ok(start.unwrap_or(0))
}

fn inside(capture: &Capture<'_>, pid: i32, uid: u32, gid: u32) -> Option<PeerCredentials> {
    // What the kernel shows when none were recorded.
    if pid == 0 && uid == 65534 {
        return None;
    }
    let pid = capture.source.pid_inside(pid).unwrap_or(0);
    Some(PeerCredentials { pid, uid: capture.source.inside(uid), gid: capture.source.inside(gid) })
}

/// Puts everything back into the queues, once all files are there, and then sets what would
/// have stood in the way: options, sizes of buffers, closed ways.
pub(in super::super) fn fill(rebuild: &mut Rebuild<'_>) -> Result<(), RebuildError> {
    let failed = |source: io::Error| RebuildError::Kernel { object: "unix socket", source };
    let files = rebuild.files;
    let sockets = || {
        files.files.iter().enumerate().filter_map(|(place, file)| match &file.kind {
            Kind::Unix(unix) => Some((FileId(place as u32), unix.as_ref())),
            _ => None,
        })
    };
    let mut gone = None;
    for (id, unix) in sockets() {
        if !unix.queue.is_empty() {
            // A sender that is gone is made once more, where it could reach an abstract name.
            rebuild.enter_network(files.get(id).map_or(0, |file| file.network))?;
            refill(rebuild, id, unix, &mut gone)?;
        }
    }
    rebuild.enter_network(0)?;
    for (id, _) in sockets().filter(|(_, unix)| unix.reset) {
        // It goes without having read this.
        if let (Some(fd), true) = (rebuild.made(id), rebuild.gone.contains_key(&id.0)) {
            socket::send(fd, b"?", &Along::default(), libc::MSG_DONTWAIT).map_err(failed)?;
        }
    }
    // The ends that stand for peers that are gone go, and with them the way back.
    rebuild.gone.clear();
    for (id, unix) in sockets() {
        let fd = rebuild.made(id).ok_or(RebuildError::Damaged)?;
        for (bit, how) in [(1, libc::SHUT_RD), (2, libc::SHUT_WR)] {
            if unix.shutdown & bit != 0 && matches!(unix.state, UnixState::Connected(_)) {
                socket::shutdown(fd, how).map_err(failed)?;
            }
        }
        options::rebuild(fd, &unix.options).map_err(failed)?;
        options::rebuild_buffers(fd, &unix.options).map_err(failed)?;
    }
    Ok(())
}

fn refill(
    rebuild: &Rebuild<'_>,
    id: FileId,
    unix: &UnixSocket,
    gone: &mut Option<StandIn>,
) -> Result<(), RebuildError> {
    let failed = |source: io::Error| RebuildError::Kernel { object: "unix socket", source };
    let bytes: usize = unix.queue.iter().map(|message| message.data.len() + 2048).sum();
    let peer = match unix.state {
        UnixState::Connected(peer) => rebuild.made(peer),
        _ => rebuild.gone.get(&id.0).map(AsFd::as_fd),
    };
    let datagram = unix.socket_type == libc::SOCK_DGRAM;
    for message in &unix.queue {
        let rights: Option<Vec<BorrowedFd<'_>>> =
            message.files.iter().map(|&file| rebuild.made(file)).collect();
        let rights = rights.ok_or(RebuildError::Damaged)?;
        let credentials = forged(rebuild, message, gone).map_err(failed)?;
        let along = Along { receiver: &[], rights: &rights, credentials };
        if !datagram {
            let sender = peer.ok_or(RebuildError::Damaged)?;
            options::make_room(sender, bytes, 0).map_err(failed)?;
            let flags = if message.urgent { libc::MSG_OOB } else { 0 };
            send_all(sender, &message.data, &along, flags).map_err(failed)?;
            continue;
        }
        // A datagram comes from whoever had its sender's name, or from nobody.
        let named = message.sender.as_ref().and_then(|name| by_name(rebuild, name));
        let hidden = unix.node.is_none() && rebuild.gone.contains_key(&id.0);
        let named = named.filter(|_| !hidden);
        let peer = peer.filter(|_| hidden || message.sender.is_none());
        let sender: Sender<'_> = match named.or(peer) {
            Some(fd) => Sender::Known(fd),
            None => Sender::Nobody(nobody().map_err(failed)?),
        };
        options::make_room(sender.as_fd(), bytes, 0).map_err(failed)?;
        deliver(unix, sender.as_fd(), &message.data, &along).map_err(failed)?;
    }
    Ok(())
}

enum Sender<'a> {
    Known(BorrowedFd<'a>),
    Nobody(OwnedFd),
}

impl AsFd for Sender<'_> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Known(fd) => *fd,
            Self::Nobody(fd) => fd.as_fd(),
        }
    }
}

fn nobody() -> io::Result<OwnedFd> {
    socket::socket(libc::AF_UNIX, libc::SOCK_DGRAM, 0)
}

fn by_name<'a>(rebuild: &'a Rebuild<'_>, name: &[u8]) -> Option<BorrowedFd<'a>> {
    let place = rebuild.files.files.iter().position(|file| match &file.kind {
        Kind::Unix(unix) => {
            unix.socket_type == libc::SOCK_DGRAM
                && unix.name.as_ref().is_some_and(|own| own.as_slice() == name)
        }
        _ => false,
    })?;
    rebuild.made(FileId(u32::try_from(place).ok()?))
}

/// Credentials that the kernel accepts: of a process that exists. A sender that is gone is one
/// whose process ends when all queues are full, so that nobody else is taken for it.
fn forged(
    rebuild: &Rebuild<'_>,
    message: &UnixMessage,
    gone: &mut Option<StandIn>,
) -> io::Result<Option<(i32, u32, u32)>> {
    let Some(credentials) = message.credentials else { return Ok(None) };
    let processes = &rebuild.target.processes;
    let pid = match (processes.get(&credentials.pid), processes.get(&1)) {
        (Some(&pid), _) => pid,
        (None, Some(&init)) => match gone {
            Some(gone) => gone.pid(),
            None => gone.insert(StandIn::new(task::pidfd_open(init)?.as_fd())?).pid(),
        },
        (None, None) => return Ok(None),
    };
    let base = rebuild.target.id_base;
    Ok(Some((pid, base + credentials.uid, base + credentials.gid)))
}

fn send_all(fd: BorrowedFd<'_>, data: &[u8], along: &Along<'_>, flags: i32) -> io::Result<()> {
    let sent = socket::send(fd, data, along, flags | libc::MSG_DONTWAIT)?;
    let mut rest = &data[sent..];
    while !rest.is_empty() {
        // The descriptors went with the first byte.
        let sent = socket::send(fd, rest, &Along::default(), libc::MSG_DONTWAIT)?;
        rest = &rest[sent..];
    }
    Ok(())
}

fn deliver(
    receiver: &UnixSocket,
    sender: BorrowedFd<'_>,
    data: &[u8],
    along: &Along<'_>,
) -> io::Result<()> {
    let send = |address: &[u8]| {
        let along = Along { receiver: address, ..*along };
        socket::send(sender, data, &along, libc::MSG_DONTWAIT).map(drop)
    };
    // A sender that is connected to the receiver needs no address.
    match send(&[]) {
        Err(error) if error.raw_os_error() == Some(libc::ENOTCONN) => {}
        other => return other,
    }
    let address = super::bind::address_of(receiver).ok_or(io::ErrorKind::NotConnected)?;
    send(&address)
}
