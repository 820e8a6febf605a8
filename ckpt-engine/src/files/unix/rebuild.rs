//! Making unix sockets: first the ends that belong together, then names, then who is connected
//! to a name.

use std::{
    collections::{BTreeMap, HashMap},
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

use ckpt_format::{
    files::{FileId, Files, Kind, PeerCredentials, UnixSocket, UnixState},
    process::Descriptor,
};

use super::{
    super::{
        Argument, Remote, address,
        rebuild::{Rebuild, RebuildError, set_status},
    },
    accepted,
    bind::{address_of, bind_in_empty_root, bind_node, in_empty_root, is_named, is_path},
};
use crate::sys::{identity::act_as, socket};

pub(super) fn failed(source: io::Error) -> RebuildError {
    RebuildError::Kernel { object: "unix socket", source }
}

pub(super) type Sockets<'a> = Vec<(FileId, &'a UnixSocket)>;

fn sockets(files: &Files) -> Result<Sockets<'_>, RebuildError> {
    let mut sockets = Vec::new();
    for (place, file) in files.files.iter().enumerate() {
        if let Kind::Unix(unix) = &file.kind {
            let id = FileId(u32::try_from(place).map_err(|_| RebuildError::Damaged)?);
            sockets.push((id, unix.as_ref()));
        }
    }
    Ok(sockets)
}

pub(super) fn socket_of(files: &Files, id: FileId) -> Result<&UnixSocket, RebuildError> {
    match files.get(id).map(|file| &file.kind) {
        Some(Kind::Unix(unix)) => Ok(unix),
        _ => Err(RebuildError::Damaged),
    }
}

/// Makes all unix sockets, connected and named, with nothing in their queues.
pub(in super::super) fn rebuild(rebuild: &mut Rebuild<'_>) -> Result<(), RebuildError> {
    let files = rebuild.files;
    let sockets = sockets(files)?;
    let mut abstract_names: HashMap<&[u8], u32> = HashMap::new();
    for name in sockets.iter().filter_map(|(_, unix)| unix.name.as_ref()) {
        *abstract_names.entry(name.as_slice()).or_default() += u32::from(!is_path(name));
    }
    let shares_name = |unix: &UnixSocket| {
        unix.name.as_ref().is_some_and(|name| abstract_names[name.as_slice()] > 1)
    };
    accepted::make(rebuild, &sockets, &shares_name)?;
    for &(id, unix) in &sockets {
        if rebuild.made(id).is_none() {
            // Both ends of a pair are where the client was made.
            rebuild.enter_network(files.get(id).map_or(0, |file| file.network))?;
            make(rebuild, id, unix)?;
        }
    }
    name_unseen(rebuild, &sockets)?;
    name_seen(rebuild, &sockets)?;
    connect_by_name(rebuild, &sockets)
}

pub(super) fn put(rebuild: &mut Rebuild<'_>, id: FileId, fd: OwnedFd) -> Result<(), RebuildError> {
    let file = rebuild.files.get(id).ok_or(RebuildError::Damaged)?;
    set_status(fd.as_fd(), file.flags).map_err(failed)?;
    let place = rebuild.made.get_mut(id.0 as usize).ok_or(RebuildError::Damaged)?;
    *place = Some(fd);
    Ok(())
}

fn make(rebuild: &mut Rebuild<'_>, id: FileId, unix: &UnixSocket) -> Result<(), RebuildError> {
    let files = rebuild.files;
    let datagram = unix.socket_type == libc::SOCK_DGRAM;
    match unix.state {
        UnixState::Connected(peer) => {
            let other = socket_of(files, peer)?;
            let mutual = other.state == UnixState::Connected(id);
            if datagram && (other.name.is_some() || rebuild.made(peer).is_some()) {
                let fd = socket::socket(libc::AF_UNIX, unix.socket_type, 0).map_err(failed)?;
                return put(rebuild, id, fd);
            }
            if peer == id || (!datagram && !mutual) || other.socket_type != unix.socket_type {
                return Err(RebuildError::Damaged);
            }
            let (own, others) = pair(rebuild, unix)?;
            put(rebuild, id, own)?;
            put(rebuild, peer, others)
        }
        UnixState::PeerGone => {
            let (own, gone) = pair(rebuild, unix)?;
            rebuild.gone.insert(id.0, gone);
            put(rebuild, id, own)
        }
        UnixState::Alone | UnixState::Listening { .. } | UnixState::Pending => {
            let fd = socket::socket(libc::AF_UNIX, unix.socket_type, 0).map_err(failed)?;
            put(rebuild, id, fd)
        }
    }
}

