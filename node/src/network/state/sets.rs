//! The sets of ipset(8), with the counters and remaining times of their entries.
//!
//! What the kernel tells of a set is what it takes. Rules refer to a set by its number, which is the
//! lowest that was free when it was made; so sets are made in the order of their numbers, and the
//! numbers between them are taken up meanwhile.

use std::time::{Duration, Instant};

use ckpt_format::network::{IpSet, Network};
use netlink_packet_core::{NLM_F_ACK, NLM_F_CREATE, NLM_F_DUMP, NLM_F_EXCL, NLM_F_REQUEST};

use super::attributes::{all, as_text, only, put, put_nested, put_text, text, value, without};
use crate::network::{
    netlink::{Netlink, NetlinkError},
    nftables::message,
};

/// `NFNL_SUBSYS_IPSET`.
const SUBSYSTEM: u16 = 6;
const CREATE: u16 = 2;
const DESTROY: u16 = 3;
const FLUSH: u16 = 4;
const LIST: u16 = 7;
const ADD: u16 = 9;

const PROTOCOL: u16 = 1;
const NAME: u16 = 2;
const TYPE: u16 = 3;
const REVISION: u16 = 4;
const FAMILY: u16 = 5;
const DATA: u16 = 7;
const ENTRIES: u16 = 8;
const LINE: u16 = 9;
const NUMBER: u16 = 11;
/// Counts of entries, of references and of bytes, which are told of a set.
const COUNTS: [u16; 3] = [24, 25, 26];

/// `struct nfgenmsg`.
const HEADER: usize = 4;
/// The version that tells the numbers of sets.
const VERSION: u8 = 7;
/// The kernel's own limit is one less.
const SETS_MAX: u16 = u16::MAX;
/// `IPSET_ERR_BUSY`.
const IN_USE: i32 = 4100;
/// How long the kernel may take to let go of a rule, and how often it is asked.
const PATIENCE: Duration = Duration::from_secs(2);
const PAUSE: Duration = Duration::from_micros(200);
/// What holds a number for a moment.
const PLACEHOLDER: &str = "ferry-placeholder-";

fn request(sequence: u32, kind: u16, flags: u16, attributes: &[u8]) -> Vec<u8> {
    let mut all = Vec::new();
    put(&mut all, PROTOCOL, &[VERSION]);
    all.extend(attributes);
    let mut bytes = Vec::new();
    let family = libc::AF_INET as u8;
    message(&mut bytes, SUBSYSTEM << 8 | kind, NLM_F_REQUEST | flags, sequence, family, 0, &all);
    bytes
}

fn change(
    netlink: &mut Netlink,
    what: &str,
    kind: u16,
    flags: u16,
    attributes: &[u8],
) -> Result<(), NetlinkError> {
    let sequence = netlink.next_sequence();
    netlink.exchange(what, &request(sequence, kind, NLM_F_ACK | flags, attributes), 1)
}

/// Reads all sets, in the order of their numbers.
pub(super) fn capture(netlink: &mut Netlink) -> Result<Vec<IpSet>, NetlinkError> {
    let list = |sequence| request(sequence, LIST, NLM_F_DUMP, &[]);
    let told = match netlink.bodies("list the sets of ipset", list) {
        // No ipset in this kernel: no sets.
        Err(error) if matches!(error.errno(), Some(libc::EOPNOTSUPP | libc::EINVAL)) => {
            return Ok(Vec::new());
        }
        told => told?,
    };
    let mut sets: Vec<IpSet> = Vec::new();
    for (_, body) in &told {
        let attributes = body.get(HEADER..).unwrap_or_default();
        let Some(name) = text(attributes, NAME) else { continue };
        // The first message about a set says what it is; all may have entries.
        if value(attributes, TYPE).is_some() {
            let number = value(attributes, NUMBER).and_then(|value| value.first_chunk());
            let mut settings = only(attributes, &[NAME, TYPE, REVISION, FAMILY]);
            let data = without(value(attributes, DATA).unwrap_or_default(), &COUNTS);
            put_nested(&mut settings, DATA, &as_taken(&data));
            sets.push(IpSet {
                name,
                number: number.map_or(0, |bytes| u16::from_be_bytes(*bytes)),
                settings,
                entries: Vec::new(),
            });
        }
        let mut entries = Vec::new();
        for (kind, entry) in all(value(attributes, ENTRIES).unwrap_or_default()) {
            put_nested(&mut entries, kind, &as_taken(entry));
        }
        if let Some(set) = sets.last_mut().filter(|_| !entries.is_empty()) {
            set.entries.push(entries.into());
        }
    }
    sets.sort_by_key(|set| set.number);
    Ok(sets)
}

