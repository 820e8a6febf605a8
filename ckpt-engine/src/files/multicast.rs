//! Multicast groups that sockets have joined.
//!
//! The kernel has no list for one socket; it can only be asked about each group that somebody
//! in the network has joined. Membership is bound to the number of a device, which is the same on
//! the target.

use std::{
    fs, io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    os::fd::BorrowedFd,
};

use ckpt_format::files::Membership;

use super::{address, find::Refusal};
use crate::sys::socket;

const MCAST_JOIN_GROUP: i32 = 42;
const MCAST_MSFILTER: i32 = 48;
/// The size of `struct sockaddr_storage`.
const ADDRESS: usize = 128;
/// `struct group_filter` before its list of sources: device, group, mode, number of sources.
const FILTER: usize = 8 + ADDRESS + 8;
/// More sources than a sysctl allows by default.
const SOURCES: usize = 64;

/// The groups of one network, by device.
#[derive(Debug, Default)]
pub(super) struct Groups(Vec<(u32, IpAddr)>);

impl Groups {
    /// Of the network of the calling thread.
    pub(super) fn here() -> io::Result<Self> {
        let read = |name: &str| fs::read_to_string(format!("/proc/thread-self/net/{name}"));
        let mut groups = read_v4(&read("igmp")?);
        // Without IPv6 there is no such file.
        groups.extend(read_v6(&read("igmp6").unwrap_or_default()));
        Ok(Self(groups))
    }

    /// Those that a socket has joined.
    pub(super) fn of_socket(
        &self,
        fd: BorrowedFd<'_>,
        v6: bool,
    ) -> Result<Vec<Membership>, Refusal> {
        let asked = self.0.iter().filter(|(_, group)| v6 || group.is_ipv4());
        asked.filter_map(|&(device, group)| membership(fd, device, group).transpose()).collect()
    }
}

/// "2  eth0 : 1  V3" and below it "    FB0000E0  1 0:00000000 0".
fn read_v4(text: &str) -> Vec<(u32, IpAddr)> {
    let mut device = 0;
    let mut groups = Vec::new();
    for line in text.lines().skip(1) {
        let Some(first) = line.split_whitespace().next() else { continue };
        if !line.starts_with([' ', '\t']) {
            device = first.parse().unwrap_or(0);
        } else if let Ok(word) = u32::from_str_radix(first, 16) {
            let group = Ipv4Addr::from(word.to_ne_bytes());
            // Of all hosts, which no program needs to join.
            if group != Ipv4Addr::new(224, 0, 0, 1) {
                groups.push((device, group.into()));
            }
        }
    }
    groups
}

/// "2  eth0  ff0200000000000000000001ff000001  1 00000004 0".
fn read_v6(text: &str) -> Vec<(u32, IpAddr)> {
    let entry = |line: &str| -> Option<(u32, IpAddr)> {
        let mut words = line.split_whitespace();
        let device = words.next()?.parse().ok()?;
        let group = Ipv6Addr::from(u128::from_str_radix(words.nth(1)?, 16).ok()?);
        Some((device, group.into()))
    };
    text.lines().filter_map(entry).collect()
}

fn put_address(bytes: &mut [u8], group: IpAddr) {
    let encoded = address::encode_inet(&(group, 0).into());
    bytes[..encoded.len()].copy_from_slice(&encoded);
}

fn level(group: IpAddr) -> i32 {
    if group.is_ipv4() { libc::IPPROTO_IP } else { libc::IPPROTO_IPV6 }
}

fn word(bytes: &[u8], at: usize) -> usize {
    let word = bytes.get(at..at + 4).and_then(|word| word.try_into().ok());
    word.map_or(0, u32::from_ne_bytes) as usize
}

/// Whether the kernel knows a source filter of this socket for the group: every member has one.
fn membership(
    fd: BorrowedFd<'_>,
    device: u32,
    group: IpAddr,
) -> Result<Option<Membership>, Refusal> {
    let mut filter = [0; FILTER + SOURCES * ADDRESS];
    filter[..4].copy_from_slice(&device.to_ne_bytes());
    put_address(&mut filter[8..], group);
    filter[FILTER - 4..FILTER].copy_from_slice(&(SOURCES as u32).to_ne_bytes());
    let Ok(length) = socket::option(fd, level(group), MCAST_MSFILTER, &mut filter) else {
        return Ok(None);
    };
    let count = word(&filter, FILTER - 4);
    if count > SOURCES {
        let what = format!("a member of the multicast group {group} with {count} sources");
        return Err(Refusal::new(what, "stop the program"));
    }
    let list = filter.get(FILTER..length.min(filter.len())).unwrap_or_default();
    let sources = list.chunks_exact(ADDRESS).take(count);
    let sources = sources.map(|bytes| Ok(address::decode_inet(bytes)?.ip()));
    Ok(Some(Membership {
        device,
        group,
        sources: sources.collect::<io::Result<_>>()?,
        exclude: word(&filter, FILTER - 8) == 0,
    }))
}

/// Joins the groups again.
pub(super) fn rebuild(fd: BorrowedFd<'_>, groups: &[Membership]) -> io::Result<()> {
    for membership in groups {
        let level = level(membership.group);
        let mut bytes = vec![0; 8 + ADDRESS];
        bytes[..4].copy_from_slice(&membership.device.to_ne_bytes());
        put_address(&mut bytes[8..], membership.group);
        socket::set_option(fd, level, MCAST_JOIN_GROUP, &bytes)?;
        if membership.exclude && membership.sources.is_empty() {
            continue;
        }
        bytes.extend(u32::from(!membership.exclude).to_ne_bytes());
        bytes.extend((membership.sources.len() as u32).to_ne_bytes());
        for &source in &membership.sources {
            let start = bytes.len();
            bytes.resize(start + ADDRESS, 0);
            put_address(&mut bytes[start..], source);
        }
        socket::set_option(fd, level, MCAST_MSFILTER, &bytes)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tables_of_groups_are_read() {
        let v4 = "Idx\tDevice    : Count Querier\tGroup    Users Timer\tReporter\n\
                  2\teth0      :     2      V3\n\
                  \t\t\t\tFB0000E0     1 0:00000000\t\t0\n\
                  \t\t\t\t010000E0     1 0:00000000\t\t0\n";
        assert_eq!(read_v4(v4), [(2, IpAddr::from([224, 0, 0, 251]))]);
        let v6 = "2    eth0            ff0200000000000000000000000000fb     1 00000004 0\n";
        assert_eq!(read_v6(v6), [(2, "ff02::fb".parse().unwrap())]);
    }
}
