//! TCP connections that are alike: one of them is asked, for all.
//!
//! A server has thousands of connections, all with the options that their listener gave them, and
//! each has fifty that could be another one. Whatever they are kept in is copied from the kernel for
//! all of them in one pass ([`Look`]); connections for which it is the same have the same options.
//! What each has for itself is in the same copy ([`Record`]).

use std::{
    collections::HashMap,
    io,
    os::fd::BorrowedFd,
    sync::{Arc, OnceLock, PoisonError, RwLock},
};

use ckpt_format::files::{SocketOption, TcpSocket, TcpState};

use super::{
    super::{
        find::{Found, Object, Refusal},
        options::{self, FILTER, Family, Stage},
        socket::Network,
        tables::Entry,
    },
    CLOSE_WAIT, CLOSING, ESTABLISHED, FIN_WAIT1, FIN_WAIT2, LAST_ACK,
    look::{Look, Opened, Sight},
    proof::{self, Names},
    record::Record,
    told::Reference,
};
use crate::sys::descriptor::Status;

/// A process with fewer descriptors than this is not looked at: asking takes less time.
pub(super) const DESCRIPTORS_MIN: usize = 64;

/// The program, and what it shows: of IPv4 and of IPv6 sockets.
#[derive(Debug)]
struct Proved {
    look: Look,
    seen: [Names; 2],
    /// Whether the records of connections tell what these would answer.
    records: [bool; 2],
    descriptors: bool,
    owners: bool,
    /// Of a socket: but for the number of the inode that of all.
    status: Status,
}

impl Proved {
    fn find() -> io::Result<Self> {
        let look = Look::new()?;
        let v4 = proof::seen(&look, false)?;
        // Without IPv6 there is no such socket.
        let v6 = proof::seen(&look, true).unwrap_or_default();
        let records = [false, true].map(|v6| {
            proof::records(&look, v6).unwrap_or_else(|error| {
                tracing::info!(%error, v6, "the records of connections could not be compared");
                false
            })
        });
        let descriptors = proof::are_descriptors_seen(&look).unwrap_or(false);
        let owners = proof::are_owners_seen(&look).unwrap_or(false);
        let status = proof::status()?;
        Ok(Self { look, seen: [v4, v6], records, descriptors, owners, status })
    }
}

static PROVED: OnceLock<Option<Proved>> = OnceLock::new();