/// What is told of a set or an entry, as it is taken: the kernel tells addresses without saying in
/// which order their bytes are, but wants to be told.
fn as_taken(told: &[u8]) -> Vec<u8> {
    /// First and last address, and those of a second pair.
    const ADDRESSES: [u16; 4] = [1, 2, 20, 22];
    const ORDER_OF_THE_NETWORK: u16 = 0x4000;
    let mut taken = Vec::new();
    for (kind, value) in all(told) {
        if !ADDRESSES.contains(&kind) {
            taken.extend(only(told, &[kind]));
            continue;
        }
        let mut address = Vec::new();
        for (family, bytes) in all(value) {
            put(&mut address, family | ORDER_OF_THE_NETWORK, bytes);
        }
        put_nested(&mut taken, kind, &address);
    }
    taken
}

/// Removes all sets. No rule may refer to one.
pub(super) fn remove(netlink: &mut Netlink) -> Result<(), NetlinkError> {
    // A set that is an entry of another one cannot be removed.
    let flushed = change(netlink, "empty the sets of ipset", FLUSH, 0, &[]);
    match flushed {
        Err(error) if matches!(error.errno(), Some(libc::EOPNOTSUPP | libc::EINVAL)) => {
            return Ok(());
        }
        result => result?,
    }
    let start = Instant::now();
    loop {
        match change(netlink, "remove the sets of ipset", DESTROY, 0, &[]) {
            // The kernel lets go of rules that are removed a little later.
            Err(error) if error.errno() == Some(IN_USE) && start.elapsed() < PATIENCE => {
                std::thread::sleep(PAUSE);
            }
            result => return result,
        }
    }
}

/// Makes the sets of a network that has none.
pub(super) fn rebuild(netlink: &mut Netlink, network: &Network) -> Result<(), NetlinkError> {
    let mut next = 0;
    for set in &network.ip_sets {
        if set.number < SETS_MAX {
            for number in next..set.number {
                make_placeholder(netlink, number)?;
            }
        }
        let what = format!("make the set {} of ipset", set.name);
        change(netlink, &what, CREATE, NLM_F_CREATE | NLM_F_EXCL, &set.settings)?;
        next = next.max(set.number.saturating_add(1));
    }
    let taken = |number: &u16| network.ip_sets.iter().any(|set| set.number == *number);
    for number in (0..next).filter(|number| !taken(number)) {
        let mut name = Vec::new();
        put_text(&mut name, NAME, &format!("{PLACEHOLDER}{number}"));
        change(netlink, "free the number of a set", DESTROY, 0, &name)?;
    }
    // Sets of sets have the others as their entries.
    let (lists, plain): (Vec<_>, Vec<_>) = network.ip_sets.iter().partition(|set| {
        value(&set.settings, TYPE).is_some_and(|kind| as_text(kind).starts_with("list:"))
    });
    for set in plain.into_iter().chain(lists) {
        for entries in &set.entries {
            let mut attributes = only(&set.settings, &[NAME]);
            put(&mut attributes, LINE, &0u32.to_ne_bytes());
            put_nested(&mut attributes, ENTRIES, entries);
            change(netlink, &format!("fill the set {} of ipset", set.name), ADD, 0, &attributes)?;
        }
    }
    Ok(())
}

fn make_placeholder(netlink: &mut Netlink, number: u16) -> Result<(), NetlinkError> {
    let mut attributes = Vec::new();
    put_text(&mut attributes, NAME, &format!("{PLACEHOLDER}{number}"));
    put_text(&mut attributes, TYPE, "list:set");
    put(&mut attributes, REVISION, &[0]);
    put(&mut attributes, FAMILY, &[0]);
    put_nested(&mut attributes, DATA, &[]);
    change(netlink, "hold the number of a set", CREATE, NLM_F_CREATE | NLM_F_EXCL, &attributes)
}
