//! Flows whose addresses the packet filter translates.
//!
//! The kernel tells such a flow by what it looks like in both directions, and that it is translated.
//! It does not take this back: a flow is made as if it were not, together with what becomes of it.

use super::attributes::{all, number, put, put_nested, value};

const ORIGINAL: u16 = 1;
const REPLY: u16 = 2;
const STATUS: u16 = 3;
const SOURCE_BECOMES: u16 = 6;
const TARGET_BECOMES: u16 = 13;

/// `IPS_SRC_NAT`, `IPS_DST_NAT`
const SOURCE_TRANSLATED: u32 = 0x10;
const TARGET_TRANSLATED: u32 = 0x20;

/// In one direction of a flow: addresses and protocol, and in these what is here.
const ADDRESSES: u16 = 1;
const PROTOCOL: u16 = 2;
const PROTOCOL_NUMBER: u16 = 1;
const SOURCE_PORT: u16 = 2;
const TARGET_PORT: u16 = 3;

/// The attributes by which a flow is made, from those by which it is told.
pub(super) fn to_be_made(told: Vec<u8>) -> Vec<u8> {
    let status = number(&told, STATUS).map_or(0, u32::from_be);
    if status & (SOURCE_TRANSLATED | TARGET_TRANSLATED) == 0 {
        return told;
    }
    // Of a protocol without ports it is made again by its next packet.
    translated(&told, status).unwrap_or(told)
}

fn translated(told: &[u8], status: u32) -> Option<Vec<u8>> {
    let (original, reply) = (value(told, ORIGINAL)?, value(told, REPLY)?);
    let back = turned(original)?;
    let mut made = Vec::with_capacity(told.len() + 64);
    for (kind, value) in all(told) {
        match kind {
            ORIGINAL => put_nested(&mut made, ORIGINAL, value),
            REPLY => put_nested(&mut made, REPLY, &back),
            _ => put(&mut made, kind, value),
        }
    }
    // What answers come from is what the target has become.
    let becomes = [
        (TARGET_TRANSLATED, TARGET_BECOMES, 0, SOURCE_PORT),
        (SOURCE_TRANSLATED, SOURCE_BECOMES, 1, TARGET_PORT),
    ];
    for (bit, kind, end, port) in becomes {
        if status & bit != 0 {
            put_nested(&mut made, kind, &range(reply, end, port)?);
        }
    }
    Some(made)
}

/// The two addresses of a direction, each with its kind: 1 and 2, or 3 and 4 of IPv6.
fn addresses(direction: &[u8]) -> Option<[(u16, &[u8]); 2]> {
    let mut found = all(value(direction, ADDRESSES)?);
    Some([found.next()?, found.next()?])
}

/// The other direction of a flow that is not translated.
fn turned(direction: &[u8]) -> Option<Vec<u8>> {
    let [(source_kind, source), (target_kind, target)] = addresses(direction)?;
    let protocol = value(direction, PROTOCOL)?;
    let mut ends = Vec::new();
    put(&mut ends, source_kind, target);
    put(&mut ends, target_kind, source);
    let mut ports = Vec::new();
    put(&mut ports, PROTOCOL_NUMBER, value(protocol, PROTOCOL_NUMBER)?);
    put(&mut ports, SOURCE_PORT, value(protocol, TARGET_PORT)?);
    put(&mut ports, TARGET_PORT, value(protocol, SOURCE_PORT)?);
    let mut turned = Vec::new();
    for (kind, value) in all(direction) {
        match kind {
            ADDRESSES => put_nested(&mut turned, ADDRESSES, &ends),
            PROTOCOL => put_nested(&mut turned, PROTOCOL, &ports),
            _ => put(&mut turned, kind, value),
        }
    }
    Some(turned)
}

/// One address and one port, as the limits of what may be chosen.
fn range(direction: &[u8], end: usize, port: u16) -> Option<Vec<u8>> {
    /// The lowest and the highest address of each kind; ports, and the two of them.
    const V4: [u16; 2] = [1, 2];
    const V6: [u16; 2] = [4, 5];
    const PORTS: u16 = 3;
    let (_, address) = addresses(direction)?[end];
    let port = value(value(direction, PROTOCOL)?, port)?;
    let mut range = Vec::new();
    for kind in if address.len() == 4 { V4 } else { V6 } {
        put(&mut range, kind, address);
    }
    let mut ports = Vec::new();
    for kind in [1, 2] {
        put(&mut ports, kind, port);
    }
    put_nested(&mut range, PORTS, &ports);
    Some(range)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn direction(source: [u8; 4], source_port: u16, target: [u8; 4], target_port: u16) -> Vec<u8> {
        let (mut ends, mut protocol, mut both) = (Vec::new(), Vec::new(), Vec::new());
        put(&mut ends, 1, &source);
        put(&mut ends, 2, &target);
        put(&mut protocol, PROTOCOL_NUMBER, &[17]);
        put(&mut protocol, SOURCE_PORT, &source_port.to_be_bytes());
        put(&mut protocol, TARGET_PORT, &target_port.to_be_bytes());
        put_nested(&mut both, ADDRESSES, &ends);
        put_nested(&mut both, PROTOCOL, &protocol);
        both
    }

    fn flow(status: u32) -> Vec<u8> {
        let mut told = Vec::new();
        put_nested(&mut told, ORIGINAL, &direction([10, 0, 0, 1], 1000, [10, 0, 0, 2], 80));
        put_nested(&mut told, REPLY, &direction([10, 0, 0, 3], 8080, [10, 0, 0, 4], 2000));
        put(&mut told, STATUS, &status.to_be_bytes());
        told
    }

    #[test]
    fn a_translated_flow_is_made_from_what_it_was_and_what_becomes_of_it() {
        let made = to_be_made(flow(0xe | SOURCE_TRANSLATED | TARGET_TRANSLATED));
        let back = direction([10, 0, 0, 2], 80, [10, 0, 0, 1], 1000);
        assert_eq!(value(&made, REPLY), Some(&back[..]));
        let lowest = |kind| value(value(&made, kind).unwrap(), 1).unwrap().to_vec();
        assert_eq!(
            (lowest(TARGET_BECOMES), lowest(SOURCE_BECOMES)),
            (vec![10, 0, 0, 3], vec![10, 0, 0, 4])
        );
        let port =
            |kind| value(value(value(&made, kind).unwrap(), 3).unwrap(), 1).unwrap().to_vec();
        assert_eq!(port(TARGET_BECOMES), 8080u16.to_be_bytes());
        assert_eq!(port(SOURCE_BECOMES), 2000u16.to_be_bytes());
    }

    #[test]
    fn a_flow_that_is_not_translated_stays_as_it_is_told() {
        assert_eq!(to_be_made(flow(0xe)), flow(0xe));
    }
}
