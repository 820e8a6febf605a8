//! What is still sent of closed connections where it cannot be read (see [`super::orphan`]): who moves
//! a VE waits for it a while, and knows what is lost when a slow peer has not taken it then.

use std::{io, os::fd::BorrowedFd};

use super::{super::table::Table, CLOSING, FIN_WAIT1, LAST_ACK, orphan};
use crate::sys::namespace::in_network_of;

/// The connections in a network that a move would lose, each in words.
pub(in super::super) fn unsent(network: BorrowedFd<'_>) -> io::Result<Vec<String>> {
    match orphan::are_any()? && !orphan::are_seen() {
        true => still_sending(network),
        false => Ok(Vec::new()),
    }
}

/// Connections that no process has and whose peers have not taken everything.
pub(super) fn still_sending(network: BorrowedFd<'_>) -> io::Result<Vec<String>> {
    let tables = in_network_of(network, || {
        let read = |name| Table::read(&format!("/proc/thread-self/net/{name}"));
        // Without IPv6 the second one is not there.
        Ok([read("tcp")?, read("tcp6").unwrap_or_default()])
    })?;
    let sends = [FIN_WAIT1, LAST_ACK, CLOSING];
    let lines = tables.iter().flat_map(Table::lines);
    let lines = lines.filter(|line| line.state().is_some_and(|state| sends.contains(&state)));
    let told = lines.filter(|line| line.inode() == Some(0)).filter_map(|line| {
        // The last one is no byte, but our FIN.
        let bytes = line.outstanding()?.saturating_sub(1);
        let (local, remote) = (line.local()?, line.remote()?);
        (bytes > 0).then(|| format!("{bytes} bytes from {local} to {remote}"))
    });
    Ok(told.collect())
}
