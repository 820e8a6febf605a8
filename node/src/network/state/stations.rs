//! Who is behind which port of a bridge, or behind a tunnel, as far as a program has said so.
//! What was learned from frames is learned again.

use std::collections::HashSet;

use ckpt_format::network::{Link, Network, Station};
use netlink_packet_core::{NLM_F_APPEND, NLM_F_CREATE, NLM_F_DUMP, NLM_F_REQUEST};

use super::{attributes::without, links::Names, made};
use crate::network::{NetworkError, netlink::Netlink};

/// `struct ndmsg`.
const HEADER: usize = 12;
const NEW: u16 = 28;
const GET: u16 = 30;
const BRIDGE: u8 = 7;
/// `NUD_NOARP`, `NUD_PERMANENT`.
const NO_QUESTIONS: u16 = 0x40;
const PERMANENT: u16 = 0x80;
/// `NTF_SELF`: of the tunnel itself, not of the bridge that it is a port of.
const OWN: u8 = 2;
const LEARNED: u8 = 0x10;
/// Ages and counts.
const STATES: [u16; 3] = [3, 4, 10];

/// Reads the entries of those links that have them.
pub(super) fn capture(
    netlink: &mut Netlink,
    links: &[Link],
    names: &Names,
) -> Result<Vec<Station>, NetworkError> {
    let is = |link: &Link, kind: &str| link.made.as_ref().is_some_and(|made| made.kind == kind);
    if !links.iter().any(|link| is(link, "bridge") || is(link, "vxlan")) {
        return Ok(Vec::new());
    }
    let tunnels: HashSet<&str> =
        links.iter().filter(|link| is(link, "vxlan")).map(|link| link.name.as_str()).collect();
    let mut request = vec![0; HEADER];
    request[0] = BRIDGE;
    let found = netlink.bodies("list the entries of bridges", |sequence| {
        made::message(GET, NLM_F_REQUEST | NLM_F_DUMP, sequence, &request)
    })?;
    let read = |(kind, body): &(u16, Vec<u8>)| {
        let head = body.get(..HEADER).filter(|head| *kind == NEW && head[0] == BRIDGE)?;
        let state = u16::from_ne_bytes([head[8], head[9]]);
        let (flags, index) = (head[10], u32::from_ne_bytes(*head[4..].first_chunk()?));
        let link = names.name(index)?;
        // Permanent ones of a bridge are the addresses of its ports.
        let kept = match flags & OWN != 0 {
            true => state & (NO_QUESTIONS | PERMANENT) != 0 && tunnels.contains(link),
            false => state & NO_QUESTIONS != 0,
        };
        (kept && flags & LEARNED == 0).then(|| Station {
            link: link.into(),
            state,
            flags,
            attributes: without(&body[HEADER..], &STATES),
        })
    };
    Ok(found.iter().filter_map(read).collect())
}

/// Only adds: what a program removes during a move is removed again by nobody.
pub(super) fn rebuild(
    netlink: &mut Netlink,
    network: &Network,
    names: &Names,
) -> Result<(), NetworkError> {
    if network.stations.is_empty() {
        return Ok(());
    }
    let found = capture(netlink, &network.links, names)?;
    for station in network.stations.iter().filter(|station| !found.contains(station)) {
        let mut body = vec![BRIDGE, 0, 0, 0];
        body.extend(names.index(&station.link)?.to_ne_bytes());
        body.extend(station.state.to_ne_bytes());
        body.extend([station.flags, 0]);
        body.extend(&station.attributes);
        let what = format!("say who is behind {}", station.link);
        made::change(netlink, &what, NEW, NLM_F_CREATE | NLM_F_APPEND, &body)?;
    }
    Ok(())
}
