//! The network of a VE: its links, addresses, routes, neighbours and settings.
//!
//! Links are named, never numbered: the numbers of interfaces belong to one kernel. Numbers that
//! stand for protocols, scopes, flags and the like are those of rtnetlink(7), which are part of
//! the kernel's stable interface.

use std::net::IpAddr;

use serde::{Deserialize, Serialize};

pub use self::text::{Cidr, Mac, NotACidr, NotAMac};

mod text;

/// All that a VE's network namespace holds and that we know how to rebuild.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Network {
    /// The links, loopback included.
    pub links: Vec<Link>,
    /// The addresses in the order in which the kernel lists them: it decides which is primary.
    pub addresses: Vec<Address>,
    /// The routes of all tables, those that the kernel makes by itself included.
    pub routes: Vec<Route>,
    /// The policy rules, the three that every namespace starts with included.
    pub rules: Vec<Rule>,
    /// What is known about who is at which address on the link.
    pub neighbours: Vec<Neighbour>,
    /// The settings below `/proc/sys/net` that are not as in a fresh namespace.
    pub settings: Vec<Setting>,
    /// The packet filter (nftables, and iptables made of it) with its counters and sets, in the
    /// order in which it can be made.
    #[serde(default)]
    pub filter: Vec<FilterPart>,
    /// The flows that the packet filter keeps track of, each as the attributes by which
    /// `IPCTNL_MSG_CT_NEW` makes it.
    #[serde(default)]
    pub flows: Vec<FilterPart>,
    /// The numbers by which this network knows others of the VE: theirs here, and their place in
    /// [`Namespaces`](crate::container::Namespaces).
    #[serde(default)]
    pub known: Vec<(u32, u32)>,
    /// Entries of bridges and tunnels that say who is behind which port.
    #[serde(default)]
    pub stations: Vec<Station>,
    /// The sets of ipset, in the order of their numbers.
    #[serde(default)]
    pub ip_sets: Vec<IpSet>,
    /// The tables of iptables, ip6tables and arptables.
    #[serde(default)]
    pub tables: Vec<Table>,
}

/// A set of ipset(8).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct IpSet {
    /// Its name.
    pub name: String,
    /// Its number, by which rules refer to it.
    pub number: u16,
    /// The attributes by which `IPSET_CMD_CREATE` makes it.
    #[serde(with = "serde_bytes")]
    pub settings: Vec<u8>,
    /// Its entries: attributes as `IPSET_CMD_ADD` takes them (`IPSET_ATTR_ADT`), several at a time.
    pub entries: Vec<serde_bytes::ByteBuf>,
}

/// A table of iptables, ip6tables or arptables, as the kernel tells it and takes it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Table {
    /// `NFPROTO_*`.
    pub family: u8,
    /// Its name.
    pub name: String,
    /// The places in the kernel that it has chains for, as bits.
    pub valid_hooks: u32,
    /// Where the chain of each place begins.
    pub hook_entries: Vec<u32>,
    /// Where the policy of each is.
    pub underflows: Vec<u32>,
    /// How many entries there are.
    pub count: u32,
    /// The entries (`struct ipt_entry` and what belongs to each), with their counters.
    #[serde(with = "serde_bytes")]
    pub entries: Vec<u8>,
}

/// One part of a packet filter, as the kernel tells it and takes it: a message of nfnetlink.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FilterPart {
    /// `NFPROTO_*`.
    pub family: u8,
    /// `NFT_MSG_NEW*`.
    pub kind: u16,
    /// The attributes.
    #[serde(with = "serde_bytes")]
    pub attributes: Vec<u8>,
}

/// One link.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Link {
    /// The name inside the VE.
    pub name: String,
    /// The hardware address; none for loopback.
    pub mac: Option<Mac>,
    /// The largest packet, in bytes.
    pub mtu: u32,
    /// `IFF_*` as far as a program can set them: up, no ARP, promiscuous, all multicast.
    pub flags: u32,
    /// The length of the send queue, in packets.
    pub queue_length: u32,
    /// The number, which programs remember.
    #[serde(default)]
    pub index: u32,
    /// The group of links.
    #[serde(default)]
    pub group: u32,
    /// What an administrator has noted about it.
    #[serde(default)]
    pub note: Option<String>,
    /// Its other names.
    #[serde(default)]
    pub other_names: Vec<String>,
    /// Of what it is a port, such as of a bridge.
    #[serde(default)]
    pub port: Option<Port>,
    /// How it is made, if a program has made it.
    #[serde(default)]
    pub made: Option<Made>,
}

/// How a link is made.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Made {
    /// The kernel's name for what it is (`IFLA_INFO_KIND`).
    pub kind: String,
    /// What is special about it: attributes as they are told and taken (`IFLA_INFO_DATA`).
    #[serde(with = "serde_bytes")]
    pub settings: Vec<u8>,
    /// The link that it stands on, or the other end of the pair.
    pub parent: Option<LinkPlace>,
}

/// A link of some network of the VE.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LinkPlace {
    /// The number of the network, see [`Namespaces`](crate::container::Namespaces).
    pub network: u32,
    /// The link's name there.
    pub link: String,
}