/// Finds out what takes long, before there is a hurry: for a process with so many descriptors. Not
/// when we have them all ourselves, because it is our own descriptors that are looked at.
pub(in super::super) fn prepare(count: usize) {
    if count < DESCRIPTORS_MIN {
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

/// What is seen of a TCP socket and its descriptor, beside the connection.
#[derive(Clone, Copy, Debug)]
pub(in super::super) struct Told {
    /// Whether execve(2) closes it.
    pub(in super::super) closes: bool,
    /// `F_GETFL`, of a VE that stands still.
    pub(in super::super) flags: Option<i32>,
    /// That nobody gets its signals; of a VE that stands still.
    pub(in super::super) is_unowned: bool,
}

/// What is seen of the descriptors of a process.
#[derive(Debug, Default)]
pub(in super::super) struct Seen {
    /// In their order.
    opened: Vec<Opened>,
    proved: Option<&'static Proved>,
    /// When the process stopped, if it stands still.
    stopped_ns: Option<i64>,
}

impl Seen {
    /// With so many descriptors. Of what is not seen nothing is told.
    pub(in super::super) fn of(host_pid: i32, count: usize, stopped_ns: Option<i64>) -> Self {
        let proved = PROVED.get().and_then(Option::as_ref);
        let Some(proved) = proved.filter(|_| count >= DESCRIPTORS_MIN) else {
            return Self::default();
        };
        match proved.look.at(host_pid) {
            Ok(opened) => Self { opened, proved: Some(proved), stopped_ns },
            Err(error) => {
                tracing::info!(%error, "a process is asked for its connections");
                Self::default()
            }
        }
    }

    /// All descriptors of a process, however few.
    pub(in super::super) fn whole(host_pid: i32, stopped_ns: Option<i64>) -> Self {
        Self::of(host_pid, usize::MAX, stopped_ns)
    }

    /// Its table, if there is one that can be relied on.
    pub(in super::super) fn table(&self) -> Option<Vec<Entry>> {
        self.proved.filter(|proved| proved.descriptors && !self.opened.is_empty())?;
        let entry = |opened: &Opened| Entry {
            fd: opened.fd,
            file: opened.file,
            close_on_exec: opened.closes,
            unlocked: opened.unlocked,
        };
        Some(self.opened.iter().map(entry).collect())
    }

    /// The open connections whose records tell all about them.
    pub(super) fn open(&self) -> impl Iterator<Item = (&Opened, &Sight, &Record)> {
        self.opened.iter().filter_map(|opened| {
            let sight = opened.socket.as_ref().filter(|it| it.is_plain && it.is_open())?;
            Some((opened, sight, sight.record.as_ref()?))
        })
    }

    /// Asks a connection for what all have in common whose options are kept in the same bytes.
    pub(super) fn common(&self, fd: BorrowedFd<'_>, sight: &Sight) -> io::Result<Option<Common>> {
        self.proved.map(|proved| Common::ask(proved, fd, sight)).transpose()
    }

    fn opened(&self, fd: i32) -> Option<(&Opened, &Sight)> {
        let place = self.opened.binary_search_by_key(&fd, |opened| opened.fd).ok()?;
        let opened = &self.opened[place];
        Some((opened, opened.socket.as_ref()?))
    }

    /// What is seen of a TCP socket.
    pub(in super::super) fn told(&self, fd: i32, inode: u64) -> Option<Told> {
        self.proved.filter(|proved| proved.descriptors)?;
        let (opened, _) = self.opened(fd).filter(|it| it.0.inode == inode)?;
        Some(Told { closes: opened.closes, flags: None, is_unowned: false })
    }

    /// All about a TCP socket and its inode, if the process stands still.
    pub(in super::super) fn at_rest(&self, fd: i32) -> Option<(Status, Told)> {
        let proved =
            self.proved.filter(|proved| proved.descriptors && self.stopped_ns.is_some())?;
        let (opened, _) = self.opened(fd)?;
        let is_unowned = proved.owners && opened.owner == 0;
        let told = Told { closes: opened.closes, flags: Some(opened.flags), is_unowned };
        Some((Status { inode: opened.inode, ..proved.status }, told))
    }
}

/// What connections with the same options have in common.
pub(super) struct Common {
    pub(super) options: Vec<SocketOption>,
    /// Every option that a connection can have is seen.
    pub(super) all_seen: bool,
    /// Their records are believed.
    pub(super) is_believed: bool,
}

impl Common {
    fn ask(proved: &Proved, fd: BorrowedFd<'_>, sight: &Sight) -> io::Result<Self> {
        let family = Family::Tcp { v6: sight.v6, stage: Stage::Connected };
        let options = options::capture(fd, family)?;
        let names = &proved.seen[usize::from(sight.v6)];
        let is_seen = |name: (i32, i32)| names.contains(&name);
        // With a label the other end's address is more than the record tells.
        let labelled = options.iter().any(|it| (it.level, it.name) == options::FLOW_LABELS);
        Ok(Self {
            all_seen: is_seen(FILTER) && family.names().all(|it| is_seen((it.0, it.1))),
            is_believed: proved.records[usize::from(sight.v6)] && !labelled,
            options,
        })
    }
}

/// Connections with the same options, in the same network.
#[derive(Debug)]
pub(in super::super) struct Group<'a> {
    pub(in super::super) network: &'a Network,
    pub(super) v6: bool,
    seen: &'static Names,
    options: Vec<SocketOption>,
    /// Every option that a connection can have is seen.
    all_seen: bool,
    /// When the VE stopped, if records are believed.
    pub(super) stopped_us: Option<i64>,
    /// The one that the others are compared with. None if records do not tell the truth.
    pub(super) reference: OnceLock<Option<Reference>>,
}

impl Group<'_> {
    /// The options of one of them. Only those that do not show are asked for.
    pub(super) fn options_of(&self, object: &Object) -> io::Result<Vec<SocketOption>> {
        let family = Family::Tcp { v6: self.v6, stage: Stage::Connected };
        let is_known = |level, name| self.seen.contains(&(level, name));
        options::capture_like(object.fd(), family, &self.options, is_known)
    }

    /// The record of one of them, if it tells all.
    pub(super) fn record<'s>(&self, sight: &'s Sight) -> Option<&'s Record> {
        let record = sight.record.as_ref().filter(|_| self.stopped_us.is_some())?;
        sight.is_open().then_some(record).filter(|record| !record.is_repaired())
    }

    /// Whether one of them is known to have no keys for its segments.
    pub(super) fn is_unsigned(&self, sight: &Sight) -> bool {
        let record = sight.record.as_ref().filter(|_| self.stopped_us.is_some());
        record.is_some_and(|record| !record.is_signed())
    }

    /// What one of them is, as its record tells.
    pub(super) fn socket(
        &self,
        object: &Object,
        record: &Record,
        reference: &Reference,
    ) -> Option<TcpSocket> {
        let connection = reference.connection(record)?;
        let options = match self.all_seen {
            true => options::with_buffers(&self.options, record.buffers()),
            false => self.options_of(object).ok()?,
        };
        Some(TcpSocket {
            v6: self.v6,
            multipath: false,
            local: Some(record.local),
            state: TcpState::Connected(Box::new(connection)),
            options,
        })
    }
}