/// Two ends that are connected. Each remembers as its peer the maker of both.
fn pair(rebuild: &Rebuild<'_>, unix: &UnixSocket) -> Result<(OwnedFd, OwnedFd), RebuildError> {
    let (uid, gid) = ids(unix.peer_credentials, rebuild.target.id_base);
    act_as(uid, gid, || socket::pair(unix.socket_type)).map_err(failed)
}

pub(super) fn ids(credentials: Option<PeerCredentials>, id_base: u32) -> (u32, u32) {
    credentials.map_or((id_base, id_base), |seen| (id_base + seen.uid, id_base + seen.gid))
}

/// Binds paths that lead to no node of their own: those of accepted connections, and of sockets
/// whose node was removed. Whoever is connected to the latter connects here.
fn name_unseen(rebuild: &mut Rebuild<'_>, sockets: &Sockets<'_>) -> Result<(), RebuildError> {
    let mut jobs = Vec::new();
    let mut fillers = Vec::new();
    for (id, unix) in sockets {
        let Some(name) = unix.name.as_ref().filter(|name| is_path(name)) else { continue };
        if unix.node.is_some() {
            continue;
        }
        let fd = rebuild.made(*id).ok_or(RebuildError::Damaged)?;
        if is_named(fd, name).map_err(failed)? {
            continue;
        }
        let mut senders = Vec::new();
        for (sender, other) in sockets {
            let sends =
                other.socket_type == libc::SOCK_DGRAM && other.state == UnixState::Connected(*id);
            if sends {
                senders.push(rebuild.made(*sender).ok_or(RebuildError::Damaged)?);
            }
        }
        // Nobody else can reach it any more, when its queue is filled.
        if unix.socket_type == libc::SOCK_DGRAM && !unix.queue.is_empty() {
            let filler = socket::socket(libc::AF_UNIX, unix.socket_type, 0).map_err(failed)?;
            fillers.push((id.0, filler, address::encode_unix(name)));
        }
        let listens = match &unix.state {
            UnixState::Listening { backlog, pending } => {
                let (uid, gid) = ids(unix.peer_credentials, rebuild.target.id_base);
                Some((*backlog, pending_of(rebuild, pending)?, uid, gid))
            }
            _ => None,
        };
        jobs.push((fd, name.as_slice(), senders, listens));
    }
    if jobs.is_empty() {
        return Ok(());
    }
    in_empty_root(|| {
        for (fd, name, senders, listens) in jobs {
            bind_in_empty_root(fd, name)?;
            let address = address::encode_unix(name);
            for sender in senders {
                socket::connect(sender, &address)?;
            }
            if let Some((backlog, clients, uid, gid)) = listens {
                act_as(uid, gid, || socket::listen(fd, backlog))?;
                connect_clients(socket_type(fd)?, &clients, &address)?;
            }
            for (_, filler, to) in fillers.iter().filter(|(_, _, to)| *to == address) {
                socket::connect(filler.as_fd(), to)?;
            }
            std::fs::remove_file(std::path::Path::new(
                <std::ffi::OsStr as std::os::unix::ffi::OsStrExt>::from_bytes(name),
            ))?;
        }
        Ok(())
    })
    .map_err(failed)?;
    rebuild.gone.extend(fillers.into_iter().map(|(id, filler, _)| (id, filler)));
    Ok(())
}

fn socket_type(fd: BorrowedFd<'_>) -> io::Result<i32> {
    super::super::options::number(fd, libc::SOL_SOCKET, libc::SO_TYPE)
}

/// The clients of a listener; none stands for one that is gone.
fn pending_of<'a>(
    rebuild: &'a Rebuild<'_>,
    pending: &[Option<FileId>],
) -> Result<Vec<Option<BorrowedFd<'a>>>, RebuildError> {
    let client = |id: &Option<FileId>| match id {
        Some(id) => rebuild.made(*id).map(Some).ok_or(RebuildError::Damaged),
        None => Ok(None),
    };
    pending.iter().map(client).collect()
}

