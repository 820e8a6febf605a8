//! Connections that were made through a listener: one end has the listener's name, and each may
//! remember another user as its peer.

use std::{
    collections::BTreeMap,
    io,
    os::fd::{AsFd, OwnedFd},
};

use ckpt_format::files::{FileId, UnixSocket, UnixState};

use super::{
    super::{
        address,
        rebuild::{Rebuild, RebuildError},
    },
    bind::{bind_in_empty_root, in_empty_root, is_path},
    rebuild::{Sockets, failed, ids, put, socket_of},
};
use crate::sys::{
    identity::act_as,
    socket::{self, End},
};

/// A connection to make. The accepted end has its name from a listener of the moment.
struct Connection<'a> {
    accepted: FileId,
    /// None stands for one that is gone.
    client: Option<FileId>,
    socket_type: i32,
    name: Option<&'a [u8]>,
    /// Whom the accepted end sees.
    client_ids: (u32, u32),
    /// Whom the client sees.
    server_ids: (u32, u32),
}

/// Makes the connections that a pair of sockets cannot stand for: those whose name others have,
/// too, and those whose ends see different users.
pub(super) fn make<'a>(
    rebuild: &mut Rebuild<'a>,
    sockets: &Sockets<'a>,
    shares_name: &dyn Fn(&UnixSocket) -> bool,
) -> Result<(), RebuildError> {
    let mut connections = Vec::new();
    for &(id, unix) in sockets {
        connections.extend(connection(rebuild, id, unix, shares_name)?);
    }
    // Both ends are in the network of the listener.
    let mut by_network: BTreeMap<u32, Vec<Connection<'a>>> = BTreeMap::new();
    for connection in connections {
        let network = rebuild.files.get(connection.accepted).map_or(0, |it| it.network);
        by_network.entry(network).or_default().push(connection);
    }
    for (network, connections) in by_network {
        rebuild.enter_network(network)?;
        make_here(rebuild, connections)?;
    }
    Ok(())
}

/// The same for connections of the network that the thread is in.
fn make_here(
    rebuild: &mut Rebuild<'_>,
    connections: Vec<Connection<'_>>,
) -> Result<(), RebuildError> {
    let (paths, others): (Vec<_>, Vec<_>) =
        connections.into_iter().partition(|it| it.name.is_some_and(is_path));
    let mut made = Vec::new();
    for it in &others {
        made.push(accept(it, |fd, address| socket::bind(fd.as_fd(), address)).map_err(failed)?);
    }
    if !paths.is_empty() {
        made.extend(
            in_empty_root(|| paths.iter().map(accept_by_path).collect::<io::Result<Vec<_>>>())
                .map_err(failed)?,
        );
    }
    for (it, (accepted, client)) in others.iter().chain(&paths).zip(made) {
        put(rebuild, it.accepted, accepted)?;
        match it.client {
            Some(id) => put(rebuild, id, client)?,
            None => drop(rebuild.gone.insert(it.accepted.0, client)),
        }
    }
    Ok(())
}

/// The connection of a socket, if it is one of these and this is the end to look at it from.
fn connection<'a>(
    rebuild: &Rebuild<'a>,
    id: FileId,
    unix: &'a UnixSocket,
    shares_name: &dyn Fn(&UnixSocket) -> bool,
) -> Result<Option<Connection<'a>>, RebuildError> {
    if unix.socket_type == libc::SOCK_DGRAM {
        return Ok(None);
    }
    let id_base = rebuild.target.id_base;
    let seen = ids(unix.peer_credentials, id_base);
    let name = |unix: &'a UnixSocket| unix.name.as_ref().map(|name| name.as_slice());
    let peer = match unix.state {
        UnixState::PeerGone if shares_name(unix) => {
            let (socket_type, name) = (unix.socket_type, name(unix));
            let (client_ids, server_ids) = (seen, seen);
            return Ok(Some(Connection {
                accepted: id,
                client: None,
                socket_type,
                name,
                client_ids,
                server_ids,
            }));
        }
        UnixState::Connected(peer) if id < peer => peer,
        _ => return Ok(None),
    };
    let other = socket_of(rebuild.files, peer)?;
    if other.state != UnixState::Connected(id) || other.socket_type != unix.socket_type {
        return Err(RebuildError::Damaged);
    }
    let seen_by_other = ids(other.peer_credentials, id_base);
    let (shares, other_shares) = (shares_name(unix), shares_name(other));
    if !(shares || other_shares || seen != seen_by_other) {
        return Ok(None);
    }
    // The end that shares its name has it from its listener. So has the one with a name.
    let other_accepted = other_shares || (!shares && unix.name.is_none() && other.name.is_some());
    let (accepted, client) = if other_accepted { (peer, id) } else { (id, peer) };
    let (client_ids, server_ids) =
        if other_accepted { (seen_by_other, seen) } else { (seen, seen_by_other) };
    Ok(Some(Connection {
        accepted,
        client: Some(client),
        socket_type: unix.socket_type,
        name: name(if other_accepted { other } else { unix }),
        client_ids,
        server_ids,
    }))
}

/// Makes a connection through a listener of the moment; returns the accepted end first.
fn accept(
    connection: &Connection<'_>,
    bind: impl FnOnce(&OwnedFd, &[u8]) -> io::Result<()>,
) -> io::Result<(OwnedFd, OwnedFd)> {
    let Connection { socket_type, name, client_ids, server_ids, .. } = *connection;
    let listener = socket::socket(libc::AF_UNIX, socket_type, 0)?;
    // Without a name the kernel chooses one.
    bind(&listener, &name.map_or(address::encode_unix(&[])[..2].to_vec(), address::encode_unix))?;
    act_as(server_ids.0, server_ids.1, || socket::listen(listener.as_fd(), 1))?;
    let address = socket::address(listener.as_fd(), End::Local)?;
    let client = socket::socket(libc::AF_UNIX, socket_type, 0)?;
    act_as(client_ids.0, client_ids.1, || socket::connect(client.as_fd(), &address))?;
    Ok((socket::accept(listener.as_fd())?, client))
}

/// The same with a path, which is nobody's afterwards.
fn accept_by_path(connection: &Connection<'_>) -> io::Result<(OwnedFd, OwnedFd)> {
    let name = connection.name.unwrap_or_default();
    let made = accept(connection, |fd, _| bind_in_empty_root(fd.as_fd(), name))?;
    std::fs::remove_file(std::path::Path::new(
        <std::ffi::OsStr as std::os::unix::ffi::OsStrExt>::from_bytes(name),
    ))?;
    Ok(made)
}
