//! Routes of all tables, those that the kernel makes by itself included: a program may have
//! removed or changed them.

use std::net::IpAddr;

use ckpt_format::{
    blocker::Blocker,
    network::{Cidr, Hop, Network, Route},
};
use netlink_packet_core::{DefaultNla, Nla};
use netlink_packet_route::{
    AddressFamily, RouteNetlinkMessage,
    route::{
        RouteAddress, RouteAttribute, RouteFlags, RouteLwEnCapType, RouteMessage, RouteMetric,
        RouteNextHop, RouteNextHopFlags, RoutePreference, RouteProtocol, RouteScope, RouteType,
        RouteVia,
    },
};

use super::{RESTORE_WINDOW, Routes, blocker, links::Names};
use crate::network::{
    NetworkError,
    interface::LOOPBACK,
    netlink::{CHANGE, NEW, Netlink, PUT},
};

/// `RTAX_INITCWND`.
const METRIC_INITIAL_WINDOW: u16 = 11;
/// `RTAX_CC_ALGO`, which is a name and not a number.
const METRIC_CONGESTION_CONTROL: u16 = 16;
/// What the kernel counts the remaining time of a route in.
const CLOCK_TICKS_PER_S: u32 = 100;

pub(super) fn capture(
    netlink: &mut Netlink,
    names: &Names,
    blockers: &mut Vec<Blocker>,
) -> Result<Vec<Route>, NetworkError> {
    let mut routes = Vec::new();
    for family in [AddressFamily::Inet, AddressFamily::Inet6] {
        let mut request = RouteMessage::default();
        request.header.address_family = family;
        let request = RouteNetlinkMessage::GetRoute(request);
        for message in netlink.dump("list routes", request)? {
            let RouteNetlinkMessage::NewRoute(message) = message else { continue };
            // A cached copy of another route.
            if message.header.flags.contains(RouteFlags::Cloned) {
                continue;
            }
            match read(&message, names) {
                Ok(route) => routes.push(route),
                Err(Unreadable { what }) => {
                    let hint = "remove the route, or stop the VE before the move";
                    blockers.push(blocker(format!("route with {what}"), hint));
                }
            }
        }
    }
    Ok(routes)
}

/// A route has something that we do not know how to make again.
struct Unreadable {
    what: &'static str,
}

fn read(message: &RouteMessage, names: &Names) -> Result<Route, Unreadable> {
    let header = &message.header;
    let mut route = Route {
        v6: header.address_family == AddressFamily::Inet6,
        destination: None,
        source: None,
        tos: header.tos,
        table: header.table.into(),
        protocol: header.protocol.into(),
        scope: header.scope.into(),
        kind: header.kind.into(),
        priority: None,
        preferred_source: None,
        hops: Vec::new(),
        metrics: Vec::new(),
        congestion_control: None,
        preference: None,
        expires_s: None,
    };
    let (mut single, mut has_hop) = (RouteNextHop::default(), false);
    single.flags = RouteNextHopFlags::from_bits_truncate(header.flags.bits().to_le_bytes()[0]);
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Destination(address) => {
                route.destination = cidr(address, header.destination_prefix_length);
            }
            RouteAttribute::Source(address) => {
                route.source = cidr(address, header.source_prefix_length);
            }
            RouteAttribute::Table(table) => route.table = *table,
            RouteAttribute::Priority(priority) => route.priority = Some(*priority),
            RouteAttribute::PrefSource(address) => route.preferred_source = ip(address),
            RouteAttribute::Oif(index) => {
                single.interface_index = *index;
                has_hop = true;
            }
            RouteAttribute::Gateway(_) | RouteAttribute::Via(_) => {
                single.attributes.push(attribute.clone());
            }
            RouteAttribute::MultiPath(hops) => {
                for next in hops {
                    route.hops.push(hop(next, names)?);
                }
            }
            RouteAttribute::Metrics(metrics) => read_metrics(metrics, &mut route),
            RouteAttribute::Preference(preference) => {
                route.preference = Some(u8::from(*preference));
            }
            RouteAttribute::CacheInfo(info) if info.expires != 0 => {
                route.expires_s = Some(info.expires / CLOCK_TICKS_PER_S);
            }
            RouteAttribute::CacheInfo(_) | RouteAttribute::EncapType(RouteLwEnCapType::None) => {}
            RouteAttribute::EncapType(_) | RouteAttribute::Encap(_) => {
                return Err(Unreadable { what: "an encapsulation" });
            }
            RouteAttribute::NhId(_) => return Err(Unreadable { what: "a next-hop object" }),
            _ => return Err(Unreadable { what: "an attribute that is not known" }),
        }
    }
    if has_hop && route.hops.is_empty() {
        route.hops.push(hop(&single, names)?);
    }
    Ok(route)
}

