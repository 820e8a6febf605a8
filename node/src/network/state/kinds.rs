//! The kinds of links that can be made again, and where what the kernel tells of one is not what it
//! takes.

use super::attributes::{put, value, without};

/// A kind of links that can be made again.
#[derive(Debug)]
pub(super) struct Kind {
    pub(super) name: &'static str,
    /// The attributes that only report a state.
    states: &'static [u16],
    /// Those that are told as a number, but taken as something that is there or not.
    flags: &'static [u16],
    /// Those that are refused beside others even when they are 0.
    unless_zero: &'static [u16],
    /// They are not taken all at once: what differs from a new link is set afterwards.
    pub(super) afterwards: bool,
    /// What differs cannot be set afterwards: the link is made anew.
    pub(super) fixed: bool,
}

const fn kind(name: &'static str) -> Kind {
    Kind { name, states: &[], flags: &[], unless_zero: &[], afterwards: false, fixed: false }
}

/// What is not in here needs keys (`wireguard`), or its settings depend on each other (`bond`).
const KINDS: &[Kind] = &[
    kind("veth"),
    // Root, timers and counts; a number of the kernel that is not used any more (26).
    Kind {
        states: &[10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 26, 47, 48],
        afterwards: true,
        ..kind("bridge")
    },
    kind("dummy"),
    kind("ifb"),
    // Addresses in the list are counted by another one; the queue in use is a state.
    Kind { states: &[6, 8], ..kind("macvlan") },
    // Its character device is the host's: in a VE it is but a link.
    Kind { states: &[6, 8], ..kind("macvtap") },
    kind("ipvlan"),
    kind("vlan"),
    kind("vrf"),
    Kind { flags: &[28], unless_zero: &[22], ..kind("vxlan") },
    kind("nlmon"),
    // Whether it stays is a matter of its files; queues are counted.
    Kind { states: &[6, 8, 9], fixed: true, ..kind("tun") },
    kind("ipip"),
    kind("sit"),
    kind("gre"),
    kind("gretap"),
    kind("ip6tnl"),
    kind("ip6gre"),
    kind("ip6gretap"),
];

/// The attributes of a bridge's port that report a state: of the spanning tree, and counts.
const PORT_STATES: &[u16] = &[1, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 26, 35, 36, 38, 41];

impl Kind {
    /// The kind with the kernel's name for it.
    pub(super) fn find(name: &str) -> Option<&'static Self> {
        KINDS.iter().find(|kind| kind.name == name)
    }

    /// The settings of a link of this kind, of what is told about it.
    pub(super) fn settings(&self, told: &[u8]) -> Vec<u8> {
        as_taken(&without(told, self.states), self)
    }
}

/// The settings of a port, of what is told about it.
pub(super) fn port_settings(kind: &str, told: &[u8]) -> Vec<u8> {
    without(told, if kind == "bridge" { PORT_STATES } else { &[] })
}

/// Attributes as they are taken, where they are told in another way.
fn as_taken(settings: &[u8], kind: &Kind) -> Vec<u8> {
    let is_set = |attribute: &&u16| {
        value(settings, **attribute).is_some_and(|value| value.iter().any(|&byte| byte != 0))
    };
    let zeros = kind.unless_zero.iter().filter(|attribute| !is_set(attribute));
    let left_out: Vec<u16> = kind.flags.iter().chain(zeros).copied().collect();
    let mut taken = without(settings, &left_out);
    for &flag in kind.flags.iter().filter(is_set) {
        put(&mut taken, flag, &[]);
    }
    taken
}

/// The VLANs of each port are told in another way.
pub(super) fn filters_vlans(settings: &[u8]) -> bool {
    const FILTERING: u16 = 7;
    value(settings, FILTERING).is_some_and(|value| value.first().is_some_and(|&on| on != 0))
}
