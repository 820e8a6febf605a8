//! The packet filter: tables, chains, sets and rules of nftables, with counters, and the flows that
//! it keeps track of.
//!
//! What the kernel tells is what it takes: an answer becomes a request when the numbers that only
//! one kernel has are left out. So every expression travels that the kernel knows, and no rule is
//! understood here. The order is that of their references: a rule may jump to any chain and look
//! into any set.

use std::io;

use ckpt_engine::sys::netns::Netns;
use ckpt_format::network::{FilterPart, IpSet, Network};
use netlink_packet_core::{NLM_F_ACK, NLM_F_APPEND, NLM_F_CREATE, NLM_F_DUMP, NLM_F_REQUEST};
use nix::sys::socket::SockProtocol;

use super::{
    attributes::{self, only, put, without},
    flows, sets, tables,
};
use crate::network::{
    NetworkError,
    netlink::{Netlink, NetlinkError},
    nftables::{BATCH_BEGIN, BATCH_END, SUBSYSTEM, message},
    system,
};

/// `NFNL_SUBSYS_CTNETLINK`.
const FLOWS: u16 = 1;
/// `struct nfgenmsg`.
const FAMILY: usize = 4;
/// How much goes into one batch of flows, in messages.
const FLOWS_AT_ONCE: usize = 200;

/// One kind of object: the messages that list and make it, and the attributes left out.
struct Object {
    get: u16,
    new: u16,
    /// Counts of users, handles, owners, positions: of one kernel only.
    left_out: &'static [u16],
}

const TABLES: Object = Object { get: 1, new: 0, left_out: &[3, 4, 7] };
const CHAINS: Object = Object { get: 4, new: 3, left_out: &[2, 6] };
const STATEFUL: Object = Object { get: 19, new: 18, left_out: &[5, 6] };
const FLOW_TABLES: Object = Object { get: 23, new: 22, left_out: &[4, 5] };
const SETS: Object = Object { get: 10, new: 9, left_out: &[10, 16, 19, 20] };
const ELEMENTS: Object = Object { get: 13, new: 12, left_out: &[] };
const RULES: Object = Object { get: 7, new: 6, left_out: &[3, 6] };
const REMOVE_TABLE: u16 = 2;

/// Reads the filter and its flows. `has_tables` says whether there is another one that knows them.
pub(super) fn capture(
    netns: &Netns,
    has_tables: bool,
) -> Result<(Vec<FilterPart>, Vec<FilterPart>), NetworkError> {
    let mut netlink = open(netns)?;
    let parts = match parts(&mut netlink) {
        // No nftables in this kernel: no tables.
        Err(error) if matches!(error.errno(), Some(libc::EOPNOTSUPP | libc::EINVAL)) => Vec::new(),
        parts => parts?,
    };
    let flows = if parts.is_empty() && !has_tables { Vec::new() } else { flows(&mut netlink)? };
    Ok((parts, flows))
}

/// Reads the sets that rules can refer to.
pub(super) fn capture_sets(netns: &Netns) -> Result<Vec<IpSet>, NetworkError> {
    Ok(sets::capture(&mut open(netns)?)?)
}

fn open(netns: &Netns) -> Result<Netlink, NetworkError> {
    let open = || Netlink::open_protocol(SockProtocol::NetlinkNetFilter);
    Ok(netns.run(open).map_err(system("enter a network namespace"))??)
}

fn parts(netlink: &mut Netlink) -> Result<Vec<FilterPart>, NetlinkError> {
    let mut parts = list(netlink, &TABLES, 0, &[])?;
    if parts.is_empty() {
        return Ok(parts);
    }
    for table in &mut parts {
        disown(&mut table.attributes);
    }
    for object in [&CHAINS, &STATEFUL, &FLOW_TABLES] {
        parts.extend(list(netlink, object, 0, &[])?);
    }
    let mut sets = list(netlink, &SETS, 0, &[])?;
    let mut elements = Vec::new();
    for (number, set) in (1u32..).zip(&mut sets) {
        const ID: u16 = 10;
        // Table and name, the first two attributes of a set and of a list of elements.
        let named = only(&set.attributes, &[1, 2]);
        elements.extend(list(netlink, &ELEMENTS, set.family, &named)?);
        put(&mut set.attributes, ID, &number.to_be_bytes());
    }
    parts.extend(sets);
    parts.extend(elements);
    parts.extend(list(netlink, &RULES, 0, &[])?);
    Ok(parts)
}

/// A table that only its maker may change goes away with its maker's socket, which is not ours.
fn disown(table: &mut Vec<u8>) {
    const FLAGS: u16 = 2;
    const OWNED: u32 = 2;
    if let Some(flags) = attributes::value(table, FLAGS)
        && let Some(flags) = flags.first_chunk()
    {
        let flags = u32::from_be_bytes(*flags) & !OWNED;
        *table = without(table, &[FLAGS]);
        put(table, FLAGS, &flags.to_be_bytes());
    }
}

fn list(
    netlink: &mut Netlink,
    object: &Object,
    family: u8,
    attributes: &[u8],
) -> Result<Vec<FilterPart>, NetlinkError> {
    let request = |sequence| {
        let mut bytes = Vec::new();
        let kind = SUBSYSTEM << 8 | object.get;
        message(&mut bytes, kind, NLM_F_REQUEST | NLM_F_DUMP, sequence, family, 0, attributes);
        bytes
    };
    let found = netlink.bodies("list the packet filter", request)?;
    let part = |(kind, body): (u16, Vec<u8>)| {
        let known = kind == SUBSYSTEM << 8 | object.new && body.len() >= FAMILY;
        known.then(|| FilterPart {
            family: body[0],
            kind: object.new,
            attributes: without(&body[FAMILY..], object.left_out),
        })
    };
    Ok(found.into_iter().filter_map(part).collect())
}

