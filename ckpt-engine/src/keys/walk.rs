//! From keyrings to all that they hold.

use std::{collections::HashMap, io};

use serde::{Deserialize, Serialize};

use crate::{btf::Types, look::Look};

/// More keys than any VE may have, each of whose users has a quota.
const KEYS_MAX: usize = 1 << 16;
/// How many links a node of the tree in a keyring has (`ASSOC_ARRAY_FAN_OUT`).
const FAN_OUT: usize = 16;
/// Bits in an address within the tree: something of the tree, not a key; a shortcut, not a node.
/// In that of a key the second says that it is a keyring.
const META: u64 = 1;
const SHORTCUT: u64 = 2;
/// `KEY_FLAG_DEAD`, `KEY_FLAG_INVALIDATED`
const GONE: u64 = 1 << 0 | 1 << 5;
/// `KEY_FLAG_REVOKED`
const REVOKED: u64 = 1 << 1;

/// Where things are in the structures of the running kernel.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Places {
    /// In a user namespace: the keyrings in which it keeps those of users.
    pub(super) registers: Vec<u32>,
    key: u32,
    user: u32,
    group: u32,
    permissions: u32,
    expiry: u32,
    state: u32,
    flags: u32,
    kind: u32,
    description: u32,
    description_len: u32,
    payload: u32,
    tree: u32,
    restriction: u32,
    kind_name: u32,
    slots: u32,
    next_node: u32,
    payload_len: u32,
    payload_data: u32,
}

impl Places {
    pub(crate) fn find(types: &Types) -> io::Result<Self> {
        let key = |member| types.offset("key", member);
        // Whether there are persistent keyrings is an option of the kernel.
        let persistent = types.offset("user_namespace", "persistent_keyring_register").ok();
        let of_users = types.offset("user_namespace", "user_keyring_register")?;
        Ok(Self {
            registers: std::iter::once(of_users).chain(persistent).collect(),
            key: types.size("key")?,
            user: key("uid")?,
            group: key("gid")?,
            permissions: key("perm")?,
            expiry: key("expiry")?,
            state: key("state")?,
            flags: key("flags")?,
            kind: key("type")?,
            description: key("description")?,
            description_len: key("index_key")? + types.offset("keyring_index_key", "desc_len")?,
            payload: key("payload")?,
            tree: key("keys")? + types.offset("assoc_array", "root")?,
            restriction: key("restrict_link")?,
            kind_name: types.offset("key_type", "name")?,
            slots: types.offset("assoc_array_node", "slots")?,
            next_node: types.offset("assoc_array_shortcut", "next_node")?,
            payload_len: types.offset("user_key_payload", "datalen")?,
            payload_data: types.offset("user_key_payload", "data")?,
        })
    }

    /// How many bytes of a key are looked at.
    pub(super) fn len(&self) -> usize {
        self.key as usize
    }

    pub(super) fn is_empty_keyring(&self, key: &[u8]) -> bool {
        long(key, self.tree) == 0
    }

    /// What a keyring holds: the addresses of keys.
    pub(super) fn links(&self, look: &Look, keyring: &[u8]) -> io::Result<Vec<u64>> {
        let mut links = Vec::new();
        let mut inner = vec![long(keyring, self.tree)];
        while !inner.is_empty() {
            inner.retain(|it| *it != 0);
            let (shortcuts, nodes): (Vec<u64>, Vec<u64>) =
                inner.drain(..).partition(|it| it & SHORTCUT != 0);
            let at =
                |it: &u64, member: u32, len| ((it & !(META | SHORTCUT)) + u64::from(member), len);
            let shortcuts: Vec<_> = shortcuts.iter().map(|it| at(it, self.next_node, 8)).collect();
            inner.extend(look.at(&shortcuts)?.iter().map(|bytes| number(bytes)));
            let nodes: Vec<_> = nodes.iter().map(|it| at(it, self.slots, 8 * FAN_OUT)).collect();
            for node in look.at(&nodes)? {
                let slots = node.chunks_exact(8).map(number);
                let (deeper, keys): (Vec<u64>, Vec<u64>) = slots.partition(|it| it & META != 0);
                inner.extend(deeper);
                links.extend(keys.into_iter().map(|key| key & !SHORTCUT).filter(|key| *key != 0));
            }
            if links.len() + inner.len() > KEYS_MAX {
                return Err(io::ErrorKind::InvalidData.into());
            }
        }
        Ok(links)
    }
}

/// A key as the kernel keeps it, with ids as the host numbers them.
#[derive(Debug)]
pub(super) struct Seen {
    pub(super) kind: String,
    pub(super) description: Vec<u8>,
    pub(super) user: u32,
    pub(super) group: u32,
    pub(super) permissions: u32,
    pub(super) expires_s: i64,
    pub(super) revoked: bool,
    pub(super) restricted: bool,
    pub(super) payload: Vec<u8>,
    pub(super) links: Vec<u64>,
}

/// All keys that are reached from some keyrings.
#[derive(Debug, Default)]
pub(super) struct Walk {
    pub(super) seen: Vec<Seen>,
    /// Their places in it, by their addresses.
    pub(super) places: HashMap<u64, u32>,
}

