//! Multicast groups that sockets have joined.
//!
//! The kernel has no list for one socket; it can only be asked about each group that somebody
//! in the network has joined. Membership is bound to a network device of the source, so it is
//! refused and not guessed.

use std::{
    fs, io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use super::{
    address,
    find::{Object, Refusal},
};
use crate::sys::socket;

/// The groups of one network that are not joined by the kernel itself.
#[derive(Debug, Default)]
pub(super) struct Groups(Vec<(u32, IpAddr)>);

impl Groups {
    /// Of the network of a process.
    pub(super) fn of(host_pid: i32) -> io::Result<Self> {
        let read = |name: &str| fs::read_to_string(format!("/proc/{host_pid}/net/{name}"));
        let mut groups = read_v4(&read("igmp")?);
        // Without IPv6 there is no such file.
        groups.extend(read_v6(&read("igmp6").unwrap_or_default()));
        Ok(Self(groups))
    }

    /// Refuses a socket that has joined one.
    pub(super) fn check(&self, object: &Object, v6: bool) -> Result<(), Refusal> {
        for (device, group) in self.0.iter().filter(|(_, group)| v6 || group.is_ipv4()) {
            if is_member(object, *device, *group) {
                return Err(Refusal::new(
                    format!("a member of the multicast group {group}"),
                    "stop the program",
                ));
            }
        }
        Ok(())
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
        let [first, .., before_last, _] = group.segments();
        let all_nodes = group.segments()[1..7] == [0; 6] && group.segments()[7] <= 2;
        let solicited = first == 0xff02 && before_last >> 8 == 0xff;
        (!all_nodes && !solicited).then_some((device, group.into()))
    };
    text.lines().filter_map(entry).collect()
}

/// Whether the kernel knows a source filter of this socket for the group: every member has one.
fn is_member(object: &Object, device: u32, group: IpAddr) -> bool {
    const MCAST_MSFILTER: i32 = 48;
    // struct group_filter: the device, the group in 128 bytes, the mode, and how many sources.
    let mut filter = [0; 8 + 128 + 8 + 128];
    filter[..4].copy_from_slice(&device.to_ne_bytes());
    let encoded = address::encode_inet(&(group, 0).into());
    filter[8..8 + encoded.len()].copy_from_slice(&encoded);
    let level = if group.is_ipv4() { libc::IPPROTO_IP } else { libc::IPPROTO_IPV6 };
    socket::option(object.fd(), level, MCAST_MSFILTER, &mut filter).is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn groups_that_the_kernel_joins_itself_are_left_out() {
        let v4 = "Idx\tDevice    : Count Querier\tGroup    Users Timer\tReporter\n\
                  2\teth0      :     2      V3\n\
                  \t\t\t\tFB0000E0     1 0:00000000\t\t0\n\
                  \t\t\t\t010000E0     1 0:00000000\t\t0\n";
        assert_eq!(read_v4(v4), [(2, IpAddr::from([224, 0, 0, 251]))]);
        let v6 = "1    lo              ff020000000000000000000000000001     1 0000000C 0\n\
                  2    eth0            ff0200000000000000000001ff123456     1 00000004 0\n\
                  2    eth0            ff0200000000000000000000000000fb     1 00000004 0\n";
        assert_eq!(read_v6(v6), [(2, "ff02::fb".parse().unwrap())]);
    }
}
