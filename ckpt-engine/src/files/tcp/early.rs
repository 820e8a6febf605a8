//! Connections that are made before the VE stops.
//!
//! The target is told which connections of the VE rest ([`super::resting`]). It makes them in repair
//! mode, in which nothing is sent and nothing answered. In the end each is compared with what was
//! captured, and only one that is exactly that is used, when it has been told what time it is. All
//! others are closed, which nobody hears, and made anew.

use std::{
    collections::HashMap,
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

use ckpt_format::files::{
    File, Kind, RestingConnections, TcpConnection, TcpEnds, TcpSocket, TcpState,
};

use super::{
    super::rebuild::RebuildError,
    rebuild::{self, Usual},
};
use crate::{
    beside,
    sys::{identity, namespace},
};

/// The connections that are there already.
#[derive(Debug, Default)]
pub struct Early {
    made: HashMap<TcpEnds, Made>,
}

/// One of them.
#[derive(Debug)]
pub(in super::super) struct Made {
    fd: OwnedFd,
    /// What was told of it.
    told: File,
}

impl Made {
    /// Whether it still is what was told of it, but for what time it is and who has to be asked.
    pub(in super::super) fn is_still(&self, file: &File) -> bool {
        let (Kind::Tcp(then), Kind::Tcp(now)) = (&self.told.kind, &file.kind) else { return false };
        let TcpSocket { v6, multipath, local, state, options } = &**then;
        let TcpState::Connected(then) = state else { return false };
        let TcpState::Connected(connection) = &now.state else { return false };
        let expected = TcpConnection {
            timestamp: then.timestamp.and(connection.timestamp),
            quiet: connection.quiet,
            ..(**then).clone()
        };
        let differ = (self.told.flags ^ file.flags).cast_signed();
        (v6, multipath, local, options) == (&now.v6, &now.multipath, &now.local, &now.options)
            && expected == **connection
            && differ & libc::O_NONBLOCK == 0
    }

    /// The connection.
    pub(in super::super) fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// The connection, and what is of no use any more: many of those are not let go of in a hurry.
    pub(in super::super) fn into_parts(self) -> (OwnedFd, File) {
        (self.fd, self.told)
    }
}

impl Early {
    /// Makes those that rest, closes those that do not any more. What cannot be made now is made
    /// when the VE has stopped. `init` is a pidfd of the VE's pid 1, `networks` are the namespaces
    /// that there are beside its own, which comes first in the list; it may be empty.
    pub(crate) fn learn(
        &mut self,
        told: RestingConnections,
        id_base: u32,
        init: BorrowedFd<'_>,
        networks: &[OwnedFd],
    ) {
        for ends in told.wake {
            self.made.remove(&ends);
        }
        let mut apart: HashMap<u32, Vec<(TcpEnds, File)>> = HashMap::new();
        for file in told.rest {
            let Some(ends) = TcpEnds::of(&file) else { continue };
            // There is never more than one with the same ends.
            self.made.remove(&ends);
            apart.entry(file.network).or_default().push((ends, file));
        }
        for (network, wanted) in apart {
            let network = match network {
                0 => Some(init),
                number => networks.get(number as usize).map(AsFd::as_fd),
            };
            let Some(network) = network else { continue };
            match make_all(network, id_base, &wanted) {
                Ok(made) => {
                    let made = wanted.into_iter().zip(made);
                    self.made.extend(
                        made.filter_map(|((ends, told), fd)| Some((ends, Made { fd: fd?, told }))),
                    );
                }
                Err(error) => {
                    tracing::info!(%error, "connections of a VE are made when it has stopped");
                }
            }
        }
    }

    /// The one that was made for this connection.
    pub(in super::super) fn take(&mut self, file: &File) -> Option<Made> {
        self.made.remove(&TcpEnds::of(file)?)
    }

    /// What is there.
    #[cfg(test)]
    pub(super) fn made(&self) -> impl Iterator<Item = (TcpEnds, BorrowedFd<'_>)> {
        self.made.iter().map(|(ends, made)| (*ends, made.fd.as_fd()))
    }

    /// Closes those at this port, for somebody who wants it alone. Tells whether there were any.
    pub(in super::super) fn give_way(&mut self, port: u16) -> bool {
        let before = self.made.len();
        self.made.retain(|ends, _| ends.local.port() != port);
        self.made.len() < before
    }
}

fn make_all(
    network: BorrowedFd<'_>,
    id_base: u32,
    wanted: &[(TcpEnds, File)],
) -> io::Result<Vec<Option<OwnedFd>>> {
    namespace::in_network_of(network, || {
        identity::own_new_files(id_base, id_base)?;
        let usual = Usual::here().map_err(io::Error::other)?;
        Ok(beside::each(wanted, |(ends, file)| {
            let made = make(file, &usual);
            made.map_err(|error| tracing::debug!(?ends, %error, "is made later")).ok()
        }))
    })
}

fn make(file: &File, usual: &Usual) -> Result<OwnedFd, RebuildError> {
    match &file.kind {
        Kind::Tcp(tcp) => rebuild::make_early(tcp, file.flags, usual),
        _ => Err(RebuildError::Damaged),
    }
}
