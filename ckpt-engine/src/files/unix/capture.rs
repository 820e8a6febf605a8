//! Reading unix sockets.

use std::{io, os::fd::AsFd};

use ckpt_format::files::{FileId, Kind, PeerCredentials, SocketNode, UnixSocket, UnixState};

use super::{
    super::{
        capture::Capture,
        find::{self, Found, Object, Refusal},
        options::{self, Family},
        waiting_error,
    },
    diagnosis::{Diagnosis, Entry},
    queue,
};
use crate::sys::{descriptor, socket};

const CONNECTED: u8 = 1;
const LISTENING: u8 = 10;

fn entry<'a>(diagnosis: &'a Diagnosis, object: &Object) -> Result<&'a Entry, Refusal> {
    diagnosis.get(object.status.inode).ok_or_else(|| {
        Refusal::new(
            "a unix socket of another network than the VE's",
            "end the program, or the command that was started from the host with it",
        )
    })
}

fn outside() -> Refusal {
    Refusal::new(
        "a unix socket whose other end is outside the VE",
        "end the session or command that was started from the host",
    )
}

/// The description of a socket of the VE by its inode.
fn by_inode(found: &Found, near: &Object, inode: u32) -> Option<FileId> {
    let places = found.of_inode((near.status.device, u64::from(inode)));
    places.first().map(|&place| FileId(place))
}

/// How a socket is connected, once all sockets are known.
fn state(diagnosis: &Diagnosis, found: &Found, object: &Object) -> Result<UnixState, Refusal> {
    let entry = entry(diagnosis, object)?;
    let inside = |inode| by_inode(found, object, inode).ok_or_else(outside);
    if entry.state == LISTENING {
        let client = |&inode: &u32| if inode == 0 { Ok(None) } else { inside(inode).map(Some) };
        let pending = entry.waiting.iter().map(client).collect::<Result<_, _>>()?;
        return Ok(UnixState::Listening { backlog: entry.backlog, pending });
    }
    if let Some(listener) = diagnosis.listener_of(object.status.inode) {
        return inside(listener).map(|_| UnixState::Pending);
    }
    match entry.peer {
        Some(0) => Ok(UnixState::PeerGone),
        Some(peer) => inside(peer).map(UnixState::Connected),
        None => Ok(UnixState::Alone),
    }
}

/// Refuses sockets with a peer outside, without reading anything.
pub(in super::super) fn check(
    diagnosis: &Diagnosis,
    found: &Found,
    object: &Object,
) -> Result<(), Refusal> {
    state(diagnosis, found, object).map(drop)
}

/// Reads all but the connection of one socket, which [`connect`] adds.
pub(in super::super) fn capture(
    capture: &mut Capture<'_>,
    place: usize,
    socket_type: i32,
) -> Result<Kind, Refusal> {
    let object = &capture.found.objects[place];
    let entry = entry(capture.networks.unix(), object)?.clone();
    if capture.networks.unix().listener_of(object.status.inode).is_some() && entry.sent > 0 {
        return Err(Refusal::new(
            "a unix socket that has sent data before it was accepted",
            "try again when the server has accepted it",
        ));
    }
    let options = options::capture(object.fd(), Family::Unix)?;
    let passes_credentials = options
        .iter()
        .any(|option| (option.level, option.name) == (libc::SOL_SOCKET, libc::SO_PASSCRED));
    let peer_credentials = peer_credentials(capture, object, socket_type)?;
    let node = node(capture, object, &entry, socket_type)?;
    let reset = waiting_error::waiting(object.fd())?.error == libc::ECONNRESET;
    let queue = if entry.state == LISTENING {
        Vec::new()
    } else {
        queue::capture(capture, place, socket_type, passes_credentials)?
    };
    Ok(Kind::Unix(Box::new(UnixSocket {
        socket_type,
        name: entry.name.map(serde_bytes::ByteBuf::from),
        node,
        state: UnixState::Alone,
        peer_credentials,
        shutdown: entry.shutdown,
        queue,
        reset,
        options,
    })))
}

/// Adds the connections, once all sockets have been found.
pub(in super::super) fn connect(capture: &Capture<'_>, place: usize) -> Result<UnixState, Refusal> {
    state(capture.networks.unix(), &capture.found, &capture.found.objects[place])
}

fn peer_credentials(
    capture: &Capture<'_>,
    object: &Object,
    socket_type: i32,
) -> io::Result<Option<PeerCredentials>> {
    if socket_type == libc::SOCK_DGRAM {
        return Ok(None);
    }
    let mut bytes = [0; 12];
    socket::option(object.fd(), libc::SOL_SOCKET, libc::SO_PEERCRED, &mut bytes)?;
    let word =
        |at: usize| u32::from_ne_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
    let (uid, gid) = (word(4), word(8));
    if uid == u32::MAX {
        return Ok(None);
    }
    let pid = capture.source.pid_inside(word(0).cast_signed()).unwrap_or(0);
    let (uid, gid) = (capture.source.inside(uid), capture.source.inside(gid));
    Ok(Some(PeerCredentials { pid, uid, gid }))
}

/// The node of a socket that others can reach by it. An accepted socket shows its listener's,
/// which is not its own.
fn node(
    capture: &Capture<'_>,
    object: &Object,
    entry: &Entry,
    socket_type: i32,
) -> Result<Option<SocketNode>, Refusal> {
    let named = entry.name.as_ref().is_some_and(|name| name.first().is_some_and(|&byte| byte != 0));
    let connected = socket_type != libc::SOCK_DGRAM && entry.state == CONNECTED;
    if !named || connected {
        return Ok(None);
    }
    let node = match socket::unix_node(object.fd()) {
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => return Ok(None),
        other => other?,
    };
    let status = descriptor::status(node.as_fd())?;
    let path = find::own_link(node.as_fd())?;
    if path.ends_with(b" (deleted)") || status.links == 0 {
        return Ok(None);
    }
    capture.is_inside_the_mounts(status.mount, &path)?;
    Ok(Some(SocketNode {
        path,
        mode: status.mode & 0o7777,
        uid: capture.source.inside(status.uid),
        gid: capture.source.inside(status.gid),
    }))
}
