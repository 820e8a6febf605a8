//! Makes the keys that processes possess (keyrings(7)).
//!
//! A key is made by putting it into a keyring, and a keyring holds one key of each name, so they
//! are first put into as many holders as there are keys with one name. A session keyring is joined
//! by its name, which others have as well: the kernel then takes the first that the caller may
//! search. Until everybody has the right one each can be searched by a group of its own alone.
//!
//! Init makes all of them as root of the VE, and keeps the holders in its own session keyring until
//! it is completed itself, as the last one. Then they get their permissions and become what they
//! were; until then their owner may do anything with them.

use std::{
    collections::HashMap,
    io,
    time::{SystemTime, UNIX_EPOCH},
};

use ckpt_format::{
    keys::{Key, Keyrings, Keys, OfUser},
    process::{Processes, Thread},
};

use super::{Bone, Inconsistency, RebuildError, Skeleton, complete::outside};
use crate::{
    inject::{Batch, Done},
    sys::{identity, keys},
};

const GET_KEYRING: u64 = 0;
const JOIN_SESSION: u64 = 1;
const SET_PERMISSIONS: u64 = 5;
const LINK: u64 = 8;
const GET_PERSISTENT: u64 = 22;
const OF_THREAD: u64 = -1i64 as u64;
const OF_PROCESS: u64 = -2i64 as u64;
const OF_SESSION: u64 = -3i64 as u64;
const OF_USER: u64 = -4i64 as u64;
const OF_USER_SESSION: u64 = -5i64 as u64;
const SAME: u64 = u32::MAX as u64;

/// `KEY_POS_ALL`, `KEY_USR_ALL`
const ALL: u64 = 0x3f3f_0000;
/// `KEY_GRP_SEARCH`
const SEARCHED_BY_GROUP: u64 = 0x800;

/// Whose holders are: somebody who hardly has keys, of which each user may have two hundred.
const HOLDER_USER: u64 = 65_000;
/// How many of them one user has.
const HOLDERS_EACH: usize = 100;
const HOLDER: &str = "ferry";

/// The keys of a VE, made.
#[derive(Debug)]
pub(super) struct Made<'a> {
    all: &'a Keys,
    /// The number of each in [`Keys::keys`].
    serials: Vec<u64>,
    /// The one that has the holders.
    top: u64,
    /// The process keyrings, and those of threads.
    own: Vec<Own>,
}

/// A keyring that a thread has made for itself.
#[derive(Clone, Copy, Debug)]
struct Own {
    serial: u64,
    /// Which one it is to be.
    place: u32,
    /// Whose it is until then: the kernel gives it to whomever its thread becomes.
    user: u32,
}

/// Calls of a thread by which it gets its keyrings.
#[derive(Debug, Default)]
pub(super) struct Joining {
    /// What each of these must return.
    joined: Vec<(usize, u64)>,
    /// Those that return a new keyring, and which one it is to be.
    own: Vec<(usize, u32)>,
}

/// The group by which a session keyring is told from all others of its name.
fn searcher(place: usize) -> u64 {
    place as u64 + 2
}

/// That of the holders.
const TOP_SEARCHER: u64 = 1;

