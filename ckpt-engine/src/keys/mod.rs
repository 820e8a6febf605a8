//! Keys that processes possess (keyrings(7)), read from the kernel's own records.
//!
//! Whoever possesses a key can ask for its contents only if the key says so, and nobody can ask for
//! those of the type `logon`. So nobody is asked: [`Look`] copies what the kernel keeps, some
//! dozens of places at once. A VE that has no keys costs one look.

mod unseen;
mod walk;

use std::{collections::HashMap, io};

use ckpt_format::{
    blocker::Blocker,
    keys::{Key, Keyrings, Keys, OfUser},
};

use self::walk::{Seen, Walk};
use crate::{
    capture::{CaptureError, IdMap},
    inject::InjectError,
    look::Look,
};

pub(crate) use self::{unseen::unseen, walk::Places};

/// Where the keyrings of one thread are, in the kernel; 0 for none.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Holder {
    /// The thread, as numbered in the VE.
    pub(crate) tid: i32,
    pub(crate) session: u64,
    pub(crate) process: u64,
    pub(crate) thread: u64,
}

/// What a session keyring is like that nobody has done anything to: its name, and its permissions
/// (`KEY_POS_ALL`, `KEY_USR_VIEW`, `KEY_USR_READ`).
const PLAIN: (&[u8], u32) = (b"_ses", 0x3f03_0000);

/// How often the keys are looked at again: one that has expired may be freed just now.
const TRIES: u32 = 3;

/// Reads keys.
pub(crate) struct Reader {
    look: Look,
    places: Places,
}

impl std::fmt::Debug for Reader {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Reader").finish_non_exhaustive()
    }
}

impl Reader {
    /// `iterator` is the number of the kernel's function that shows tasks.
    pub(crate) fn new(places: &Places, iterator: u32) -> io::Result<Self> {
        Ok(Self { look: Look::new(iterator)?, places: places.clone() })
    }

    /// All keys of a frozen VE: those of these threads, and those that the kernel keeps for its
    /// users. `users` is where its user namespace is.
    pub(crate) fn keys(
        &self,
        holders: &[Holder],
        users: u64,
        ids: IdMap,
    ) -> Result<Keys, CaptureError> {
        let mut tries = 0;
        let (seen, registered) = loop {
            match self.see(holders, users) {
                Err(_) if tries < TRIES => tries += 1,
                Err(source) => return Err(InjectError::Control { tid: 0, source }.into()),
                Ok(seen) => break seen,
            }
        };
        let Some(walk) = seen else { return Ok(Keys::default()) };
        let blockers: Vec<Blocker> = walk.seen.iter().filter_map(blocker).collect();
        if !blockers.is_empty() {
            return Err(CaptureError::Blocked(blockers));
        }
        let place = |address: &u64| walk.places.get(address).copied();
        let keys = Keys {
            keys: walk.seen.iter().map(|seen| key(seen, ids, &walk.places)).collect(),
            threads: holders
                .iter()
                .map(|it| {
                    let [session, process, thread] =
                        [&it.session, &it.process, &it.thread].map(place);
                    (it.tid, Keyrings { session, process, thread })
                })
                .collect(),
            users: registered
                .iter()
                .filter_map(|address| of_user(place(address)?, &walk))
                .collect(),
        };
        Ok(if is_plain(&keys) { Keys::default() } else { keys })
    }

    /// Nothing where there is nothing to be seen; else what there is, and which of it the kernel
    /// keeps for users.
    fn see(&self, holders: &[Holder], users: u64) -> io::Result<(Option<Walk>, Vec<u64>)> {
        let mut roots: Vec<u64> =
            holders.iter().flat_map(|it| [it.session, it.process, it.thread]).collect();
        roots.sort_unstable();
        roots.dedup();
        roots.retain(|root| *root != 0);
        let registers = self.places.registers.iter().map(|offset| (users + u64::from(*offset), 8));
        let root = roots.first().map(|root| (*root, self.places.len()));
        let wanted: Vec<_> = registers.chain(root).collect();
        let first = self.look.at(&wanted)?;
        let (registers, first) = first.split_at(self.places.registers.len());
        let mut registers: Vec<u64> = registers.iter().map(|bytes| walk::number(bytes)).collect();
        registers.retain(|register| *register != 0);
        let is_empty = first.iter().all(|bytes| self.places.is_empty_keyring(bytes));
        if registers.is_empty() && roots.len() <= 1 && is_empty {
            return Ok((None, Vec::new()));
        }
        let mut registered = Vec::new();
        for keyring in self.look.at(&walk::each(&registers, self.places.len()))? {
            registered.extend(self.places.links(&self.look, &keyring)?);
        }
        let roots = roots.into_iter().chain(registered.iter().copied()).collect();
        Ok((Some(Walk::from(&self.look, &self.places, roots)?), registered))
    }
}

/// Whether there is nothing that a new VE would not have: one session keyring for all, and those
/// that users are given as soon as they ask.
fn is_plain(keys: &Keys) -> bool {
    let mut sessions: Vec<u32> = keys.threads.values().filter_map(|it| it.session).collect();
    sessions.sort_unstable();
    sessions.dedup();
    let is_theirs = |place: u32| keys.users.iter().any(|(_, _, theirs)| *theirs == place);
    let plain = |(place, key): (u32, &Key)| match sessions.as_slice() {
        _ if is_theirs(place) => key.links.iter().all(|link| is_theirs(*link)),
        [only] if *only == place => {
            (key.description.as_slice(), key.permissions) == PLAIN
                && key.links.is_empty()
                && !key.revoked
                && key.expires_s == 0
        }
        _ => false,
    };
    (0..).zip(&keys.keys).all(plain)
}

fn key(seen: &Seen, ids: IdMap, places: &HashMap<u64, u32>) -> Key {
    Key {
        kind: seen.kind.clone(),
        description: seen.description.clone(),
        user: ids.inside(seen.user.into()),
        group: ids.inside(seen.group.into()),
        permissions: seen.permissions,
        expires_s: seen.expires_s,
        revoked: seen.revoked,
        payload: seen.payload.clone(),
        links: seen.links.iter().filter_map(|link| places.get(link).copied()).collect(),
    }
}

/// The kernel gives the keyrings that it keeps for users these names.
fn of_user(place: u32, walk: &Walk) -> Option<(OfUser, u32, u32)> {
    let name = std::str::from_utf8(&walk.seen[place as usize].description).ok()?;
    let (kind, user) = name.rsplit_once('.')?;
    let kind = match kind {
        "_uid" => OfUser::User,
        "_uid_ses" => OfUser::Session,
        "_persistent" => OfUser::Persistent,
        _ => return None,
    };
    Some((kind, user.parse().ok()?, place))
}

/// What can be read, but not be made again.
fn blocker(seen: &Seen) -> Option<Blocker> {
    let name = String::from_utf8_lossy(&seen.description);
    let object = match seen.kind.as_str() {
        "keyring" if seen.restricted => format!("the keyring {name:?}, which takes not every key"),
        "keyring" | "user" | "logon" => return None,
        kind => format!("the key {name:?} of the type {kind}"),
    };
    let hint = "unlink it with keyctl(1), or end the programs that have it".to_owned();
    Some(Blocker { pid: 1, command: "init".to_owned(), fd: None, object, hint })
}
