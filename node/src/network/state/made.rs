//! Links that programs have made: pairs, bridges and what else stands on other links, in all
//! networks of the VE together, because a link may stand in one of them on a link of another.
//!
//! What is special about a kind is never understood here. The kernel tells it as attributes, and
//! takes the same attributes from whoever makes a link; only those that report a state are left
//! out. So a kind is supported when all that it has is told in this way.

use std::{
    collections::{HashMap, HashSet},
    io,
    os::fd::{AsFd, AsRawFd},
};

use ckpt_engine::sys::netns::Netns;
use ckpt_format::network::{Link, LinkPlace, Mac, Made, Network, Port};
use netlink_packet_core::{NLM_F_ACK, NLM_F_DUMP, NLM_F_REQUEST};

use super::{
    attributes::{all, as_text, different, number, put, put_nested, put_text, text, value},
    kinds::{self, Kind},
    setup, tun,
};
use crate::network::{
    NetworkError,
    netlink::{Netlink, NetlinkError},
};

/// `struct ifinfomsg`.
pub(super) const HEADER: usize = 16;
pub(super) const NEW_LINK: u16 = 16;
const REMOVE_LINK: u16 = 17;
const GET_LINK: u16 = 18;
pub(super) const SET_LINK: u16 = 19;
const NEW_NUMBER: u16 = 88;
const GET_NUMBER: u16 = 90;

const ADDRESS: u16 = 1;
const NAME: u16 = 3;
const MTU: u16 = 4;
const PARENT: u16 = 5;
pub(super) const CONTROLLER: u16 = 10;
const QUEUE_LENGTH: u16 = 13;
pub(super) const INFO: u16 = 18;
pub(super) const NOTE: u16 = 20;
pub(super) const GROUP: u16 = 27;
const NAMESPACE: u16 = 28;
const PARENT_NAMESPACE: u16 = 37;
pub(super) const PROPERTIES: u16 = 52;
pub(super) const OTHER_NAME: u16 = 53;

pub(super) const INFO_KIND: u16 = 1;
pub(super) const INFO_DATA: u16 = 2;
pub(super) const PORT_KIND: u16 = 4;
pub(super) const PORT_DATA: u16 = 5;

const NEW: u16 = 0x600;

/// A link as the kernel tells it.
#[derive(Debug)]
pub(super) struct Told {
    pub(super) index: u32,
    attributes: Vec<u8>,
}

impl Told {
    pub(super) fn name(&self) -> String {
        text(&self.attributes, NAME).unwrap_or_default()
    }

    pub(super) fn info(&self) -> &[u8] {
        value(&self.attributes, INFO).unwrap_or_default()
    }

    pub(super) fn kind(&self) -> Option<String> {
        text(self.info(), INFO_KIND)
    }

    /// What all links have.
    pub(super) fn put_into(&self, link: &mut Link) {
        link.index = self.index;
        link.group = number(&self.attributes, GROUP).unwrap_or(0);
        link.note = text(&self.attributes, NOTE).filter(|note| !note.is_empty());
        let names = value(&self.attributes, PROPERTIES).unwrap_or_default();
        let names = all(names).filter(|(kind, _)| *kind == OTHER_NAME);
        link.other_names = names.map(|(_, name)| as_text(name)).collect();
    }
}

/// All links of a network.
pub(super) fn list(netlink: &mut Netlink) -> Result<Vec<Told>, NetworkError> {
    let found = netlink.bodies("list links", |sequence| {
        message(GET_LINK, NLM_F_REQUEST | NLM_F_DUMP, sequence, &[0; HEADER])
    })?;
    let told = |(kind, body): (u16, Vec<u8>)| {
        let index = u32::from_ne_bytes(*body.get(4..)?.first_chunk()?);
        let attributes = body.get(HEADER..)?.to_vec();
        (kind == NEW_LINK).then_some(Told { index, attributes })
    };
    Ok(found.into_iter().filter_map(told).collect())
}

/// The networks of the VE as they were found: by number, the names of links by index.
#[derive(Debug, Default)]
pub(super) struct Atlas {
    pub(super) names: Vec<HashMap<u32, String>>,
    /// By network: the numbers by which it knows the others.
    pub(super) known: Vec<Vec<(u32, u32)>>,
    /// The host's number of the VE's user and group 0.
    id_base: u32,
}