impl Skeleton {
    /// Makes all keys; `None` if there are none.
    pub(super) fn make_keys<'a>(
        &self,
        processes: &'a Processes,
    ) -> Result<Option<Made<'a>>, RebuildError> {
        let all = &processes.keys;
        if all.is_empty() {
            return Ok(None);
        }
        check(all)?;
        let init = self.bone(1)?;
        let layers = layers(all);
        let count = layers.iter().flatten().max().map_or(0, |last| last + 1);
        let mut maker =
            Maker { skeleton: self, init, batch: self.gate.batch(), results: Vec::new() };
        let top = maker.top()?;
        let holders = maker.holders(count)?;
        let mut sessions = all.threads.values().filter_map(|it| it.session).collect::<Vec<_>>();
        sessions.sort_unstable();
        let is_session = |place: usize| sessions.binary_search(&(place as u32)).is_ok();
        for (place, key) in all.keys.iter().enumerate() {
            let group = if is_session(place) { searcher(place) } else { key.group.into() };
            match (of_user(all, place), layers[place]) {
                (Some((kind, user)), _) => maker.keyring_of_user(kind, user)?,
                (None, Some(layer)) => maker.add(key, group, holders[layer])?,
                (None, None) => {}
            }
        }
        let serials = maker.done()?;
        for (place, (key, &serial)) in all.keys.iter().zip(&serials).enumerate() {
            maker.act_as(key.user.into(), key.group.into());
            if of_user(all, place).is_none() {
                let search = if is_session(place) { SEARCHED_BY_GROUP } else { 0 };
                maker.keyctl(&[SET_PERMISSIONS, serial, ALL | search])?;
            }
            for link in &key.links {
                // One of a user may be linked by the user alone.
                let linked = *link as usize;
                if of_user(all, linked).is_some() {
                    maker.act_as(all.keys[linked].user.into(), key.group.into());
                }
                maker.keyctl(&[LINK, serials[linked], serial])?;
            }
        }
        maker.act_as(0, 0);
        maker.done()?;
        Ok(Some(Made { all, serials, top, own: Vec::new() }))
    }

    /// Gives all keys their owners and permissions, now that all processes have them.
    pub(super) fn finish_keys(&self, made: &Made<'_>) -> Result<(), RebuildError> {
        let now_s = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |it| it.as_secs());
        let end = Finish { id_base: self.id_base, now_s: now_s.cast_signed() };
        let keys = &made.all.keys;
        let work = || {
            for (place, (key, &serial)) in keys.iter().zip(&made.serials).enumerate() {
                match of_user(made.all, place) {
                    None => end.finish(key, serial, key.user, key.group)?,
                    // The kernel has set these, and lets nobody change them.
                    Some((OfUser::Persistent, _)) => {}
                    Some(_) => end.finish(key, serial, key.user, u32::MAX)?,
                }
            }
            made.own.iter().try_for_each(|own| {
                let key = &keys[own.place as usize];
                end.finish(key, own.serial, own.user, key.group)
            })
        };
        // On a thread of its own, because it is somebody else afterwards.
        std::thread::scope(|scope| scope.spawn(work).join())
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
            .map_err(|source| outside(1, "finish its keys", source))
    }
}

/// What is done from outside, by the number of a key.
struct Finish {
    id_base: u32,
    now_s: i64,
}

impl Finish {
    /// `user` may do everything with the key so far; no group leaves it as it is.
    fn finish(&self, key: &Key, serial: u64, user: u32, group: u32) -> io::Result<()> {
        let serial = i32::try_from(serial).map_err(io::Error::other)?;
        let outside = |id: u32| self.id_base.saturating_add(id);
        identity::own_new_files(outside(user), outside(key.group))?;
        if group != u32::MAX {
            let user = if user == key.user { u32::MAX } else { outside(key.user) };
            keys::set_owner(serial, user, outside(group))?;
            identity::own_new_files(outside(key.user), outside(key.group))?;
        }
        if key.revoked {
            return keys::revoke(serial);
        }
        if key.expires_s != 0 {
            // What has expired meanwhile does so in a moment.
            let left = key.expires_s.saturating_sub(self.now_s).max(1);
            keys::set_timeout(serial, u32::try_from(left).unwrap_or(u32::MAX))?;
        }
        keys::set_permissions(serial, key.permissions)
    }
}

