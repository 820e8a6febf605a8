//! TCP connections that are alike: their options are asked of one of them.
//!
//! A server has thousands of connections, all with the options that their listener gave them, and
//! each has fifty that could be another one. Whatever they are kept in is copied from the kernel for
//! all of them in one pass ([`Look`]); connections for which it is the same have the same options.

use std::{
    collections::HashMap,
    io,
    sync::{Arc, Mutex, OnceLock, PoisonError},
};

use ckpt_format::files::SocketOption;

use super::{
    super::{
        find::{Found, Object, Refusal},
        options::{self, Family, Stage},
        socket::Network,
    },
    CLOSE_WAIT, CLOSING, ESTABLISHED, FIN_WAIT1, FIN_WAIT2, LAST_ACK,
    look::{Look, Sight, Sights},
    proof::{self, Names},
};

/// A process with fewer descriptors than this is not looked at: asking takes less time.
const DESCRIPTORS_MIN: usize = 64;

/// The program, and which options it shows: of IPv4 and of IPv6 sockets.
#[derive(Debug)]
struct Proved {
    look: Look,
    seen: [Names; 2],
    descriptors: bool,
}

impl Proved {
    fn find() -> io::Result<Self> {
        let look = Look::new()?;
        let v4 = proof::seen(&look, false)?;
        // Without IPv6 there is no such socket.
        let v6 = proof::seen(&look, true).unwrap_or_default();
        let descriptors = proof::are_descriptors_seen(&look).unwrap_or(false);
        Ok(Self { look, seen: [v4, v6], descriptors })
    }
}

static PROVED: OnceLock<Option<Proved>> = OnceLock::new();

/// Finds out what takes long, before there is a hurry.
pub(in super::super) fn prepare(found: &Found) {
    if found.tables.values().all(|table| table.len() < DESCRIPTORS_MIN) {
        return;
    }
    PROVED.get_or_init(|| {
        let proved = Proved::find();
        if let Err(error) = &proved {
            tracing::info!(%error, "every TCP connection is asked for its options");
        }
        proved.ok()
    });
}

/// What is seen of the sockets of a process.
#[derive(Debug, Default)]
pub(in super::super) struct Seen {
    sights: Sights,
    descriptors: bool,
}

impl Seen {
    /// With so many descriptors. Of what is not seen nothing is told.
    pub(in super::super) fn of(host_pid: i32, count: usize) -> Self {
        let Some(Some(proved)) = PROVED.get().filter(|_| count >= DESCRIPTORS_MIN) else {
            return Self::default();
        };
        match proved.look.at(host_pid) {
            Ok(sights) => Self { sights, descriptors: proved.descriptors },
            Err(error) => {
                tracing::info!(%error, "a process is asked for its connections");
                Self::default()
            }
        }
    }

    /// Whether execve(2) closes this descriptor, if it is seen.
    pub(in super::super) fn closes(&self, fd: i32, inode: u64) -> Option<bool> {
        let &(_, closes) = self.sights.descriptors.get(&fd).filter(|it| it.0 == inode)?;
        self.descriptors.then_some(closes)
    }
}

/// Connections with the same options, in the same network.
#[derive(Debug)]
pub(in super::super) struct Group<'a> {
    pub(in super::super) network: &'a Network,
    pub(in super::super) v6: bool,
    seen: &'static Names,
    options: Vec<SocketOption>,
}

impl Group<'_> {
    /// The options of one of them. Only those that do not show are asked for.
    pub(super) fn options_of(&self, object: &Object) -> io::Result<Vec<SocketOption>> {
        let family = Family::Tcp { v6: self.v6, stage: Stage::Connected };
        let is_known = |level, name| self.seen.contains(&(level, name));
        options::capture_like(object.fd(), family, &self.options, is_known)
    }
}

/// The connections of a VE that stands still.
#[derive(Debug)]
pub(in super::super) struct Alike<'a> {
    found: &'a Found,
    groups: Mutex<HashMap<&'a [u8], Arc<Group<'a>>>>,
}

impl<'a> Alike<'a> {
    pub(in super::super) fn of(found: &'a Found) -> Self {
        Self { found, groups: Mutex::default() }
    }

    /// Those with which a socket shares its options, if it is a connection that was seen. `network`
    /// tells in which one it is.
    pub(in super::super) fn group(
        &self,
        object: &Object,
        network: impl FnOnce() -> Result<&'a Network, Refusal>,
    ) -> Option<Arc<Group<'a>>> {
        let &(holder, _) = object.holders.first()?;
        let sights = &self.found.seen.get(holder)?.sights;
        let sight = sights.sockets.get(&object.status.inode).filter(|it| is_connection(it))?;
        let seen = &PROVED.get()?.as_ref()?.seen[usize::from(sight.v6)];
        let groups = || self.groups.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(group) = groups().get(&sight.options[..]) {
            return Some(group.clone());
        }
        let family = Family::Tcp { v6: sight.v6, stage: Stage::Connected };
        let options = options::capture(object.fd(), family).ok()?;
        let group = Group { network: network().ok()?, v6: sight.v6, seen, options };
        let group = Arc::new(group);
        groups().insert(&sight.options, group.clone());
        Some(group)
    }
}

fn is_connection(sight: &Sight) -> bool {
    const CONNECTED: [u8; 6] = [ESTABLISHED, FIN_WAIT1, FIN_WAIT2, CLOSE_WAIT, LAST_ACK, CLOSING];
    sight.is_plain && CONNECTED.contains(&sight.state)
}