impl Atlas {
    /// To be made when the links were listed: it is the list that numbers the other networks.
    pub(super) fn of(
        netlinks: &mut [Netlink],
        namespaces: &[Netns],
        lists: &[Vec<Told>],
        id_base: u32,
    ) -> Result<Self, NetworkError> {
        let mut atlas = Self { id_base, ..Self::default() };
        for (netlink, list) in netlinks.iter_mut().zip(lists) {
            atlas.names.push(list.iter().map(|told| (told.index, told.name())).collect());
            // Only those that a link refers to: most networks know but one other.
            let refers = |told: &Told| number(&told.attributes, PARENT_NAMESPACE);
            let mut needed: HashSet<u32> = list.iter().filter_map(refers).collect();
            let mut known = Vec::new();
            for (other, namespace) in (0..).zip(namespaces) {
                if needed.is_empty() {
                    break;
                }
                if let Some(number) = number_of(netlink, namespace)? {
                    needed.remove(&number);
                    known.push((number, other));
                }
            }
            atlas.known.push(known);
        }
        Ok(atlas)
    }

    /// Where the link with an index is that a link of a network refers to.
    fn place(&self, network: usize, number: Option<u32>, index: u32) -> Option<LinkPlace> {
        let network = match number {
            None => network,
            Some(number) => {
                let known = self.known.get(network)?;
                let found = known.iter().find(|(known, _)| *known == number)?;
                usize::try_from(found.1).ok()?
            }
        };
        let link = self.names.get(network)?.get(&index)?.clone();
        Some(LinkPlace { network: u32::try_from(network).ok()?, link })
    }
}

/// The number by which a network knows another one.
fn number_of(netlink: &mut Netlink, other: &Netns) -> Result<Option<u32>, NetworkError> {
    const NUMBER: u16 = 1;
    let body = number_request(other, None);
    let found = netlink.bodies("find the number of a network", |sequence| {
        message(GET_NUMBER, NLM_F_REQUEST | NLM_F_ACK, sequence, &body)
    })?;
    let body = found.into_iter().find(|(kind, _)| *kind == NEW_NUMBER);
    let number = body.and_then(|(_, body)| number(body.get(4..)?, NUMBER));
    Ok(number.filter(|&number| number.cast_signed() >= 0))
}

fn number_request(other: &Netns, number: Option<u32>) -> Vec<u8> {
    const NUMBER: u16 = 1;
    const DESCRIPTOR: u16 = 3;
    let mut body = vec![0; 4];
    put(&mut body, DESCRIPTOR, &other.as_fd().as_raw_fd().to_ne_bytes());
    if let Some(number) = number {
        put(&mut body, NUMBER, &number.to_ne_bytes());
    }
    body
}

/// How a link was made. `Err` names a link that cannot be made again, and why.
pub(super) fn read(
    told: &Told,
    network: usize,
    atlas: &Atlas,
) -> Result<Option<Made>, &'static str> {
    let Some(name) = told.kind() else { return Ok(None) };
    let Some(kind) = Kind::find(&name) else {
        return Err("of a kind that cannot be made again");
    };
    let parent = match number(&told.attributes, PARENT).filter(|&index| index != 0) {
        None => None,
        Some(index) => {
            let number = number(&told.attributes, PARENT_NAMESPACE);
            let place = atlas.place(network, number, index);
            Some(place.ok_or("whose other end is outside of the VE")?)
        }
    };
    let mut settings = kind.settings(value(told.info(), INFO_DATA).unwrap_or_default());
    if kind.name == "tun" {
        settings =
            tun::inside(&settings, atlas.id_base).ok_or("of a user who is outside of the VE")?;
    }
    if kind.name == "bridge" && kinds::filters_vlans(&settings) {
        return Err("that keeps VLANs apart");
    }
    if kind.name == "veth" && parent.is_none() {
        return Err("whose other end is outside of the VE");
    }
    Ok(Some(Made { kind: name, settings, parent }))
}

