//! As much of nftables as a node itself needs: dropping frames between two ports of a bridge.
//!
//! No library for it is both kept and free of C; the messages are few and simple.

use netlink_packet_core::{NLM_F_ACK, NLM_F_APPEND, NLM_F_CREATE, NLM_F_REQUEST};
use nix::sys::socket::SockProtocol;

use super::netlink::{Netlink, NetlinkError};

pub(super) const SUBSYSTEM: u16 = 10;
pub(super) const BATCH_BEGIN: u16 = 0x10;
pub(super) const BATCH_END: u16 = 0x11;
const NEW_TABLE: u16 = 0;
const DELETE_TABLE: u16 = 2;
const NEW_CHAIN: u16 = 3;
const NEW_RULE: u16 = 6;

const FAMILY_BRIDGE: u8 = 7;
const HOOK_FORWARD: u32 = 2;
const META_INPUT: u32 = 4;
const META_OUTPUT: u32 = 5;
const REGISTER: u32 = 1;

const NESTED: u16 = 0x8000;

const TABLE: &str = "ferry";
const CHAIN: &str = "forward";

/// Drops every frame between pairs of ports of bridges in the calling thread's namespace, in
/// both directions. Replaces what an earlier call set; an empty list lets everything pass.
pub fn drop_between(pairs: &[(u32, u32)]) -> Result<(), NetlinkError> {
    let mut netlink = Netlink::open_protocol(SockProtocol::NetlinkNetFilter)?;
    let mut table = Attributes::default();
    table.text(1, TABLE);
    let mut batch = Batch::begin(&mut netlink);
    // Made first so that removing it cannot fail; all of this happens at one moment.
    batch.add(NEW_TABLE, NLM_F_CREATE, &table);
    batch.add(DELETE_TABLE, 0, &table);
    if !pairs.is_empty() {
        batch.add(NEW_TABLE, NLM_F_CREATE, &table);
        batch.add(NEW_CHAIN, NLM_F_CREATE, &chain());
        for &(one, other) in pairs {
            batch.add(NEW_RULE, NLM_F_CREATE | NLM_F_APPEND, &rule(one, other));
            batch.add(NEW_RULE, NLM_F_CREATE | NLM_F_APPEND, &rule(other, one));
        }
    }
    let (bytes, count) = batch.end();
    netlink.exchange("filter frames between ports", &bytes, count)
}

fn chain() -> Attributes {
    let mut hook = Attributes::default();
    hook.number(1, HOOK_FORWARD);
    hook.number(2, 0);
    let mut chain = Attributes::default();
    chain.text(1, TABLE);
    chain.text(3, CHAIN);
    chain.nest(4, &hook);
    chain.text(7, "filter");
    chain
}

/// From port `input` to port `output`: drop.
fn rule(input: u32, output: u32) -> Attributes {
    let mut expressions = Attributes::default();
    for (key, port) in [(META_INPUT, input), (META_OUTPUT, output)] {
        let mut meta = Attributes::default();
        meta.number(1, REGISTER);
        meta.number(2, key);
        expressions.expression("meta", &meta);
        let mut value = Attributes::default();
        value.put(1, &port.to_ne_bytes());
        let mut compare = Attributes::default();
        compare.number(1, REGISTER);
        compare.number(2, 0);
        compare.nest(3, &value);
        expressions.expression("cmp", &compare);
    }
    let mut code = Attributes::default();
    code.number(1, 0);
    let mut verdict = Attributes::default();
    verdict.nest(2, &code);
    let mut immediate = Attributes::default();
    immediate.number(1, 0);
    immediate.nest(2, &verdict);
    expressions.expression("immediate", &immediate);
    let mut rule = Attributes::default();
    rule.text(1, TABLE);
    rule.text(2, CHAIN);
    rule.nest(4, &expressions);
    rule
}

/// Changes that the kernel makes all together or not at all.
struct Batch<'a> {
    netlink: &'a mut Netlink,
    bytes: Vec<u8>,
    count: u32,
}

impl<'a> Batch<'a> {
    fn begin(netlink: &'a mut Netlink) -> Self {
        let mut bytes = Vec::new();
        message(&mut bytes, BATCH_BEGIN, NLM_F_REQUEST, 0, 0, SUBSYSTEM, &[]);
        Self { netlink, bytes, count: 0 }
    }

    fn add(&mut self, kind: u16, flags: u16, attributes: &Attributes) {
        let sequence = self.netlink.next_sequence();
        let flags = NLM_F_REQUEST | NLM_F_ACK | flags;
        let kind = SUBSYSTEM << 8 | kind;
        message(&mut self.bytes, kind, flags, sequence, FAMILY_BRIDGE, 0, &attributes.bytes);
        self.count += 1;
    }

    fn end(mut self) -> (Vec<u8>, u32) {
        message(&mut self.bytes, BATCH_END, NLM_F_REQUEST, 0, 0, SUBSYSTEM, &[]);
        (self.bytes, self.count)
    }
}

/// Puts one message of nfnetlink behind others.
pub(super) fn message(
    bytes: &mut Vec<u8>,
    kind: u16,
    flags: u16,
    sequence: u32,
    family: u8,
    resource: u16,
    attributes: &[u8],
) {
    let length = u32::try_from(20 + attributes.len()).expect("a message is short");
    bytes.extend(length.to_ne_bytes());
    bytes.extend(kind.to_ne_bytes());
    bytes.extend(flags.to_ne_bytes());
    bytes.extend(sequence.to_ne_bytes());
    bytes.extend([0; 4]);
    bytes.extend([family, 0]);
    bytes.extend(resource.to_be_bytes());
    bytes.extend(attributes);
}

/// Attributes one behind the other, padded.
#[derive(Default)]
struct Attributes {
    bytes: Vec<u8>,
}

impl Attributes {
    fn put(&mut self, kind: u16, value: &[u8]) {
        let length = u16::try_from(4 + value.len()).expect("an attribute is short");
        self.bytes.extend(length.to_ne_bytes());
        self.bytes.extend(kind.to_ne_bytes());
        self.bytes.extend(value);
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }

    fn text(&mut self, kind: u16, value: &str) {
        let mut bytes = value.as_bytes().to_vec();
        bytes.push(0);
        self.put(kind, &bytes);
    }

    fn number(&mut self, kind: u16, value: u32) {
        self.put(kind, &value.to_be_bytes());
    }

    fn nest(&mut self, kind: u16, inner: &Self) {
        self.put(kind | NESTED, &inner.bytes);
    }

    fn expression(&mut self, name: &str, data: &Self) {
        let mut expression = Self::default();
        expression.text(1, name);
        expression.nest(2, data);
        self.nest(1, &expression);
    }
}
