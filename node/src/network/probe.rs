//! Asks the LAN whether somebody has an address already.
//!
//! The log keeps VEs of one cluster from taking the same address; this finds all other hosts.
//! The question is the one that RFC 5227 (ARP) and RFC 4862 (IPv6) define for it: it comes from
//! nobody, so no neighbour learns anything from it, and whoever has the address answers. It goes
//! out of the bridge, to the LAN and to the VEs of this node alike.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    time::{Duration, Instant},
};

use ckpt_engine::sys::packet::PacketSocket;
use ckpt_format::network::Mac;
use netlink_packet_route::link::LinkAttribute;

use super::{
    Bridge, NetworkError,
    announce::{ETHERTYPE_ARP, ETHERTYPE_IPV6, icmpv6},
    netlink::Netlink,
    system,
};

/// How often each address is asked for: the first question may be lost.
const QUESTIONS: u32 = 3;
/// The time for an answer to each question. A LAN answers in less than a millisecond; the RFC's
/// seconds would make every start of a VE that much longer.
const PATIENCE: Duration = Duration::from_millis(100);

/// An address of which somebody else said that it is theirs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Claim {
    /// The address.
    pub address: IpAddr,
    /// The hardware address of who has it.
    pub owner: Mac,
}

/// Asks for all of these addresses. Returns the first that somebody has: this host itself, or
/// one on the LAN. Takes 0.3 s when nobody answers.
pub fn find_claim(bridge: &Bridge, addresses: &[IpAddr]) -> Result<Option<Claim>, NetworkError> {
    if addresses.is_empty() {
        return Ok(None);
    }
    let own = own_mac(bridge)?;
    if let Some(address) = addresses.iter().find(|address| is_of_this_host(**address)) {
        return Ok(Some(Claim { address: *address, owner: own }));
    }
    let socket = |ethertype: [u8; 2]| {
        PacketSocket::open(bridge.index, u16::from_be_bytes(ethertype))
            .map_err(system("open a packet socket"))
    };
    let (arp, ipv6) = (socket(ETHERTYPE_ARP)?, socket(ETHERTYPE_IPV6)?);
    for _ in 0..QUESTIONS {
        for address in addresses {
            let sent = match address {
                IpAddr::V4(v4) => arp.send(&arp_probe(own, *v4)),
                IpAddr::V6(v6) => ipv6.send(&solicitation(own, *v6)),
            };
            sent.map_err(system("ask the network for an address"))?;
        }
        let end = Instant::now() + PATIENCE;
        let (v4, v6): (Vec<_>, Vec<_>) = addresses.iter().partition(|address| address.is_ipv4());
        for (socket, asked) in [(&arp, v4), (&ipv6, v6)] {
            if let Some(claim) = listen(socket, own, &asked, end)? {
                return Ok(Some(claim));
            }
        }
    }
    Ok(None)
}

/// Waits until somebody claims one of the addresses. Without addresses nothing is waited for.
fn listen(
    socket: &PacketSocket,
    own: Mac,
    asked: &[IpAddr],
    end: Instant,
) -> Result<Option<Claim>, NetworkError> {
    let mut buffer = [0; 256];
    while !asked.is_empty() {
        let left = end.saturating_duration_since(Instant::now());
        let received = socket.receive(&mut buffer, left);
        match received.map_err(system("hear the network's answer"))? {
            Some(frame) => match claim(frame) {
                Some(claim) if claim.owner != own && asked.contains(&claim.address) => {
                    return Ok(Some(claim));
                }
                _ => {}
            },
            None if left.is_zero() => break,
            None => {}
        }
    }
    Ok(None)
}

/// What a frame claims: an ARP packet its sender's address (RFC 5227, 2.1.1), a neighbour
/// advertisement its target, and so does a solicitation from nobody: someone is about to take it.
fn claim(frame: &[u8]) -> Option<Claim> {
    let owner = Mac::from_bytes(frame.get(6..12)?)?;
    if frame.get(12..14)? == ETHERTYPE_ARP {
        let address = Ipv4Addr::from(*frame.get(28..)?.first_chunk::<4>()?);
        return (!address.is_unspecified()).then_some(Claim { address: address.into(), owner });
    }
    let (next_header, kind) = (*frame.get(20)?, *frame.get(54)?);
    let source = Ipv6Addr::from(*frame.get(22..)?.first_chunk::<16>()?);
    let target = Ipv6Addr::from(*frame.get(62..)?.first_chunk::<16>()?);
    let claims = kind == ADVERTISEMENT || (kind == SOLICITATION && source.is_unspecified());
    (next_header == ICMPV6 && claims).then_some(Claim { address: target.into(), owner })
}

const ICMPV6: u8 = 58;
const SOLICITATION: u8 = 135;
const ADVERTISEMENT: u8 = 136;

/// An ARP request from no address.
fn arp_probe(mac: Mac, address: Ipv4Addr) -> Vec<u8> {
    let mut frame = vec![0xff; 6];
    frame.extend(mac.bytes());
    frame.extend(ETHERTYPE_ARP);
    frame.extend([0, 1, 0x08, 0x00, 6, 4, 0, 1]);
    frame.extend(mac.bytes());
    frame.extend([0; 4]);
    frame.extend([0; 6]);
    frame.extend(address.octets());
    frame
}

/// A neighbour solicitation from no address.
fn solicitation(mac: Mac, address: Ipv6Addr) -> Vec<u8> {
    let mut group = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 1, 0xff00, 0).octets();
    group[13..].copy_from_slice(&address.octets()[13..]);
    let mut body = vec![SOLICITATION, 0, 0, 0, 0, 0, 0, 0];
    body.extend(address.octets());
    icmpv6(mac, Ipv6Addr::UNSPECIFIED, group.into(), body)
}

fn own_mac(bridge: &Bridge) -> Result<Mac, NetworkError> {
    let missing = || NetworkError::NoLink { name: bridge.name.clone() };
    let link = Netlink::open()?.link(&bridge.name)?.ok_or_else(missing)?;
    let bytes = link.attributes.into_iter().find_map(|attribute| match attribute {
        LinkAttribute::Address(bytes) => Mac::from_bytes(&bytes),
        _ => None,
    });
    bytes.ok_or_else(missing)
}

/// Whether the address is on one of the interfaces of this host.
fn is_of_this_host(address: IpAddr) -> bool {
    let interfaces = nix::ifaddrs::getifaddrs().into_iter().flatten();
    interfaces.filter_map(|interface| interface.address).any(|found| {
        found.as_sockaddr_in().is_some_and(|it| IpAddr::V4(it.ip()) == address)
            || found.as_sockaddr_in6().is_some_and(|it| IpAddr::V6(it.ip()) == address)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mac() -> Mac {
        "02:00:5e:10:00:01".parse().unwrap()
    }

    #[test]
    fn a_question_claims_nothing_that_others_have() {
        assert_eq!(claim(&arp_probe(mac(), [10, 77, 1, 1].into())), None);
    }

    #[test]
    fn two_that_ask_for_the_same_ipv6_address_notice_each_other() {
        let address: Ipv6Addr = "fd00::7:1".parse().unwrap();
        let found = claim(&solicitation(mac(), address));
        assert_eq!(found, Some(Claim { address: address.into(), owner: mac() }));
    }

    #[test]
    fn short_or_foreign_frames_claim_nothing() {
        let whole = solicitation(mac(), "fd00::7:1".parse().unwrap());
        for length in 0..whole.len() - 8 {
            assert_eq!(claim(&whole[..length.min(77)]), None, "{length}");
        }
        assert_eq!(claim(&[0; 256]), None);
    }
}