/// What a link is a port of.
pub(super) fn port(told: &Told, names: &HashMap<u32, String>) -> Option<Port> {
    let of = names.get(&number(&told.attributes, CONTROLLER)?)?.clone();
    let kind = text(told.info(), PORT_KIND).unwrap_or_default();
    let settings = value(told.info(), PORT_DATA).unwrap_or_default();
    let settings = kinds::port_settings(&kind, settings);
    Some(Port { of, kind, settings })
}

/// Makes and removes links until all networks have those that were captured.
#[derive(Debug)]
pub(super) struct Maker<'a> {
    netlinks: &'a mut [Netlink],
    namespaces: &'a [Netns],
    networks: &'a [Network],
    id_base: u32,
    /// What is there, by network and name.
    found: Vec<HashMap<String, Link>>,
}

impl<'a> Maker<'a> {
    pub(super) fn new(
        netlinks: &'a mut [Netlink],
        namespaces: &'a [Netns],
        networks: &'a [Network],
        id_base: u32,
    ) -> Self {
        Self { netlinks, namespaces, networks, id_base, found: Vec::new() }
    }

    /// True if anything was made or removed.
    pub(super) fn work(mut self) -> Result<bool, NetworkError> {
        let wanted = |network: &Network| network.links.iter().any(|link| link.made.is_some());
        self.look()?;
        let made = |found: &HashMap<String, Link>| found.values().any(|link| link.made.is_some());
        if !self.networks.iter().any(wanted) && !self.found.iter().any(made) {
            return Ok(false);
        }
        self.number_networks();
        let removed = self.remove()?;
        if removed {
            self.look()?;
        }
        let made = self.make()?;
        if made {
            self.look()?;
        }
        self.change()?;
        if made {
            self.look()?;
            self.compare()?;
        }
        Ok(made || removed)
    }

    fn look(&mut self) -> Result<(), NetworkError> {
        let mut lists = Vec::new();
        for netlink in self.netlinks.iter_mut() {
            lists.push(list(netlink)?);
        }
        let atlas = Atlas::of(self.netlinks, self.namespaces, &lists, self.id_base)?;
        self.found.clear();
        for (network, list) in lists.iter().enumerate() {
            let mut found = HashMap::new();
            for told in list {
                let mut link = super::links::empty(&told.name());
                told.put_into(&mut link);
                // One of another kind or with its other end outside is none of ours.
                link.made = read(told, network, &atlas).unwrap_or(None);
                link.port = port(told, &atlas.names[network]);
                found.insert(told.name(), link);
            }
            self.found.push(found);
        }
        Ok(())
    }

    /// The numbers of networks that are not taken yet. Whoever remembers another one finds it by
    /// asking.
    fn number_networks(&mut self) {
        for (netlink, network) in self.netlinks.iter_mut().zip(self.networks) {
            for &(number, other) in &network.known {
                let other = usize::try_from(other).ok().and_then(|at| self.namespaces.get(at));
                let Some(other) = other else { continue };
                let body = number_request(other, Some(number));
                if let Err(error) = change(netlink, "number a network", NEW_NUMBER, NEW, &body) {
                    tracing::debug!(%error, number, "a network has another number");
                }
            }
        }
    }

    fn link(&self, network: usize, name: &str) -> Option<&Link> {
        self.found.get(network)?.get(name)
    }

    fn index(&self, place: &LinkPlace) -> Option<u32> {
        let network = usize::try_from(place.network).ok()?;
        Some(self.link(network, &place.link)?.index)
    }

    /// Removes what is not as it should be.
    fn remove(&mut self) -> Result<bool, NetworkError> {
        let mut removed = false;
        for (network, found) in self.found.iter().enumerate() {
            for (name, link) in found {
                let Some(made) = &link.made else { continue };
                let wanted = self.networks.get(network);
                let wanted = wanted.and_then(|it| it.links.iter().find(|it| it.name == *name));
                let fits = wanted.is_some_and(|wanted| {
                    let fixed = Kind::find(&made.kind).is_some_and(|kind| kind.fixed);
                    let same = |it: &Made| {
                        (&it.kind, &it.parent) == (&made.kind, &made.parent)
                            && (!fixed || different(&it.settings, &made.settings).is_empty())
                    };
                    wanted.made.as_ref().is_some_and(same)
                        && (wanted.index == link.index || wanted.index == 0)
                });
                if fits {
                    continue;
                }
                let netlink = &mut self.netlinks[network];
                let what = format!("remove the link {name}");
                match change(netlink, &what, REMOVE_LINK, 0, &header(link.index)) {
                    // It went with another one.
                    Err(error) if error.errno() == Some(libc::ENODEV) => {}
                    result => result?,
                }
                removed = true;
            }
        }
        Ok(removed)
    }

