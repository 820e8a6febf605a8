//! Tells the LAN at which host a VE is now.
//!
//! Switches learn from any frame where a hardware address is; hosts that remember another
//! hardware address for one of the VE's addresses correct it when they see these. Both forms of
//! gratuitous ARP are sent, because some hosts heed only the one or the other.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ckpt_engine::sys::{
    netns::Netns,
    packet::{FrameHeader, PacketSender},
};
use ckpt_format::network::Mac;

use super::{NetworkError, netlink::Netlink, system};

pub(super) const ETHERTYPE_ARP: [u8; 2] = [0x08, 0x06];
pub(super) const ETHERTYPE_IPV6: [u8; 2] = [0x86, 0xdd];

/// Announcements that are ready to be sent.
#[derive(Debug)]
pub struct Announcer {
    sender: PacketSender,
    frames: Vec<Vec<u8>>,
}

impl Announcer {
    /// Gets ready to announce `addresses` from the interface `link` inside the VE's namespace.
    /// To be called before the blackout.
    pub fn prepare(
        netns: &Netns,
        link: &str,
        mac: Mac,
        addresses: &[IpAddr],
    ) -> Result<Self, NetworkError> {
        let sender = netns
            .run(|| {
                let index = Netlink::open()?.index(link)?;
                PacketSender::open(index, FrameHeader::None).map_err(system("open a packet socket"))
            })
            .map_err(system("enter a network namespace"))??;
        Ok(Self { sender, frames: addresses.iter().flat_map(|ip| frames_for(mac, *ip)).collect() })
    }

    /// Sends the announcements now. May be repeated. Returns how many the kernel took; while the
    /// interface is down that is none.
    pub fn send(&self) -> usize {
        self.frames.iter().filter(|frame| self.sender.send(frame).is_ok()).count()
    }
}

fn frames_for(mac: Mac, address: IpAddr) -> Vec<Vec<u8>> {
    match address {
        IpAddr::V4(v4) if v4.is_loopback() => Vec::new(),
        IpAddr::V4(v4) => vec![arp(mac, v4, 1), arp(mac, v4, 2)],
        IpAddr::V6(v6) if v6.is_loopback() => Vec::new(),
        IpAddr::V6(v6) => vec![advertisement(mac, v6)],
    }
}

/// A gratuitous ARP request (operation 1) or reply (2).
fn arp(mac: Mac, address: Ipv4Addr, operation: u8) -> Vec<u8> {
    let mut frame = Vec::with_capacity(42);
    frame.extend([0xff; 6]);
    frame.extend(mac.bytes());
    frame.extend(ETHERTYPE_ARP);
    frame.extend([0, 1, 0x08, 0x00, 6, 4, 0, operation]);
    frame.extend(mac.bytes());
    frame.extend(address.octets());
    frame.extend(if operation == 1 { [0; 6] } else { [0xff; 6] });
    frame.extend(address.octets());
    frame
}

/// An unsolicited neighbour advertisement to all nodes, with the override flag.
fn advertisement(mac: Mac, address: Ipv6Addr) -> Vec<u8> {
    let all_nodes = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);
    let mut body = vec![136, 0, 0, 0, 0x20, 0, 0, 0];
    body.extend(address.octets());
    body.extend([2, 1]);
    body.extend(mac.bytes());
    icmpv6(mac, address, all_nodes, body)
}

/// A frame with an ICMPv6 message to a multicast group; the message's checksum is filled in.
pub(super) fn icmpv6(mac: Mac, source: Ipv6Addr, group: Ipv6Addr, mut body: Vec<u8>) -> Vec<u8> {
    let sum = checksum(source, group, &body);
    body[2..4].copy_from_slice(&sum);
    let mut frame = vec![0x33, 0x33];
    frame.extend(&group.octets()[12..]);
    frame.extend(mac.bytes());
    frame.extend(ETHERTYPE_IPV6);
    let length = u16::try_from(body.len()).expect("a short message");
    frame.extend([0x60, 0, 0, 0]);
    frame.extend(length.to_be_bytes());
    frame.extend([58, 255]);
    frame.extend(source.octets());
    frame.extend(group.octets());
    frame.extend(body);
    frame
}

/// The ICMPv6 checksum, pseudo header included.
fn checksum(source: Ipv6Addr, destination: Ipv6Addr, body: &[u8]) -> [u8; 2] {
    let words = |bytes: &[u8]| -> u32 {
        bytes
            .chunks(2)
            .map(|pair| u32::from(pair[0]) << 8 | u32::from(*pair.get(1).unwrap_or(&0)))
            .sum()
    };
    let length = u32::try_from(body.len()).expect("a short message");
    let mut sum =
        words(&source.octets()) + words(&destination.octets()) + words(body) + length + 58;
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    (!u16::try_from(sum).expect("folded above")).to_be_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mac() -> Mac {
        "02:00:5e:10:00:01".parse().unwrap()
    }

    #[test]
    fn a_gratuitous_arp_has_the_sender_as_target() {
        let frame = arp(mac(), [10, 77, 1, 1].into(), 2);
        assert_eq!(frame.len(), 42);
        assert_eq!(frame[28..32], [10, 77, 1, 1]);
        assert_eq!(frame[38..42], [10, 77, 1, 1]);
    }

    #[test]
    fn an_advertisement_with_its_checksum_sums_up_to_nothing() {
        let address: Ipv6Addr = "fd00::77".parse().unwrap();
        let frame = advertisement(mac(), address);
        assert_eq!(frame.len(), 14 + 40 + 32);
        let all_nodes = "ff02::1".parse().unwrap();
        assert_eq!(checksum(address, all_nodes, &frame[54..]), [0, 0]);
    }

    #[test]
    fn loopback_addresses_are_nobodys_business() {
        assert!(frames_for(mac(), [127, 0, 0, 1].into()).is_empty());
    }
}