fn connect_clients(
    socket_type: i32,
    clients: &[Option<BorrowedFd<'_>>],
    address: &[u8],
) -> io::Result<()> {
    for client in clients {
        match client {
            Some(client) => socket::connect(*client, address)?,
            None => {
                let gone = socket::socket(libc::AF_UNIX, socket_type, 0)?;
                socket::connect(gone.as_fd(), address)?;
            }
        }
    }
    Ok(())
}

/// Binds abstract names and the nodes among the VE's files, and lets listeners listen.
fn name_seen(rebuild: &Rebuild<'_>, sockets: &Sockets<'_>) -> Result<(), RebuildError> {
    let id_base = rebuild.target.id_base;
    for (id, unix) in sockets {
        let Some(name) = &unix.name else { continue };
        let fd = rebuild.made(*id).ok_or(RebuildError::Damaged)?;
        match &unix.node {
            Some(node) => bind_node(fd, name, node, id_base).map_err(|source| {
                RebuildError::Open { path: super::super::rebuild::lossy(&node.path), source }
            })?,
            None if is_path(name) => continue,
            None if is_named(fd, name).map_err(failed)? => continue,
            None => socket::bind(fd, &address::encode_unix(name)).map_err(failed)?,
        }
        if let UnixState::Listening { backlog, .. } = unix.state {
            let (uid, gid) = ids(unix.peer_credentials, id_base);
            act_as(uid, gid, || socket::listen(fd, backlog)).map_err(failed)?;
        }
    }
    Ok(())
}

fn connect_by_name(rebuild: &mut Rebuild<'_>, sockets: &Sockets<'_>) -> Result<(), RebuildError> {
    let is_unseen = |unix: &UnixSocket| {
        unix.node.is_none() && unix.name.as_ref().is_none_or(|name| is_path(name))
    };
    for (id, unix) in sockets.iter().filter(|(_, unix)| !is_unseen(unix)) {
        let UnixState::Listening { pending, .. } = &unix.state else { continue };
        // Clients that are gone are made here.
        rebuild.enter_network(rebuild.files.get(*id).map_or(0, |file| file.network))?;
        let clients = pending_of(rebuild, pending)?;
        let address = address_of(unix).ok_or(RebuildError::Damaged)?;
        connect_clients(unix.socket_type, &clients, &address).map_err(failed)?;
    }
    // A datagram socket that is connected itself takes no new senders, so those to it go first.
    let mut senders = Vec::new();
    for (id, unix) in sockets {
        let UnixState::Connected(peer) = unix.state else { continue };
        let receiver = socket_of(rebuild.files, peer)?;
        if unix.socket_type == libc::SOCK_DGRAM && !is_unseen(receiver) {
            let first = matches!(receiver.state, UnixState::Connected(_));
            senders.push((!first, *id, receiver));
        }
    }
    senders.sort_by_key(|(later, id, _)| (*later, *id));
    for (_, id, receiver) in senders {
        let fd = rebuild.made(id).ok_or(RebuildError::Damaged)?;
        let address = address_of(receiver).ok_or(RebuildError::Damaged)?;
        socket::connect(fd, &address).map_err(failed)?;
    }
    Ok(())
}

/// Lets listeners listen once more in the process that did so: clients see it as their peer.
pub(in super::super) fn finish(
    files: &Files,
    tables: &BTreeMap<i32, Vec<Descriptor>>,
    remote: &mut dyn Remote,
) -> Result<(), RebuildError> {
    for (id, unix) in sockets(files)? {
        let (UnixState::Listening { backlog, .. }, Some(seen)) =
            (&unix.state, unix.peer_credentials)
        else {
            continue;
        };
        // Only if that process still lives and holds it.
        let Some(table) = tables.get(&seen.pid) else { continue };
        let Some(held) = table.iter().find(|held| held.file == id) else { continue };
        let none = || Argument::Value(0);
        let arguments = [
            Argument::Value(u64::from(held.fd.cast_unsigned())),
            Argument::Value(u64::from(*backlog)),
            none(),
            none(),
            none(),
            none(),
        ];
        remote.call(seen.pid, libc::SYS_listen, arguments).map_err(|source| {
            RebuildError::Remote { pid: seen.pid, object: "unix listener", source }
        })?;
    }
    Ok(())
}