    /// Makes what is missing, each link after that which it stands on.
    fn make(&mut self) -> Result<bool, NetworkError> {
        let mut pending: Vec<(usize, &'a Link)> = Vec::new();
        for (network, wanted) in self.networks.iter().enumerate().take(self.namespaces.len()) {
            let missing =
                |link: &&Link| link.made.is_some() && self.link(network, &link.name).is_none();
            pending.extend(wanted.links.iter().filter(missing).map(|link| (network, link)));
        }
        let anything = !pending.is_empty();
        while !pending.is_empty() {
            let mut left = Vec::new();
            let mut refused = None;
            for &(network, link) in &pending {
                // The other end of a pair came with the first.
                if self.link(network, &link.name).is_some() {
                    continue;
                }
                match self.make_one(network, link) {
                    Ok(made) => {
                        for (network, link) in made {
                            self.found[network].insert(link.name.clone(), link);
                        }
                    }
                    Err(error) => {
                        left.push((network, link));
                        refused = Some(error);
                    }
                }
            }
            if let Some(error) = refused
                && left.len() == pending.len()
            {
                return Err(error);
            }
            pending = left;
        }
        Ok(anything)
    }

    /// Makes one link, and the other end of a pair. Returns what stands now.
    fn make_one(
        &mut self,
        network: usize,
        link: &Link,
    ) -> Result<Vec<(usize, Link)>, NetworkError> {
        let Some(made) = &link.made else { return Ok(Vec::new()) };
        if made.kind == "tun" {
            let (netlink, netns) = (&mut self.netlinks[network], &self.namespaces[network]);
            tun::make(netlink, netns, link, made, self.id_base)?;
            return Ok(vec![(network, link.clone())]);
        }
        let no_link = |place: &LinkPlace| super::no_link(&place.link);
        let mut body = body(link);
        let mut from = network;
        let mut stands = vec![(network, link.clone())];
        let mut settings = made.settings.clone();
        if Kind::find(&made.kind).is_some_and(|kind| kind.afterwards) {
            settings.clear();
        }
        match &made.parent {
            Some(place) if made.kind == "veth" => {
                let other = self.wanted(place).ok_or_else(|| no_link(place))?;
                let mut peer = header(other.index);
                put_common(&mut peer, other);
                let namespace = usize::try_from(place.network).ok();
                let namespace = namespace.and_then(|at| Some((at, self.namespaces.get(at)?)));
                let (at, namespace) = namespace.ok_or_else(|| no_link(place))?;
                put(&mut peer, NAMESPACE, &namespace.as_fd().as_raw_fd().to_ne_bytes());
                settings.clear();
                const PEER: u16 = 1;
                put(&mut settings, PEER, &peer);
                stands.push((at, other.clone()));
            }
            Some(place) => {
                let index = self.index(place).ok_or_else(|| no_link(place))?;
                put(&mut body, PARENT, &index.to_ne_bytes());
                from = usize::try_from(place.network).map_err(|_| no_link(place))?;
                if from != network {
                    let descriptor = self.namespaces[network].as_fd().as_raw_fd();
                    put(&mut body, NAMESPACE, &descriptor.to_ne_bytes());
                }
            }
            None => {}
        }
        let mut info = Vec::new();
        put_text(&mut info, INFO_KIND, &made.kind);
        if !settings.is_empty() {
            put_nested(&mut info, INFO_DATA, &settings);
        }
        put_nested(&mut body, INFO, &info);
        let netlink = self.netlinks.get_mut(from).ok_or_else(|| super::no_link(&link.name))?;
        let what = format!("make the {} link {}", made.kind, link.name);
        change(netlink, &what, NEW_LINK, NEW, &body)?;
        Ok(stands)
    }

    fn wanted(&self, place: &LinkPlace) -> Option<&'a Link> {
        let network = self.networks.get(usize::try_from(place.network).ok()?)?;
        network.links.iter().find(|link| link.name == place.link)
    }

