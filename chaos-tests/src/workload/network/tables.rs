//! Tables as iptables-legacy, ip6tables-legacy and arptables-legacy make them.

use std::io;
use std::net::{Ipv4Addr, UdpSocket};
use std::os::fd::AsFd;
use std::time::Duration;

use ckpt_engine::sys::socket;
use ckpt_engine::sys::xtables::{self, FAMILIES, Family, Info};

use crate::workload::context::Context;
use crate::workload::outcome::{Failure, LATE, ensure, same};

const PAUSE: Duration = Duration::from_millis(5);
/// Datagrams to this address are dropped, and counted.
const LOST: Ipv4Addr = Ipv4Addr::new(127, 0, 0, 76);
const SEEN: Ipv4Addr = Ipv4Addr::new(127, 0, 0, 77);
/// Those to this one come to another port.
const TURNED: Ipv4Addr = Ipv4Addr::new(127, 0, 0, 78);
const TURNED_PORT: u16 = 9;

/// Verdicts as targets have them: the number and one less.
const DROP: i32 = -1;
const ACCEPT: i32 = -2;
const RETURN: i32 = -5;

/// The places of `NF_INET_LOCAL_IN` and `NF_INET_LOCAL_OUT`; of `NF_ARP_IN`.
const INPUT: usize = 1;
const OUTPUT: usize = 3;
const ARP_INPUT: usize = 0;

/// A table in the making.
struct Draft {
    family: Family,
    entries: Vec<u8>,
    count: u32,
}

/// A match or a target: `struct xt_entry_match`, and what it keeps.
fn part(name: &str, data: &[u8]) -> Vec<u8> {
    let len = (32 + data.len()).next_multiple_of(8);
    let mut bytes = u16::try_from(len).unwrap_or(0).to_ne_bytes().to_vec();
    bytes.extend(name.as_bytes());
    bytes.resize(32, 0);
    bytes.extend(data);
    bytes.resize(len, 0);
    bytes
}

fn verdict(number: i32) -> Vec<u8> {
    part("", &number.to_ne_bytes())
}

impl Draft {
    fn new(family: Family) -> Self {
        Self { family, entries: Vec::new(), count: 0 }
    }

    /// Adds a rule, and tells where it is.
    fn rule(&mut self, packets: &[u8], matches: &[Vec<u8>], target: &[u8]) -> u32 {
        let at = self.entries.len();
        let mut entry = packets.to_vec();
        entry.resize(self.family.matches_at, 0);
        entry.extend(matches.iter().flatten());
        let target_at = entry.len();
        entry.extend(target);
        for (place, value) in [(0, target_at), (2, entry.len())] {
            let place = self.family.target_at + place;
            let value = u16::try_from(value).unwrap_or(0).to_ne_bytes();
            entry[place..place + 2].copy_from_slice(&value);
        }
        self.entries.extend(entry);
        self.count += 1;
        u32::try_from(at).unwrap_or(0)
    }

    /// The beginning of a chain of its own, or the end of all.
    fn mark(&mut self, name: &str) {
        let mut data = name.as_bytes().to_vec();
        data.resize(32, 0);
        self.rule(&[], &[], &part("ERROR", &data));
    }

    fn make(mut self, name: &str, hooks: &[(usize, u32, u32)]) -> Result<(), Failure> {
        self.mark("ERROR");
        let mut info = Info {
            valid_hooks: 0,
            hook_entries: vec![0; self.family.hooks],
            underflows: vec![0; self.family.hooks],
            count: self.count,
        };
        for &(hook, entry, policy) in hooks {
            info.valid_hooks |= 1 << hook;
            info.hook_entries[hook] = entry;
            info.underflows[hook] = policy;
        }
        let socket = open(self.family)?;
        Ok(xtables::replace(socket.as_fd(), self.family, name, &info, &self.entries)?)
    }
}

fn open(family: Family) -> io::Result<std::os::fd::OwnedFd> {
    socket::socket(family.domain, libc::SOCK_RAW, libc::IPPROTO_RAW)
}