impl Made<'_> {
    /// Adds the calls by which a thread, as root of the VE, gets its keyrings. [`Self::joined`]
    /// looks at what they have returned.
    pub(super) fn join(&self, batch: &mut Batch, tid: i32) -> Joining {
        let mut joining = Joining::default();
        let Some(theirs) = self.all.threads.get(&tid) else { return joining };
        let own = [(theirs.process, OF_PROCESS), (theirs.thread, OF_THREAD)];
        if theirs.process.or(theirs.thread).is_some() {
            let call = join(batch, HOLDER.as_bytes(), TOP_SEARCHER, 1);
            joining.joined.push((call, self.top));
        }
        for (place, name) in own {
            let Some(place) = place else { continue };
            joining.own.push((keyctl(batch, &[GET_KEYRING, name, 1]), place));
            for link in &self.all.keys[place as usize].links {
                keyctl(batch, &[LINK, self.serials[*link as usize], name]);
            }
            // As its owner.
            set_ids(batch, 0, 0);
            keyctl(batch, &[SET_PERMISSIONS, name, ALL]);
        }
        if let Some(place) = theirs.session {
            let key = &self.all.keys[place as usize];
            // Not the owner: by its group.
            let user = if key.user == 1 { 2 } else { 1 };
            let call = join(batch, &key.description, searcher(place as usize), user);
            joining.joined.push((call, self.serials[place as usize]));
        }
        set_ids(batch, 0, 0);
        joining
    }

    /// Whether the keyrings were found that were meant: the kernel makes a new one otherwise.
    /// `thread` is who they belong to now.
    pub(super) fn joined(
        &mut self,
        done: &Done,
        joining: &Joining,
        thread: &Thread,
    ) -> io::Result<()> {
        let right = |&(call, serial): &(usize, u64)| done.result(call).ok() == Some(serial);
        if !joining.joined.iter().all(right) {
            return Err(io::ErrorKind::NotFound.into());
        }
        let is_process_keyring = |place: u32| {
            self.all.threads.get(&thread.tid).is_some_and(|theirs| theirs.process == Some(place))
        };
        let [.., file_system] = thread.credentials.users;
        for &(call, place) in &joining.own {
            let user = if is_process_keyring(place) { 0 } else { file_system };
            self.own.push(Own { serial: done.result(call)?, place, user });
        }
        Ok(())
    }
}

/// Calls of init.
struct Maker<'a> {
    skeleton: &'a Skeleton,
    init: &'a Bone,
    batch: Batch,
    /// The calls that are wanted: in how many batches before, and which.
    results: Vec<Wanted>,
}

/// A result that is there already, or the call that will give it.
enum Wanted {
    Result(u64),
    Call(usize),
}

impl Maker<'_> {
    /// The session keyring that keeps everything for now.
    fn top(&mut self) -> Result<u64, RebuildError> {
        self.as_user(HOLDER_USER, TOP_SEARCHER);
        let top = join(&mut self.batch, HOLDER.as_bytes(), TOP_SEARCHER, HOLDER_USER);
        self.results.push(Wanted::Call(top));
        self.keyctl(&[SET_PERMISSIONS, OF_SESSION, ALL | SEARCHED_BY_GROUP])?;
        self.as_user(0, 0);
        Ok(self.done()?[0])
    }

    /// Holders in it.
    fn holders(&mut self, count: usize) -> Result<Vec<u64>, RebuildError> {
        for holder in 0..count {
            let user = HOLDER_USER + (holder / HOLDERS_EACH) as u64;
            let description = holder.to_string().into_bytes();
            let key = Key { kind: "keyring".to_owned(), description, ..Key::default() };
            let key = Key { user: user as u32, ..key };
            self.add(&key, 0, OF_SESSION)?;
        }
        self.done()
    }

    fn add(&mut self, key: &Key, group: u64, into: u64) -> Result<(), RebuildError> {
        self.make_room(key.payload.len() + key.description.len())?;
        self.act_as(key.user.into(), group);
        let kind = self.batch.text(&key.kind);
        let description = self.batch.bytes(&[&key.description[..], &[0]].concat());
        // A revoked key holds nothing, but was not empty when it was made.
        let payload = if key.revoked && key.payload.is_empty() { &[0][..] } else { &key.payload };
        let (payload, len) = match key.kind.as_str() {
            "keyring" => (0, 0),
            _ => (self.batch.bytes(payload), payload.len() as u64),
        };
        let arguments = [kind, description, payload, len, into];
        let call = self.batch.call("add_key", libc::SYS_add_key, &arguments);
        self.results.push(Wanted::Call(call));
        Ok(())
    }

    /// One that the kernel gives a user who asks for it.
    fn keyring_of_user(&mut self, kind: OfUser, user: u32) -> Result<(), RebuildError> {
        self.make_room(0)?;
        let user = u64::from(user);
        let name = match kind {
            OfUser::User => OF_USER,
            OfUser::Session => OF_USER_SESSION,
            OfUser::Persistent => {
                let call = keyctl(&mut self.batch, &[GET_PERSISTENT, user, OF_SESSION]);
                self.results.push(Wanted::Call(call));
                return Ok(());
            }
        };
        self.as_user(user, 0);
        let call = keyctl(&mut self.batch, &[GET_KEYRING, name, 1]);
        self.results.push(Wanted::Call(call));
        self.as_user(0, 0);
        Ok(())
    }

    fn keyctl(&mut self, arguments: &[u64]) -> Result<(), RebuildError> {
        self.make_room(0)?;
        keyctl(&mut self.batch, arguments);
        Ok(())
    }

    /// Who owns what is made next.
    fn act_as(&mut self, user: u64, group: u64) {
        set_ids(&mut self.batch, user, group);
    }

    /// Who is asking: the real user, who is asked about neither capabilities nor files.
    fn as_user(&mut self, user: u64, group: u64) {
        self.batch.call("setresgid", libc::SYS_setresgid, &[group, SAME, SAME]);
        self.batch.call("setresuid", libc::SYS_setresuid, &[user, SAME, SAME]);
    }

    fn make_room(&mut self, len: usize) -> Result<(), RebuildError> {
        /// For which a batch that is not nearly full has room.
        const ROOM: usize = 8 << 10;
        if self.batch.is_nearly_full() || (len > ROOM && !self.batch.is_empty()) {
            self.run()?;
        }
        Ok(())
    }

    fn run(&mut self) -> Result<(), RebuildError> {
        let batch = std::mem::replace(&mut self.batch, self.skeleton.gate.batch());
        let failed = self.init.failed("make its keys");
        let done = batch.run(&self.init.thread)?;
        done.all().map_err(&failed)?;
        for wanted in &mut self.results {
            if let Wanted::Call(call) = *wanted {
                *wanted = Wanted::Result(done.value(call).map_err(&failed)?);
            }
        }
        Ok(())
    }

    /// What the wanted calls have returned.
    fn done(&mut self) -> Result<Vec<u64>, RebuildError> {
        self.run()?;
        let result = |wanted| match wanted {
            Wanted::Result(value) => value,
            Wanted::Call(_) => 0,
        };
        Ok(std::mem::take(&mut self.results).into_iter().map(result).collect())
    }
}

