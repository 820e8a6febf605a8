//! Sets of ipset, and a rule of the packet filter that looks into one.

use std::net::{Ipv4Addr, UdpSocket};
use std::time::{Duration, Instant};

use super::wire::{Attributes, Wire};
use crate::workload::context::Context;
use crate::workload::outcome::{Failure, LATE, ensure, same};

const PAUSE: Duration = Duration::from_millis(5);
const SETS: u16 = 6 << 8;
const TABLES: u16 = 10 << 8;
/// Make it, and tell whether it was made.
const MAKE: u16 = 0x600 | 4;
const MAKE_RULE: u16 = 0xc00 | 4;
/// Datagrams to this address are dropped.
const LOST: Ipv4Addr = Ipv4Addr::new(127, 0, 0, 66);
const SEEN: Ipv4Addr = Ipv4Addr::new(127, 0, 0, 67);
/// How long the entry for it stays, in seconds.
const TIME: u32 = 5000;

const TIMEOUT: u16 = 6;
const PACKETS: u16 = 25;

/// A request about sets: protocol, name, and more.
fn about(name: &str, more: Attributes) -> Vec<u8> {
    let head = Attributes::default().with(1, &[7]).text(2, name);
    [vec![2, 0, 0, 0], head.0, more.0].concat()
}

fn create(
    name: &str,
    kind: &str,
    revision: u8,
    family: u8,
    data: Attributes,
) -> (u16, u16, Vec<u8>) {
    let more =
        Attributes::default().text(3, kind).with(4, &[revision]).with(5, &[family]).nested(7, data);
    (SETS | 2, MAKE, about(name, more))
}

fn add(name: &str, data: Attributes) -> (u16, u16, Vec<u8>) {
    (SETS | 9, 4, about(name, Attributes::default().nested(7, data)))
}

fn big(value: u32) -> [u8; 4] {
    value.to_be_bytes()
}

/// An address, as the first attribute of an entry. Numbers are in the order of the network.
fn address(ip: Ipv4Addr) -> Attributes {
    const ORDER: u16 = 0x4000;
    Attributes::default().nested(1, Attributes::default().with(1 | ORDER, &ip.octets()))
}

fn number(attributes: Attributes, kind: u16, value: u32) -> Attributes {
    const ORDER: u16 = 0x4000;
    attributes.with(kind | ORDER, &big(value))
}

fn make_sets(wire: &Wire) -> Result<(), Failure> {
    const COUNTERS_AND_COMMENTS: u32 = 0x8 | 0x10;
    let flags = |data| number(data, 8, COUNTERS_AND_COMMENTS);
    let timed = number(flags(Attributes::default()), TIMEOUT, TIME);
    let ports = Attributes::default();
    let ports = ports.with(4 | 0x4000, &1000u16.to_be_bytes());
    let ports = ports.with(5 | 0x4000, &2000u16.to_be_bytes());
    wire.batch(&[create("ports", "bitmap:port", 0, 0, ports)])?;
    // It leaves a number free.
    wire.batch(&[create("gone", "list:set", 0, 0, Attributes::default())])?;
    wire.batch(&[create("addresses", "hash:ip", 4, 2, timed)])?;
    wire.batch(&[create("nets", "hash:net", 6, 2, Attributes::default())])?;
    wire.batch(&[create("all", "list:set", 0, 0, number(Attributes::default(), 23, 8))])?;
    wire.batch(&[(SETS | 3, 4, about("gone", Attributes::default()))])?;
    let lost = number(address(LOST), TIMEOUT, TIME).text(26, "lost for ever");
    wire.batch(&[add("addresses", lost)])?;
    for host in 100..200 {
        let other = Ipv4Addr::new(10, 9, 8, host);
        wire.batch(&[add("addresses", number(address(other), TIMEOUT, 0))])?;
    }
    wire.batch(&[add("nets", address(Ipv4Addr::new(10, 7, 0, 0)).with(3, &[16]))])?;
    let but = address(Ipv4Addr::new(10, 7, 7, 0)).with(3, &[24]);
    // IPSET_FLAG_NOMATCH.
    wire.batch(&[add("nets", number(but, 8, 0x4))])?;
    for port in [1024u16, 1999] {
        wire.batch(&[add("ports", Attributes::default().with(4 | 0x4000, &port.to_be_bytes()))])?;
    }
    // In this order.
    for member in ["nets", "addresses"] {
        wire.batch(&[add("all", Attributes::default().text(18, member))])?;
    }
    Ok(())
}