/// `struct ipt_ip`: datagrams to this address.
fn datagrams_to(address: Ipv4Addr) -> Vec<u8> {
    let mut packets = vec![0; 84];
    packets[4..8].copy_from_slice(&address.octets());
    packets[12..16].fill(0xff);
    packets[80..82].copy_from_slice(&(libc::IPPROTO_UDP as u16).to_ne_bytes());
    packets
}

/// Chains of `filter`: two of its own, one in the other, a comment, a user, and a limit that is never
/// met.
fn make_filter(v4: Family) -> Result<(), Failure> {
    // Where things are does not depend on where a rule leads.
    let draft = |inner: i32, outer: i32| {
        let mut draft = Draft::new(v4);
        let input = draft.rule(&datagrams_to(LOST), &[], &verdict(outer));
        let policy = draft.rule(&[], &[], &verdict(ACCEPT));
        let forward = draft.rule(&[], &[], &verdict(ACCEPT));
        // struct xt_owner_match_info of its first revision: what this user sends.
        let mut owner = part("owner", &[1000u32, 1000, 0, 0, 1, 0].map(u32::to_ne_bytes).concat());
        owner[31] = 1;
        let output = draft.rule(&[], &[owner], &verdict(ACCEPT));
        let last = draft.rule(&[], &[], &verdict(ACCEPT));
        draft.mark("outer");
        let mut comment = b"they are lost".to_vec();
        comment.resize(256, 0);
        let outer = draft.rule(&[], &[part("comment", &comment)], &verdict(inner));
        draft.rule(&[], &[], &verdict(RETURN));
        draft.mark("inner");
        // struct xt_rateinfo: a hundred thousand a second.
        let mut limit = [100u32.to_ne_bytes(), 100_000u32.to_ne_bytes()].concat();
        limit.resize(40, 0);
        let inner = draft.rule(&[], &[part("limit", &limit)], &verdict(DROP));
        draft.rule(&[], &[], &verdict(RETURN));
        let hooks = [(INPUT, input, policy), (2, forward, forward), (OUTPUT, output, last)];
        (draft, hooks, inner, outer)
    };
    let (_, _, inner, outer) = draft(0, 0);
    let (draft, hooks, ..) = draft(inner.cast_signed(), outer.cast_signed());
    draft.make("filter", &hooks)
}

/// `nat`, which turns datagrams to one address to a port.
fn make_nat(v4: Family, port: u16) -> Result<(), Failure> {
    let mut draft = Draft::new(v4);
    // struct nf_nat_ipv4_multi_range_compat: one range, of a port.
    let mut range = [1u32.to_ne_bytes(), 2u32.to_ne_bytes(), [0; 4], [0; 4]].concat();
    range.extend([port.to_be_bytes(), port.to_be_bytes()].concat());
    let before = draft.rule(&[], &[], &verdict(ACCEPT));
    let input = draft.rule(&[], &[], &verdict(ACCEPT));
    let output = draft.rule(&datagrams_to(TURNED), &[], &part("REDIRECT", &range));
    let policy = draft.rule(&[], &[], &verdict(ACCEPT));
    let after = draft.rule(&[], &[], &verdict(ACCEPT));
    let hooks = [(0, before, before), (1, input, input), (3, output, policy), (4, after, after)];
    draft.make("nat", &hooks)
}

