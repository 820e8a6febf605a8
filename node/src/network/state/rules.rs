//! Policy rules.

use ckpt_format::{
    blocker::Blocker,
    network::{Cidr, Network, Rule},
};
use netlink_packet_route::{
    AddressFamily, RouteNetlinkMessage,
    route::RouteProtocol,
    rule::{RuleAction, RuleAttribute, RuleFlags, RuleMessage},
};

use super::blocker;
use crate::network::{
    NetworkError,
    netlink::{CHANGE, NEW, Netlink},
};

/// `FR_ACT_GOTO` needs the rule that it names, so those come last.
const ACTION_GOTO: u8 = 2;
/// What the kernel says for "no limit".
const NO_SUPPRESSION: u32 = u32::MAX;

pub(super) fn capture(
    netlink: &mut Netlink,
    blockers: &mut Vec<Blocker>,
) -> Result<Vec<Rule>, NetworkError> {
    let mut rules = Vec::new();
    for family in [AddressFamily::Inet, AddressFamily::Inet6] {
        let mut request = RuleMessage::default();
        request.header.family = family;
        let found = match netlink.dump("list rules", RouteNetlinkMessage::GetRule(request)) {
            // No policy routing for this family in this kernel.
            Err(error) if error.errno() == Some(libc::EAFNOSUPPORT) => continue,
            found => found?,
        };
        for message in found {
            let RouteNetlinkMessage::NewRule(message) = message else { continue };
            match read(&message) {
                Some(rule) => rules.push(rule),
                None => {
                    let hint = "remove the rule (ip rule del), or stop the VE before the move";
                    blockers.push(blocker("routing rule of a kind that is not known", hint));
                }
            }
        }
    }
    Ok(rules)
}

fn read(message: &RuleMessage) -> Option<Rule> {
    let header = &message.header;
    let mut rule = Rule {
        v6: header.family == AddressFamily::Inet6,
        priority: 0,
        action: header.action.into(),
        table: header.table.into(),
        flags: (header.flags & RuleFlags::Invert).bits(),
        tos: header.tos,
        source: None,
        destination: None,
        links: (None, None),
        mark: None,
        goto: None,
        suppress_prefix: None,
        protocol: 0,
    };
    for attribute in &message.attributes {
        match attribute {
            RuleAttribute::Priority(priority) => rule.priority = *priority,
            RuleAttribute::Table(table) => rule.table = *table,
            RuleAttribute::Source(ip) => rule.source = Cidr::new(*ip, header.src_len),
            RuleAttribute::Destination(ip) => rule.destination = Cidr::new(*ip, header.dst_len),
            RuleAttribute::Iifname(name) => rule.links.0 = Some(name.clone()),
            RuleAttribute::Oifname(name) => rule.links.1 = Some(name.clone()),
            RuleAttribute::FwMark(mark) => rule.mark.get_or_insert((0, u32::MAX)).0 = *mark,
            RuleAttribute::FwMask(mask) => rule.mark.get_or_insert((0, 0)).1 = *mask,
            RuleAttribute::Goto(priority) => rule.goto = Some(*priority),
            RuleAttribute::Protocol(protocol) => rule.protocol = u8::from(*protocol),
            RuleAttribute::SuppressPrefixLen(length) => {
                rule.suppress_prefix = Some(*length).filter(|length| *length != NO_SUPPRESSION);
            }
            RuleAttribute::SuppressIfGroup(NO_SUPPRESSION) => {}
            _ => return None,
        }
    }
    Some(rule)
}

pub(super) fn rebuild(netlink: &mut Netlink, network: &Network) -> Result<(), NetworkError> {
    let found = capture(netlink, &mut Vec::new())?;
    // New ones first, so that there is never a moment without any.
    let mut missing: Vec<_> = network.rules.iter().filter(|rule| !found.contains(rule)).collect();
    missing.sort_by_key(|rule| rule.action == ACTION_GOTO);
    for rule in missing {
        let message = RouteNetlinkMessage::NewRule(request(rule));
        match netlink.change("add a rule", message, NEW) {
            Err(error) if error.errno() == Some(libc::EEXIST) => {}
            result => result?,
        }
    }
    for rule in found.iter().filter(|rule| !network.rules.contains(rule)) {
        let message = RouteNetlinkMessage::DelRule(request(rule));
        match netlink.change("remove a rule", message, CHANGE) {
            Err(error) if error.errno() == Some(libc::ENOENT) => {}
            result => result?,
        }
    }
    Ok(())
}

fn request(rule: &Rule) -> RuleMessage {
    let mut message = RuleMessage::default();
    let header = &mut message.header;
    header.family = if rule.v6 { AddressFamily::Inet6 } else { AddressFamily::Inet };
    header.action = RuleAction::from(rule.action);
    header.flags = RuleFlags::from_bits_retain(rule.flags) & RuleFlags::Invert;
    header.tos = rule.tos;
    header.src_len = rule.source.map_or(0, Cidr::prefix);
    header.dst_len = rule.destination.map_or(0, Cidr::prefix);
    let attributes = &mut message.attributes;
    attributes.push(RuleAttribute::Priority(rule.priority));
    attributes.push(RuleAttribute::Table(rule.table));
    attributes.push(RuleAttribute::Protocol(RouteProtocol::from(rule.protocol)));
    attributes.extend(rule.source.map(|cidr| RuleAttribute::Source(cidr.address())));
    attributes.extend(rule.destination.map(|cidr| RuleAttribute::Destination(cidr.address())));
    attributes.extend(rule.links.0.clone().map(RuleAttribute::Iifname));
    attributes.extend(rule.links.1.clone().map(RuleAttribute::Oifname));
    if let Some((mark, mask)) = rule.mark {
        attributes.push(RuleAttribute::FwMark(mark));
        attributes.push(RuleAttribute::FwMask(mask));
    }
    attributes.extend(rule.goto.map(RuleAttribute::Goto));
    attributes.extend(rule.suppress_prefix.map(RuleAttribute::SuppressPrefixLen));
    message
}