fn keyctl(batch: &mut Batch, arguments: &[u64]) -> usize {
    batch.call("keyctl", libc::SYS_keyctl, arguments)
}

/// Joins the session keyring with this name that this group may search.
fn join(batch: &mut Batch, name: &[u8], group: u64, user: u64) -> usize {
    set_ids(batch, user, group);
    let name = batch.bytes(&[name, &[0]].concat());
    keyctl(batch, &[JOIN_SESSION, name])
}

/// The user and group that keys are asked for and made as.
fn set_ids(batch: &mut Batch, user: u64, group: u64) {
    batch.call("setfsgid", libc::SYS_setfsgid, &[group]);
    batch.call("setfsuid", libc::SYS_setfsuid, &[user]);
}

fn of_user(all: &Keys, place: usize) -> Option<(OfUser, u32)> {
    let found = all.users.iter().find(|(.., theirs)| *theirs as usize == place);
    found.map(|&(kind, user, _)| (kind, user))
}

/// The holder of each key; none for those that the kernel makes.
fn layers(all: &Keys) -> Vec<Option<usize>> {
    let mut counts: HashMap<(&str, &[u8]), usize> = HashMap::new();
    let layer = |(place, key)| {
        let key: &Key = key;
        of_user(all, place).is_none().then(|| {
            let count = counts.entry((&key.kind, &key.description)).or_default();
            *count += 1;
            *count - 1
        })
    };
    all.keys.iter().enumerate().map(layer).collect()
}

/// Whether all places are there.
fn check(all: &Keys) -> Result<(), RebuildError> {
    let rings = |it: &Keyrings| [it.session, it.process, it.thread];
    let mut named = all.keys.iter().flat_map(|key| key.links.iter().copied());
    let mut held = all.threads.values().flat_map(rings).flatten();
    let mut theirs = all.users.iter().map(|(.., place)| *place);
    let is_wrong = |place: u32| place as usize >= all.keys.len();
    match named.find(|it| is_wrong(*it)).or(held.find(|it| is_wrong(*it))) {
        Some(place) => Err(Inconsistency::UnknownKey(place).into()),
        None => match theirs.find(|it| is_wrong(*it)) {
            Some(place) => Err(Inconsistency::UnknownKey(place).into()),
            None => Ok(()),
        },
    }
}