/// A rule that drops what goes to an address in the set with this number.
fn make_rule(wire: &Wire, set: u16) -> Result<(), Failure> {
    let of = |family: u8, attributes: Attributes| [vec![family, 0, 0, 0], attributes.0].concat();
    let expression = |name: &str, data| {
        Attributes::default().nested(1, Attributes::default().text(1, name).nested(2, data))
    };
    let table = Attributes::default().text(1, "made");
    let hook = Attributes::default().with(1, &big(3)).with(2, &big(0));
    let chain = table.clone().text(3, "out").nested(4, hook).text(7, "filter");
    // struct xt_set_info, padded: number, dimensions, which address.
    let mut info = set.to_ne_bytes().to_vec();
    info.extend([1, 0, 0, 0, 0, 0]);
    let matches = Attributes::default().text(1, "set").with(2, &big(1)).with(3, &info);
    let code = Attributes::default().nested(2, Attributes::default().with(1, &big(0)));
    let drop = Attributes::default().with(1, &big(0)).nested(2, code);
    let both = [expression("match", matches).0, expression("immediate", drop).0].concat();
    let rule = table.clone().text(2, "out").nested(4, Attributes(both));
    let around = |kind| (kind, 0, vec![0, 0, 0, 10]);
    wire.batch(&[
        around(0x10),
        (TABLES, MAKE, of(2, table)),
        (TABLES | 3, MAKE, of(2, chain)),
        (TABLES | 6, MAKE_RULE, of(2, rule)),
        around(0x11),
    ])
}

/// The first attribute of a kind.
fn find(mut bytes: &[u8], wanted: u16) -> Option<&[u8]> {
    loop {
        let length = usize::from(u16::from_ne_bytes([*bytes.first()?, *bytes.get(1)?]));
        let kind = u16::from_ne_bytes([*bytes.get(2)?, *bytes.get(3)?]) & 0x3fff;
        let value = bytes.get(4..length)?;
        if kind == wanted {
            return Some(value);
        }
        bytes = bytes.get(length.next_multiple_of(4)..)?;
    }
}

/// Attributes, each with its kind.
type Told = Vec<(u16, Vec<u8>)>;