fn hop(next: &RouteNextHop, names: &Names) -> Result<Hop, Unreadable> {
    let name = names.name(next.interface_index).ok_or(Unreadable { what: "an unknown link" })?;
    let mut hop = Hop {
        link: name.into(),
        gateway: None,
        on_link: next.flags.contains(RouteNextHopFlags::Onlink),
        weight: next.hops,
    };
    for attribute in &next.attributes {
        match attribute {
            RouteAttribute::Gateway(address) => hop.gateway = ip(address),
            RouteAttribute::Via(RouteVia::Inet(v4)) => hop.gateway = Some((*v4).into()),
            RouteAttribute::Via(RouteVia::Inet6(v6)) => hop.gateway = Some((*v6).into()),
            _ => return Err(Unreadable { what: "a next hop that is not known" }),
        }
    }
    Ok(hop)
}

fn read_metrics(metrics: &[RouteMetric], route: &mut Route) {
    for metric in metrics {
        if let RouteMetric::CcAlgo(name) = metric {
            route.congestion_control = Some(name.clone());
            continue;
        }
        let mut bytes = vec![0; metric.value_len()];
        metric.emit_value(&mut bytes);
        if let Some(bytes) = bytes.first_chunk() {
            route.metrics.push((metric.kind(), u32::from_ne_bytes(*bytes)));
        }
    }
}

pub(super) fn rebuild(
    netlink: &mut Netlink,
    network: &Network,
    names: &Names,
    form: Routes,
) -> Result<(), NetworkError> {
    let found = capture(netlink, names, &mut Vec::new())?;
    let wanted: Vec<Route> = network.routes.iter().map(|route| in_form(route, form)).collect();
    let is_foreign = |found: &&Route| {
        !is_by_itself(found) && !wanted.iter().any(|route| key(route) == key(found))
    };
    for route in found.iter().filter(is_foreign) {
        let message = RouteNetlinkMessage::DelRoute(request(route, names)?);
        match netlink.change("remove a route", message, CHANGE) {
            // It went with another one, or comes and goes with an address.
            Err(error) if matches!(error.errno(), Some(libc::ESRCH | libc::ENOENT)) => {}
            result => result?,
        }
    }
    let is_missing =
        |route: &&Route| !is_by_itself(route) && !found.iter().any(|found| same(route, found));
    let mut missing: Vec<_> = wanted.iter().filter(is_missing).collect();
    // Those on the link first: gateways are reached by them.
    missing.sort_by_key(|route| route.hops.iter().any(|hop| hop.gateway.is_some()));
    for route in missing {
        let there = found.iter().any(|found| key(found) == key(route));
        let message = RouteNetlinkMessage::NewRoute(request(route, names)?);
        let result = netlink.change("add a route", message, if there { PUT } else { NEW });
        match result {
            Err(error) if error.errno() == Some(libc::EEXIST) => {}
            result => result?,
        }
    }
    Ok(())
}

fn in_form(route: &Route, form: Routes) -> Route {
    let mut route = route.clone();
    let outside = !route.hops.is_empty() && route.hops.iter().all(|hop| hop.link != LOOPBACK);
    let unicast = route.kind == u8::from(RouteType::Unicast);
    if form == Routes::ForRestore && outside && unicast {
        route.metrics.retain(|(kind, _)| *kind != METRIC_INITIAL_WINDOW);
        route.metrics.push((METRIC_INITIAL_WINDOW, RESTORE_WINDOW));
        route.metrics.sort_unstable();
    }
    route
}

/// One that the kernel makes for an address as soon as its link has a carrier, with a metric that
/// nobody else can give.
fn is_by_itself(route: &Route) -> bool {
    route.v6 && route.protocol == u8::from(RouteProtocol::Kernel) && route.priority == Some(0)
}

/// What tells two routes of a table apart. Every link has its own way to `fe80::/64`.
fn key(route: &Route) -> impl PartialEq + '_ {
    let priority = route.priority.unwrap_or(0);
    let link = route.hops.first().filter(|_| route.v6).map(|hop| hop.link.as_str());
    let place = (route.v6, route.table, route.destination, route.source);
    (place, route.tos, priority, route.kind, link)
}