impl Walk {
    pub(super) fn from(look: &Look, at: &Places, roots: Vec<u64>) -> io::Result<Self> {
        let mut walk = Self::default();
        let mut names = HashMap::new();
        let mut coming = roots;
        while !coming.is_empty() {
            coming.sort_unstable();
            coming.dedup();
            coming.retain(|address| !walk.places.contains_key(address));
            let keys = look.at(&each(&coming, at.len()))?;
            let found: Vec<_> = std::mem::take(&mut coming).into_iter().zip(keys).collect();
            // Neither those that are about to go nor those that stand for a failed search.
            let lives =
                |key: &[u8]| long(key, at.flags) & GONE == 0 && word(key, at.state) as i16 == 1;
            let found: Vec<_> = found.into_iter().filter(|(_, key)| lives(key)).collect();
            for (address, seen) in describe(look, at, found, &mut names)? {
                coming.extend(&seen.links);
                let place = u32::try_from(walk.seen.len()).map_err(io::Error::other)?;
                walk.places.insert(address, place);
                walk.seen.push(seen);
            }
            if walk.seen.len() + coming.len() > KEYS_MAX {
                return Err(io::ErrorKind::InvalidData.into());
            }
        }
        Ok(walk)
    }
}

/// What keys are like, from what is kept about them.
fn describe(
    look: &Look,
    at: &Places,
    found: Vec<(u64, Vec<u8>)>,
    names: &mut HashMap<u64, String>,
) -> io::Result<Vec<(u64, Seen)>> {
    let kinds = found.iter().map(|(_, key)| long(key, at.kind));
    let mut unknown: Vec<u64> = kinds.filter(|kind| !names.contains_key(kind)).collect();
    unknown.sort_unstable();
    unknown.dedup();
    let kinds: Vec<_> = unknown.iter().map(|kind| (kind + u64::from(at.kind_name), 8)).collect();
    let texts: Vec<_> = look.at(&kinds)?.iter().map(|it| (number(it), NAME)).collect();
    for (kind, name) in unknown.into_iter().zip(look.at(&texts)?) {
        let name = name.split(|byte| *byte == 0).next().unwrap_or_default();
        names.insert(kind, String::from_utf8_lossy(name).into_owned());
    }
    let name = |key: &[u8]| names.get(&long(key, at.kind)).cloned().unwrap_or_default();
    let is_revoked = |key: &[u8]| long(key, at.flags) & REVOKED != 0;
    // One that was revoked holds nothing any more.
    let holds = |key: &[u8]| {
        let payload = long(key, at.payload);
        matches!(name(key).as_str(), "user" | "logon") && !is_revoked(key) && payload != 0
    };
    let descriptions = found
        .iter()
        .map(|(_, key)| (long(key, at.description), word(key, at.description_len) as u16 as usize));
    let lens = found.iter().filter(|(_, key)| holds(key));
    let lens = lens.map(|(_, key)| (long(key, at.payload) + u64::from(at.payload_len), 2));
    let read = look.at(&descriptions.chain(lens).collect::<Vec<_>>())?;
    let (descriptions, lens) = read.split_at(found.len());
    let payloads = found.iter().filter(|(_, key)| holds(key)).zip(lens).map(|((_, key), len)| {
        (long(key, at.payload) + u64::from(at.payload_data), number(len) as usize)
    });
    let mut payloads = look.at(&payloads.collect::<Vec<_>>())?.into_iter();
    let mut described = Vec::with_capacity(found.len());
    for ((address, key), description) in found.iter().zip(descriptions) {
        let kind = name(key);
        let expires_s = long(key, at.expiry).cast_signed();
        let links = match kind == "keyring" && !is_revoked(key) {
            true => at.links(look, key)?,
            false => Vec::new(),
        };
        let seen = Seen {
            description: description.clone(),
            user: word(key, at.user),
            group: word(key, at.group),
            permissions: word(key, at.permissions),
            // Never was 0 before Linux 6.8, and is the end of time since.
            expires_s: if expires_s == i64::MAX { 0 } else { expires_s },
            revoked: is_revoked(key),
            restricted: long(key, at.restriction) != 0,
            payload: if holds(key) { payloads.next().unwrap_or_default() } else { Vec::new() },
            links,
            kind,
        };
        described.push((*address, seen));
    }
    Ok(described)
}

/// How much of the name of a type is looked at.
const NAME: usize = 24;

/// The same number of bytes at each of these addresses.
pub(super) fn each(addresses: &[u64], len: usize) -> Vec<(u64, usize)> {
    addresses.iter().map(|address| (*address, len)).collect()
}

fn long(bytes: &[u8], at: u32) -> u64 {
    bytes.get(at as usize..).map_or(0, number)
}

fn word(bytes: &[u8], at: u32) -> u32 {
    long(bytes, at) as u32
}

/// Up to eight bytes, little-endian.
pub(super) fn number(bytes: &[u8]) -> u64 {
    let mut word = [0; 8];
    let len = bytes.len().min(8);
    word[..len].copy_from_slice(&bytes[..len]);
    u64::from_le_bytes(word)
}