/// All attributes.
fn all(mut bytes: &[u8]) -> Told {
    let mut found = Vec::new();
    while bytes.len() >= 4 {
        let length = usize::from(u16::from_ne_bytes([bytes[0], bytes[1]])).max(4);
        let kind = u16::from_ne_bytes([bytes[2], bytes[3]]) & 0x3fff;
        found.push((kind, bytes.get(4..length).unwrap_or_default().to_vec()));
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    found
}

/// What the sets are, and what is in them but counts and times; and those of the one entry that is
/// used.
#[derive(Debug, PartialEq, Eq)]
struct Seen {
    sets: Vec<(Vec<u8>, Told)>,
    entries: Vec<Told>,
}

fn look(wire: &Wire) -> Result<(Seen, u64, u32), Failure> {
    /// Bytes, packets; entries and bytes of the kernel of a set.
    const COUNTS: [u16; 4] = [TIMEOUT, 24, PACKETS, 26];
    let request = [vec![2, 0, 0, 0], Attributes::default().with(1, &[7]).0].concat();
    let (mut packets, mut time) = (0, 0);
    let mut seen = Seen { sets: Vec::new(), entries: Vec::new() };
    for body in wire.list(SETS | 7, &request)? {
        let attributes = &body[4..];
        let name = find(attributes, 2).unwrap_or_default().to_vec();
        if let Some(data) = find(attributes, 7) {
            let mut what = all(data);
            what.retain(|(kind, _)| *kind != 26);
            what.extend(
                [3, 5, 11].map(|kind| (kind, find(attributes, kind).unwrap_or_default().to_vec())),
            );
            seen.sets.push((name.clone(), what));
        }
        for (_, entry) in all(find(attributes, 8).unwrap_or_default()) {
            let ip = find(&entry, 1).and_then(|ip| find(ip, 1)).unwrap_or_default();
            if name.starts_with(b"addresses") && ip == LOST.octets() {
                let value = find(&entry, PACKETS).and_then(|value| value.first_chunk());
                packets = value.map_or(0, |value| u64::from_be_bytes(*value));
                let value = find(&entry, TIMEOUT).and_then(|value| value.first_chunk());
                time = value.map_or(0, |value| u32::from_be_bytes(*value));
            }
            let mut entry = all(&entry);
            let comment = entry.iter().find(|(kind, _)| *kind == 26).cloned();
            entry.retain(|(kind, _)| !COUNTS.contains(kind));
            entry.extend(comment);
            entry.push((2, name.clone()));
            seen.entries.push(entry);
        }
    }
    // A hash has no order that means anything; that of a list of sets is told apart below.
    let list: Vec<_> = seen
        .entries
        .iter()
        .filter(|entry| entry.iter().any(|(kind, _)| *kind == 18))
        .cloned()
        .collect();
    seen.entries.sort();
    seen.entries.extend(list);
    Ok((seen, packets, time))
}

pub(super) fn run(context: &mut Context) -> Result<(), Failure> {
    super::stand_apart()?;
    let wire = Wire::open_filter()?;
    make_sets(&wire)?;
    // The third set, and the second is gone.
    make_rule(&wire, 2)?;
    let start = Instant::now();
    let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0))?;
    let before = look(&wire)?.0;
    same("entries of sets", before.entries.len(), 1 + 100 + 2 + 2 + 2 + 2)?;
    let mut sent = 0;
    while context.step(PAUSE)? {
        socket.send_to(b"seen", (SEEN, 9))?;
        let refused =
            socket.send_to(b"lost", (LOST, 9)).err().and_then(|error| error.raw_os_error());
        same("what is sent to an address in a set", refused, Some(libc::EPERM))?;
        sent += 1;
        let (now, packets, time) = look(&wire)?;
        same("sets", now, Seen { sets: before.sets.clone(), entries: before.entries.clone() })?;
        same("packets that an entry has counted", packets, sent)?;
        let gone = start.elapsed().as_secs();
        let left = u64::from(TIME).saturating_sub(gone);
        ensure(
            u64::from(time) <= left + 1 + LATE.as_secs() && u64::from(time) + 60 >= left,
            || format!("an entry stays for {time} s and should for {left} s"),
        )?;
        if context.progress.plant() {
            wire.batch(&[(
                SETS | 10,
                4,
                about(
                    "nets",
                    Attributes::default()
                        .nested(7, address(Ipv4Addr::new(10, 7, 0, 0)).with(3, &[16])),
                ),
            )])?;
        }
    }
    let of = |attributes: Attributes| [vec![2, 0, 0, 0], attributes.0].concat();
    let around = |kind| (kind, 0, vec![0, 0, 0, 10]);
    let table = (TABLES | 2, 4, of(Attributes::default().text(1, "made")));
    wire.batch(&[around(0x10), table, around(0x11)])?;
    let gone = Instant::now();
    for set in ["all", "nets", "addresses", "ports"] {
        // The kernel lets go of a rule that is removed a little later.
        while let Err(failure) = wire.batch(&[(SETS | 3, 4, about(set, Attributes::default()))]) {
            if gone.elapsed() > LATE {
                return Err(failure);
            }
            std::thread::yield_now();
        }
    }
    Ok(())
}