/// Equal but for the remaining time, which runs.
fn same(one: &Route, other: &Route) -> bool {
    one.expires_s.is_some() == other.expires_s.is_some()
        && *one == Route { expires_s: one.expires_s, ..other.clone() }
}

fn request(route: &Route, names: &Names) -> Result<RouteMessage, NetworkError> {
    let mut message = RouteMessage::default();
    let header = &mut message.header;
    header.address_family = if route.v6 { AddressFamily::Inet6 } else { AddressFamily::Inet };
    header.destination_prefix_length = route.destination.map_or(0, Cidr::prefix);
    header.source_prefix_length = route.source.map_or(0, Cidr::prefix);
    header.tos = route.tos;
    header.protocol = RouteProtocol::from(route.protocol);
    header.scope = RouteScope::from(route.scope);
    header.kind = RouteType::from(route.kind);
    let attributes = &mut message.attributes;
    attributes.push(RouteAttribute::Table(route.table));
    let address = |cidr: Cidr| RouteAddress::from(cidr.address());
    attributes.extend(route.destination.map(|c| RouteAttribute::Destination(address(c))));
    attributes.extend(route.source.map(|c| RouteAttribute::Source(address(c))));
    attributes.extend(route.priority.map(RouteAttribute::Priority));
    attributes.extend(
        route.preferred_source.map(|ip| RouteAttribute::PrefSource(RouteAddress::from(ip))),
    );
    match route.hops.as_slice() {
        [] => {}
        [hop] => {
            attributes.push(RouteAttribute::Oif(names.index(&hop.link)?));
            attributes.extend(hop.gateway.map(|gateway| gateway_attribute(gateway, route.v6)));
            if hop.on_link {
                message.header.flags |= RouteFlags::Onlink;
            }
        }
        hops => {
            let hops = hops.iter().map(|hop| next_hop(hop, route.v6, names));
            attributes.push(RouteAttribute::MultiPath(hops.collect::<Result<_, _>>()?));
        }
    }
    let metrics = metrics(route);
    if !metrics.is_empty() {
        attributes.push(RouteAttribute::Metrics(metrics));
    }
    attributes
        .extend(route.preference.map(|p| RouteAttribute::Preference(RoutePreference::from(p))));
    attributes.extend(route.expires_s.map(RouteAttribute::Expires));
    Ok(message)
}

fn metrics(route: &Route) -> Vec<RouteMetric> {
    let number = |(kind, value): &(u16, u32)| {
        RouteMetric::Other(DefaultNla::new(*kind, value.to_ne_bytes().to_vec()))
    };
    let mut metrics: Vec<_> = route.metrics.iter().map(number).collect();
    if let Some(name) = &route.congestion_control {
        let mut bytes = name.as_bytes().to_vec();
        bytes.push(0);
        metrics.push(RouteMetric::Other(DefaultNla::new(METRIC_CONGESTION_CONTROL, bytes)));
    }
    metrics
}

fn next_hop(hop: &Hop, v6: bool, names: &Names) -> Result<RouteNextHop, NetworkError> {
    let mut next = RouteNextHop::default();
    next.interface_index = names.index(&hop.link)?;
    next.hops = hop.weight;
    if hop.on_link {
        next.flags |= RouteNextHopFlags::Onlink;
    }
    next.attributes.extend(hop.gateway.map(|gateway| gateway_attribute(gateway, v6)));
    Ok(next)
}

/// An IPv4 route may have a gateway that is reached by IPv6.
fn gateway_attribute(gateway: IpAddr, v6: bool) -> RouteAttribute {
    if gateway.is_ipv6() == v6 {
        RouteAttribute::Gateway(RouteAddress::from(gateway))
    } else {
        RouteAttribute::Via(RouteVia::from(gateway))
    }
}

fn ip(address: &RouteAddress) -> Option<IpAddr> {
    match address {
        RouteAddress::Inet(v4) => Some(IpAddr::from(*v4)),
        RouteAddress::Inet6(v6) => Some(IpAddr::from(*v6)),
        _ => None,
    }
}

fn cidr(address: &RouteAddress, prefix: u8) -> Option<Cidr> {
    Cidr::new(ip(address)?, prefix)
}
