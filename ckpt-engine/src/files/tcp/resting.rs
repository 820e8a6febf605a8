//! Connections of a running VE that rest.
//!
//! Most connections of a server have had nothing to say for a while, and will have nothing to say in
//! the moment in which the VE stops. The target is told of them before, and makes them ([`super::early`]).
//! What is told is a guess that nobody relies on: the VE runs while it is looked at. In the end the
//! target compares it with what was captured when nothing ran any more.
//!
//! Only the kernel's records are looked at. No connection is touched, but for one of each kind, which
//! is asked for the options that all of the kind have.

use std::{
    collections::{HashMap, hash_map::Entry},
    io,
    os::fd::AsFd,
};

use ckpt_format::files::{
    File, Kind, RestingConnections, SocketOption, TcpEnds, TcpSocket, TcpState,
};

use super::{
    super::{Holder, Source, capture::plain, options, socket, tables},
    alike::{Common, DESCRIPTORS_MIN, Seen},
    look::{Opened, Sight},
    told,
};
use crate::{container::host_clocks, sys::descriptor};

/// What the target was told of.
#[derive(Debug, Default)]
pub struct Resting {
    told: HashMap<TcpEnds, File>,
}

impl Resting {
    /// What is to be told after another look: which connections rest, and which do not any more.
    pub fn look(&mut self, source: &Source<'_>) -> RestingConnections {
        let found = find(source).unwrap_or_else(|error| {
            tracing::info!(%error, "no connection of a VE is made before it stops");
            HashMap::new()
        });
        let is_new = |(ends, file): &(&TcpEnds, &File)| self.told.get(*ends) != Some(*file);
        let rest = found.iter().filter(is_new).map(|(_, file)| file.clone()).collect();
        let wake = self.told.keys().filter(|ends| !found.contains_key(*ends)).copied().collect();
        self.told = found;
        RestingConnections { rest, wake }
    }

    /// How many the target was told of that rest.
    pub fn count(&self) -> usize {
        self.told.len()
    }
}

/// The open connections of which nothing was heard for a while.
fn find(source: &Source<'_>) -> io::Result<HashMap<TcpEnds, File>> {
    let mut finding = Finding {
        cookies: socket::cookies(source)?,
        now_us: host_clocks()?.monotonic_ns / 1000,
        kinds: HashMap::new(),
        found: HashMap::new(),
    };
    let small = tables::read(source.init);
    for holder in &source.processes {
        let is_small = small.get(&holder.host_pid).is_some_and(|it| it.len() < DESCRIPTORS_MIN);
        if !is_small {
            finding.add(holder);
        }
    }
    Ok(finding.found)
}

/// What connections have in common that have the same options, in the same network.
struct Alike {
    network: u32,
    options: Vec<SocketOption>,
}

struct Finding {
    /// Of each network of the VE.
    cookies: Vec<u64>,
    now_us: i64,
    /// By what their options are kept in; none if that does not tell all.
    kinds: HashMap<Vec<u8>, Option<Alike>>,
    found: HashMap<TcpEnds, File>,
}

impl Finding {
    fn add(&mut self, holder: &Holder<'_>) {
        let seen = Seen::whole(holder.host_pid, None);
        for (opened, sight, record) in seen.open() {
            if record.is_repaired() || !told::rests(record, self.now_us) {
                continue;
            }
            let kind = match self.kinds.entry(sight.options.clone()) {
                Entry::Occupied(known) => known.into_mut(),
                Entry::Vacant(place) => {
                    // It may have been closed meanwhile.
                    place.insert(ask(holder, &seen, opened, sight, &self.cookies).unwrap_or(None))
                }
            };
            let Some(Alike { network, options }) = kind else { continue };
            // What time it is there is found out in the end.
            let timestamp = record.has_timestamps().then_some(0);
            let connection = told::connection(record, timestamp, false);
            let socket = TcpSocket {
                v6: sight.v6,
                multipath: false,
                local: Some(record.local),
                state: TcpState::Connected(Box::new(connection)),
                options: options::with_buffers(options, record.buffers()),
            };
            let ends = TcpEnds { network: *network, local: record.local, remote: record.remote };
            let kind = Kind::Tcp(Box::new(socket));
            let file = File { network: *network, ..plain(opened.flags.cast_unsigned(), kind) };
            self.found.insert(ends, file);
        }
    }
}

/// Asks one connection for what all of its kind have.
fn ask(
    holder: &Holder<'_>,
    seen: &Seen,
    opened: &Opened,
    sight: &Sight,
    cookies: &[u64],
) -> io::Result<Option<Alike>> {
    let fd = descriptor::fetch(holder.pidfd, opened.fd)?;
    if descriptor::status(fd.as_fd())?.inode != opened.inode {
        return Ok(None);
    }
    let cookie = socket::cookie(fd.as_fd())?;
    let network = cookies.iter().position(|&it| it == cookie);
    let network = network.and_then(|network| u32::try_from(network).ok());
    let Some(common) = seen.common(fd.as_fd(), sight)? else { return Ok(None) };
    let Common { options, all_seen, is_believed } = common;
    Ok(network.filter(|_| all_seen && is_believed).map(|network| Alike { network, options }))
}