fn flows(netlink: &mut Netlink) -> Result<Vec<FilterPart>, NetlinkError> {
    const GET: u16 = 1;
    const NEW: u16 = 0;
    /// Tuples, status, protocol, timeout, mark, zone, labels: what makes a flow.
    const KEPT: [u16; 8] = [1, 2, 3, 4, 7, 8, 18, 22];
    let request = |sequence| {
        let mut bytes = Vec::new();
        message(&mut bytes, FLOWS << 8 | GET, NLM_F_REQUEST | NLM_F_DUMP, sequence, 0, 0, &[]);
        bytes
    };
    let found = match netlink.bodies("list the flows of the packet filter", request) {
        Err(error) if matches!(error.errno(), Some(libc::EOPNOTSUPP | libc::EINVAL)) => Vec::new(),
        found => found?,
    };
    let part = |(_, body): (u16, Vec<u8>)| {
        let attributes = flows::to_be_made(only(body.get(FAMILY..)?, &KEPT));
        Some(FilterPart { family: body[0], kind: NEW, attributes })
    };
    Ok(found.into_iter().filter_map(part).collect())
}

/// Replaces the packet filter of the namespace by the captured one, all at one moment.
pub(super) fn rebuild(netns: &Netns, network: &Network) -> Result<(), NetworkError> {
    let mut netlink = open(netns)?;
    let is_there = !list_tables(&mut netlink)?.is_empty();
    if !network.ip_sets.is_empty() || !sets::capture(&mut netlink)?.is_empty() {
        // Rules hold the sets that they refer to.
        if is_there {
            replace(&mut netlink, &[])?;
        }
        tables::empty(netns)?;
        sets::remove(&mut netlink)?;
        sets::rebuild(&mut netlink, network)?;
    }
    if !network.filter.is_empty() || is_there {
        replace(&mut netlink, &network.filter)?;
    }
    tables::rebuild(netns, network)?;
    for flows in network.flows.chunks(FLOWS_AT_ONCE) {
        let mut bytes = Vec::new();
        for flow in flows {
            let sequence = netlink.next_sequence();
            let (kind, flags) = (FLOWS << 8 | flow.kind, NLM_F_REQUEST | NLM_F_ACK | NLM_F_CREATE);
            message(&mut bytes, kind, flags, sequence, flow.family, 0, &flow.attributes);
        }
        let count =
            u32::try_from(flows.len()).map_err(io::Error::other).map_err(NetlinkError::from)?;
        // One that is there already, or that this kernel does not take, is met again by its next
        // packet.
        if let Err(error) = netlink.exchange("keep track of a flow", &bytes, count) {
            tracing::debug!(%error, "a flow of the packet filter is begun anew");
        }
    }
    Ok(())
}

/// Whether this kernel takes the packet filter. Nothing stays.
pub(super) fn check(netns: &Netns, network: &Network) -> Result<(), NetworkError> {
    if network.filter.is_empty() && network.ip_sets.is_empty() && network.tables.is_empty() {
        return Ok(());
    }
    let mut netlink = open(netns)?;
    if !network.ip_sets.is_empty() {
        sets::rebuild(&mut netlink, network)?;
    }
    if !network.filter.is_empty() {
        replace(&mut netlink, &network.filter)?;
        replace(&mut netlink, &[])?;
    }
    tables::rebuild(netns, network)?;
    tables::empty(netns)?;
    if !network.ip_sets.is_empty() {
        sets::remove(&mut netlink)?;
    }
    Ok(())
}

/// The tables; none where this kernel has no nftables.
fn list_tables(netlink: &mut Netlink) -> Result<Vec<FilterPart>, NetlinkError> {
    match list(netlink, &TABLES, 0, &[]) {
        Err(error) if matches!(error.errno(), Some(libc::EOPNOTSUPP | libc::EINVAL)) => {
            Ok(Vec::new())
        }
        tables => tables,
    }
}

fn replace(netlink: &mut Netlink, parts: &[FilterPart]) -> Result<(), NetworkError> {
    let mut bytes = Vec::new();
    message(&mut bytes, BATCH_BEGIN, NLM_F_REQUEST, 0, 0, SUBSYSTEM, &[]);
    let mut count = 1;
    let sequence = netlink.next_sequence();
    // Without a name: all of them.
    let remove = SUBSYSTEM << 8 | REMOVE_TABLE;
    message(&mut bytes, remove, NLM_F_REQUEST | NLM_F_ACK, sequence, 0, 0, &[]);
    for part in parts {
        let sequence = netlink.next_sequence();
        let flags = NLM_F_REQUEST
            | NLM_F_ACK
            | NLM_F_CREATE
            | if part.kind == RULES.new { NLM_F_APPEND } else { 0 };
        let kind = SUBSYSTEM << 8 | part.kind & 0xff;
        message(&mut bytes, kind, flags, sequence, part.family, 0, &part.attributes);
        count += 1;
    }
    message(&mut bytes, BATCH_END, NLM_F_REQUEST, 0, 0, SUBSYSTEM, &[]);
    Ok(netlink.exchange("set up the packet filter", &bytes, count)?)
}