/// A rule each of ip6tables and arptables that nothing meets.
fn make_others(v6: Family, arp: Family) -> Result<(), Failure> {
    let mut draft = Draft::new(v6);
    // struct ip6t_ip6: to one address.
    let mut packets = vec![0; 136];
    packets[16..32].copy_from_slice(&std::net::Ipv6Addr::from(0x2001_0db8 << 96 | 76).octets());
    packets[48..64].fill(0xff);
    let input = draft.rule(&packets, &[], &verdict(DROP));
    let policy = draft.rule(&[], &[], &verdict(ACCEPT));
    let forward = draft.rule(&[], &[], &verdict(DROP));
    let output = draft.rule(&[], &[], &verdict(ACCEPT));
    let hooks = [(INPUT, input, policy), (2, forward, forward), (OUTPUT, output, output)];
    draft.make("filter", &hooks)?;
    let mut draft = Draft::new(arp);
    // struct arpt_arp: about one address.
    let mut packets = vec![0; 164];
    packets[4..8].copy_from_slice(&[192, 0, 2, 76]);
    packets[12..16].fill(0xff);
    let input = draft.rule(&packets, &[], &verdict(DROP));
    let policy = draft.rule(&[], &[], &verdict(ACCEPT));
    let output = draft.rule(&[], &[], &verdict(ACCEPT));
    let forward = draft.rule(&[], &[], &verdict(ACCEPT));
    let hooks = [(ARP_INPUT, input, policy), (1, output, output), (2, forward, forward)];
    draft.make("filter", &hooks)
}

/// A table without its counters.
type Seen = (Info, Vec<u8>);

/// A table, and how many packets its rules have counted.
fn look(family: Family, name: &str) -> Result<(Seen, Vec<u64>), Failure> {
    let socket = open(family)?;
    let (info, size) = xtables::info(socket.as_fd(), family, name)?;
    let mut entries = xtables::entries(socket.as_fd(), family, name, size)?;
    let (mut at, mut packets) = (0, Vec::new());
    while at < entries.len() {
        let counters = at + family.counters_at;
        let number = entries[counters..].first_chunk().copied().unwrap_or_default();
        packets.push(u64::from_ne_bytes(number));
        entries[counters..counters + 16].fill(0);
        let next = at + family.target_at + 2;
        at += usize::from(u16::from_ne_bytes([entries[next], entries[next + 1]]));
    }
    Ok(((info, entries), packets))
}

pub(super) fn run(context: &mut Context) -> Result<(), Failure> {
    super::stand_apart()?;
    let [v4, v6, arp] = FAMILIES;
    let seen = UdpSocket::bind((SEEN, 0))?;
    let lost = UdpSocket::bind((LOST, seen.local_addr()?.port()))?;
    seen.set_read_timeout(Some(LATE))?;
    lost.set_nonblocking(true)?;
    let port = seen.local_addr()?.port();
    // What is turned goes to the address of the loopback device.
    let turned = UdpSocket::bind((Ipv4Addr::LOCALHOST, port))?;
    turned.set_read_timeout(Some(LATE))?;
    make_filter(v4)?;
    make_nat(v4, port)?;
    make_others(v6, arp)?;
    let tables = [(v4, "filter"), (v4, "nat"), (v6, "filter"), (arp, "filter")];
    let looks = || -> Result<Vec<_>, Failure> {
        tables.iter().map(|(family, name)| Ok(look(*family, name)?.0)).collect()
    };
    let before = looks()?;
    let sender = UdpSocket::bind((SEEN, 0))?;
    let mut sent = 0u64;
    while context.step(PAUSE)? {
        let text = sent.to_ne_bytes();
        sender.send_to(&text, (LOST, port))?;
        sent += 1;
        if context.progress.plant() {
            sender.send_to(&text, (LOST, port))?;
        }
        sender.send_to(&text, (SEEN, port))?;
        sender.send_to(&text, (TURNED, TURNED_PORT))?;
        for (socket, what) in [(&seen, "a datagram"), (&turned, "a datagram for another port")] {
            let mut got = [0; 16];
            let count = socket.recv(&mut got)?;
            same(what, &got[..count], &text[..])?;
        }
        let arrived = lost.recv(&mut [0; 16]);
        ensure(arrived.is_err(), || "a datagram was not dropped".to_owned())?;
        let now = looks()?;
        same("tables", &now, &before)?;
        // The first rule of INPUT, and where it leads.
        let counted = look(v4, "filter")?.1;
        let counted = [0, 6, 9].map(|rule| counted.get(rule).copied());
        same("counters", counted, [Some(sent); 3])?;
    }
    Ok(())
}