    /// Sets what can be set when all links stand.
    fn change(&mut self) -> Result<(), NetworkError> {
        for (network, wanted) in self.networks.iter().enumerate().take(self.namespaces.len()) {
            for link in &wanted.links {
                let Some(found) = self.found[network].get(&link.name) else { continue };
                let of = link.port.as_ref().and_then(|port| self.link(network, &port.of));
                let of = of.map_or(0, |of| of.index);
                let found = found.clone();
                let netlink = &mut self.netlinks[network];
                setup::change_names(netlink, link, &found)?;
                setup::change_settings(netlink, link, &found)?;
                setup::change_port(netlink, link, &found, of)?;
            }
        }
        Ok(())
    }

    /// What this kernel has made of it must be what the other one had.
    fn compare(&self) -> Result<(), NetworkError> {
        for (network, wanted) in self.networks.iter().enumerate().take(self.namespaces.len()) {
            for link in wanted.links.iter().filter(|link| link.made.is_some()) {
                let found = self.link(network, &link.name);
                let settings = |made: &Option<Made>| {
                    made.as_ref().map(|made| made.settings.clone()).unwrap_or_default()
                };
                let left = found.map_or_else(Vec::new, |found| {
                    different(&settings(&link.made), &settings(&found.made))
                });
                if found.is_none() || !left.is_empty() {
                    let kinds: Vec<u16> = all(&left).map(|(kind, _)| kind).collect();
                    tracing::error!(link = link.name, ?kinds, "a link is not as it was");
                    return Err(NetworkError::ChangedLink { name: link.name.clone() });
                }
            }
        }
        Ok(())
    }
}

/// Gives a link its hardware address.
pub(super) fn set_address(netlink: &mut Netlink, name: &str, mac: Mac) -> Result<(), NetworkError> {
    let mut body = header(0);
    put_text(&mut body, NAME, name);
    put(&mut body, ADDRESS, &mac.bytes());
    Ok(change(netlink, &format!("set the address of {name}"), SET_LINK, 0, &body)?)
}

pub(super) fn header(index: u32) -> Vec<u8> {
    let mut header = vec![0; HEADER];
    header[4..8].copy_from_slice(&index.to_ne_bytes());
    header
}

fn put_common(body: &mut Vec<u8>, link: &Link) {
    put_text(body, NAME, &link.name);
    if let Some(mac) = link.mac {
        put(body, ADDRESS, &mac.bytes());
    }
    put(body, QUEUE_LENGTH, &link.queue_length.to_ne_bytes());
}

/// The beginning of a request that makes a link.
fn body(link: &Link) -> Vec<u8> {
    let mut body = header(link.index);
    put_common(&mut body, link);
    // What stands on another link is limited by that; it comes when all stand.
    if link.made.as_ref().is_some_and(|made| made.kind == "veth") {
        put(&mut body, MTU, &link.mtu.to_ne_bytes());
    }
    body
}

pub(super) fn message(kind: u16, flags: u16, sequence: u32, body: &[u8]) -> Vec<u8> {
    let length = u32::try_from(16 + body.len()).unwrap_or(u32::MAX);
    let mut bytes = length.to_ne_bytes().to_vec();
    bytes.extend(kind.to_ne_bytes());
    bytes.extend(flags.to_ne_bytes());
    bytes.extend(sequence.to_ne_bytes());
    bytes.extend([0; 4]);
    bytes.extend(body);
    bytes
}

/// Makes one change and waits until the kernel has made it.
pub(super) fn change(
    netlink: &mut Netlink,
    what: &str,
    kind: u16,
    flags: u16,
    body: &[u8],
) -> Result<(), NetlinkError> {
    if body.len() > usize::from(u16::MAX) {
        return Err(io::Error::from(io::ErrorKind::InvalidInput).into());
    }
    let sequence = netlink.next_sequence();
    let bytes = message(kind, NLM_F_REQUEST | NLM_F_ACK | flags, sequence, body);
    netlink.exchange(what, &bytes, 1)
}