/// What a link is a port of.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Port {
    /// The name of that link.
    pub of: String,
    /// What is special about the port (`IFLA_INFO_SLAVE_KIND` and `IFLA_INFO_SLAVE_DATA`).
    pub kind: String,
    /// The attributes.
    #[serde(with = "serde_bytes")]
    pub settings: Vec<u8>,
}

/// One address of a link.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Address {
    /// The link's name.
    pub link: String,
    /// The address.
    pub local: IpAddr,
    /// The peer's address where the link is point to point, else the address again.
    pub peer: IpAddr,
    /// The length of the network's prefix, in bits.
    pub prefix: u8,
    /// The broadcast address (IPv4).
    pub broadcast: Option<IpAddr>,
    /// `RT_SCOPE_*`.
    pub scope: u8,
    /// `IFA_F_*` without those that only report a state.
    pub flags: u32,
    /// The label (IPv4): the link's name, perhaps with a suffix.
    pub label: Option<String>,
    /// The metric of the route that comes with the address.
    pub metric: Option<u32>,
    /// How long the address is still preferred and valid, in seconds; `u32::MAX` is for ever.
    pub lifetime_s: (u32, u32),
    /// `IFAPROT_*`: who set the address.
    pub protocol: u8,
}

/// One route.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Route {
    /// IPv6, else IPv4.
    pub v6: bool,
    /// The destination and the length of its prefix; none is the default route.
    pub destination: Option<Cidr>,
    /// The source prefix (IPv6 only).
    pub source: Option<Cidr>,
    /// The type of service.
    pub tos: u8,
    /// The table.
    pub table: u32,
    /// `RTPROT_*`: who made the route.
    pub protocol: u8,
    /// `RT_SCOPE_*`.
    pub scope: u8,
    /// `RTN_*`: unicast, local, blackhole ...
    pub kind: u8,
    /// The metric.
    pub priority: Option<u32>,
    /// The preferred source address.
    pub preferred_source: Option<IpAddr>,
    /// Where packets go; several for a multipath route, none for one that drops them.
    pub hops: Vec<Hop>,
    /// `RTAX_*` numbers and their values, such as a window or an MTU.
    pub metrics: Vec<(u16, u32)>,
    /// The congestion control that the route asks for.
    pub congestion_control: Option<String>,
    /// The router preference (IPv6).
    pub preference: Option<u8>,
    /// How long the route stays, in seconds, where it goes away by itself.
    pub expires_s: Option<u32>,
}

/// One next hop of a [`Route`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hop {
    /// The link's name.
    pub link: String,
    /// The gateway; none when the destination is on the link.
    pub gateway: Option<IpAddr>,
    /// The gateway is on the link whatever the addresses say.
    pub on_link: bool,
    /// The weight less one, in a multipath route.
    pub weight: u8,
}

/// One policy rule.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rule {
    /// IPv6, else IPv4.
    pub v6: bool,
    /// The position.
    pub priority: u32,
    /// `FR_ACT_*`.
    pub action: u8,
    /// The table.
    pub table: u32,
    /// Inverts the match (`FIB_RULE_INVERT`).
    pub flags: u32,
    /// The type of service.
    pub tos: u8,
    /// Source prefix.
    pub source: Option<Cidr>,
    /// Destination prefix.
    pub destination: Option<Cidr>,
    /// Input and output link.
    pub links: (Option<String>, Option<String>),
    /// Mark and mask.
    pub mark: Option<(u32, u32)>,
    /// The rule to go on with.
    pub goto: Option<u32>,
    /// Ignore results with a prefix of this length or shorter.
    pub suppress_prefix: Option<u32>,
    /// `RTPROT_*`: who made the rule.
    pub protocol: u8,
}

/// One entry of the neighbour cache.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Neighbour {
    /// The link's name.
    pub link: String,
    /// The address.
    pub address: IpAddr,
    /// Its hardware address; none for a proxy entry.
    pub mac: Option<Mac>,
    /// Set by an administrator: it never changes.
    pub permanent: bool,
    /// `NTF_ROUTER`, `NTF_PROXY`.
    pub flags: u8,
}

/// An entry of a bridge or a tunnel that a program has made.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Station {
    /// The name of the port, or of the tunnel.
    pub link: String,
    /// `NUD_*`.
    pub state: u16,
    /// `NTF_*`.
    pub flags: u8,
    /// The attributes.
    #[serde(with = "serde_bytes")]
    pub attributes: Vec<u8>,
}

/// A setting below `/proc/sys/net`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Setting {
    /// The path below `/proc/sys/net`, e.g. `ipv4/ip_forward`.
    pub path: String,
    /// The value as read, without the final line end.
    pub value: String,
}

/// A frame on its way to a VE, held while the VE could not take it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Frame {
    /// A `virtio_net_hdr` of 10 bytes and the Ethernet frame.
    #[serde(with = "serde_bytes")]
    pub bytes: Vec<u8>,
}

impl Frame {
    /// True for a broadcast or multicast frame. Where both ends of a migration are on one LAN,
    /// both hold these, and the source's are not needed.
    pub fn is_group(&self) -> bool {
        self.bytes.get(10).is_some_and(|first| first & 1 == 1)
    }
}