/// The connections of a VE that stands still.
#[derive(Debug)]
pub(in super::super) struct Alike<'a> {
    found: &'a Found,
    groups: RwLock<HashMap<&'a [u8], Arc<Group<'a>>>>,
}

impl<'a> Alike<'a> {
    pub(in super::super) fn of(found: &'a Found) -> Self {
        Self { found, groups: RwLock::default() }
    }

    /// Those with which a socket shares its options, and what was seen of it, if it is a connection
    /// that was seen. `network` tells in which one it is.
    pub(in super::super) fn group(
        &self,
        object: &Object,
        network: impl FnOnce() -> Result<&'a Network, Refusal>,
    ) -> Option<(Arc<Group<'a>>, &'a Sight)> {
        let &(holder, fd) = object.holders.first()?;
        let seen = self.found.seen.get(holder)?;
        let (opened, sight) = seen.opened(fd)?;
        if opened.inode != object.status.inode || !is_connection(sight) {
            return None;
        }
        let proved = seen.proved?;
        let known = self.groups.read().unwrap_or_else(PoisonError::into_inner);
        if let Some(group) = known.get(&sight.options[..]) {
            return Some((group.clone(), sight));
        }
        drop(known);
        let Common { options, all_seen, is_believed } =
            Common::ask(proved, object.fd(), sight).ok()?;
        let group = Arc::new(Group {
            network: network().ok()?,
            v6: sight.v6,
            seen: &proved.seen[usize::from(sight.v6)],
            all_seen,
            options,
            stopped_us: seen.stopped_ns.map(|ns| ns / 1000).filter(|_| is_believed),
            reference: OnceLock::new(),
        });
        let mut groups = self.groups.write().unwrap_or_else(PoisonError::into_inner);
        Some((groups.entry(&sight.options).or_insert(group).clone(), sight))
    }
}

fn is_connection(sight: &Sight) -> bool {
    const CONNECTED: [u8; 6] = [ESTABLISHED, FIN_WAIT1, FIN_WAIT2, CLOSE_WAIT, LAST_ACK, CLOSING];
    sight.is_plain && CONNECTED.contains(&sight.state)
}
