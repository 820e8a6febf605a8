//! Where the kernel keeps what is read about sockets.
//!
//! The kernel itself describes it ([`Types`]). A `struct tcp6_sock` has more than two thousand bytes,
//! of which a quarter is of interest, in some dozen pieces: only those are copied, one behind the
//! other.

use std::{collections::BTreeMap, io, ops::Range};

use super::record::States;
use crate::btf::Types;

/// Members in which options are kept: structure, name, bits. A kernel that has them elsewhere is
/// one where the options do not show.
const MEMBERS: &[(&str, &str, u32)] = &[
    ("sock_common", "skc_reuse", 4),
    ("sock_common", "skc_reuseport", 1),
    ("sock_common", "skc_ipv6only", 1),
    ("sock_common", "skc_bound_dev_if", 32),
    ("sock_common", "skc_flags", 64),
    ("sock", "sk_filter", 64),
    ("sock", "sk_rcvlowat", 32),
    ("sock", "sk_priority", 32),
    ("sock", "sk_mark", 32),
    ("sock", "sk_peek_off", 32),
    ("sock", "sk_tsflags", 32),
    ("sock", "sk_bind_phc", 32),
    ("sock", "sk_rcvtimeo", 64),
    ("sock", "sk_sndtimeo", 64),
    ("sock", "sk_lingertime", 64),
    ("sock", "sk_max_pacing_rate", 64),
    ("sock", "sk_ll_usec", 32),
    ("sock", "sk_prefer_busy_poll", 8),
    ("sock", "sk_no_check_tx", 1),
    ("sock", "sk_clockid", 8),
    ("sock", "sk_txtime_deadline_mode", 1),
    ("sock", "sk_txtime_report_errors", 1),
    ("inet_sock", "inet_flags", 64),
    ("inet_sock", "inet_opt", 64),
    ("inet_sock", "uc_ttl", 16),
    ("inet_sock", "uc_index", 32),
    ("inet_sock", "tos", 8),
    ("inet_sock", "min_ttl", 8),
    ("inet_sock", "pmtudisc", 8),
    ("inet_sock", "local_port_range", 32),
    ("inet_connection_sock", "icsk_syn_retries", 8),
    ("inet_connection_sock", "icsk_ca_ops", 64),
    ("inet_connection_sock", "icsk_user_timeout", 32),
    ("inet_connection_sock", "icsk_rto_max", 32),
    ("tcp_sock", "nonagle", 4),
    ("tcp_sock", "thin_lto", 1),
    ("tcp_sock", "recvmsg_inq", 1),
    ("tcp_sock", "keepalive_time", 32),
    ("tcp_sock", "keepalive_intvl", 32),
    ("tcp_sock", "keepalive_probes", 8),
    ("tcp_sock", "linger2", 32),
    ("tcp_sock", "notsent_lowat", 32),
    ("tcp_sock", "tcp_tx_delay", 32),
];

/// Those of an IPv6 socket.
const MEMBERS6: &[(&str, &str, u32)] = &[
    ("ipv6_pinfo", "opt", 64),
    ("ipv6_pinfo", "hop_limit", 16),
    ("ipv6_pinfo", "pmtudisc", 8),
    ("ipv6_pinfo", "tclass", 8),
    ("ipv6_pinfo", "frag_size", 32),
    ("ipv6_pinfo", "ucast_oif", 32),
    ("ipv6_pinfo", "rxopt", 16),
    ("ipv6_pinfo", "srcprefs", 8),
    ("ipv6_pinfo", "min_hopcount", 8),
];

/// Where a member is, in bytes; of one that is smaller than a byte, which bits.
#[derive(Clone, Copy, Debug)]
struct Member {
    at: usize,
    len: usize,
    mask: u8,
}

impl Member {
    /// `base` is where the structure begins.
    fn find(types: &Types, base: u32, member: &(&str, &str, u32)) -> Option<Self> {
        let &(structure, name, bits) = member;
        let bit = types.bit(structure, name).ok()?;
        let (at, len) = ((base + bit / 8) as usize, bits.div_ceil(8) as usize);
        let mask = if bits < 8 { (((1u16 << bits) - 1) << (bit % 8)) as u8 } else { 0xff };
        Some(Self { at, len, mask })
    }

    fn range(&self) -> Range<usize> {
        self.at..self.at + self.len
    }
}

/// Pieces of a structure, each copied as a whole.
#[derive(Clone, Debug, Default)]
struct Pieces(Vec<Range<usize>>);

impl Pieces {
    /// That hold all of these.
    fn of(ranges: impl Iterator<Item = Range<usize>>) -> Self {
        /// A piece more takes longer than so many bytes.
        const APART: usize = 64;
        let mut ranges: Vec<_> = ranges.collect();
        ranges.sort_unstable_by_key(|range| range.start);
        let mut pieces: Vec<Range<usize>> = Vec::new();
        for range in ranges {
            match pieces.last_mut() {
                Some(last) if range.start <= last.end + APART => last.end = last.end.max(range.end),
                _ => pieces.push(range),
            }
        }
        Self(pieces)
    }

    /// Where something is in the copy.
    fn place(&self, at: usize) -> usize {
        let before = self.0.iter().take_while(|piece| piece.end <= at);
        let start = self.0.iter().find(|piece| piece.contains(&at)).map_or(at, |it| it.start);
        before.map(ExactSizeIterator::len).sum::<usize>() + at - start
    }
}

/// What of a copy is of interest.
#[derive(Clone, Debug, Default)]
pub(super) struct Kept(Vec<(Range<usize>, Vec<u8>)>);

impl Kept {
    /// These members, which `place` finds in the copy. Several may share a byte.
    fn of<'a>(members: impl Iterator<Item = &'a Member>, place: impl Fn(usize) -> usize) -> Self {
        let mut masks: BTreeMap<usize, u8> = BTreeMap::new();
        for member in members {
            for at in member.range() {
                *masks.entry(place(at)).or_default() |= member.mask;
            }
        }
        let mut kept: Vec<(Range<usize>, Vec<u8>)> = Vec::new();
        for (at, mask) in masks {
            match kept.last_mut() {
                Some((range, masks)) if range.end == at => {
                    range.end += 1;
                    masks.push(mask);
                }
                _ => kept.push((at..at + 1, vec![mask])),
            }
        }
        Self(kept)
    }

    /// That of one copy.
    pub(super) fn take(&self, copy: &[u8]) -> Option<Vec<u8>> {
        let mut all = Vec::with_capacity(self.0.iter().map(|(range, _)| range.len()).sum());
        for (range, masks) in &self.0 {
            let bytes = copy.get(range.clone())?;
            all.extend(bytes.iter().zip(masks).map(|(byte, mask)| byte & mask));
        }
        Some(all)
    }
}

/// Where everything is in the running kernel.
#[derive(Clone, Debug)]
pub(super) struct Layout {
    /// The kernel's function that shows files.
    pub(super) iterator: u32,
    pub(super) file_inode: u32,
    pub(super) file_private: u32,
    pub(super) file_flags: u32,
    pub(super) file_owner: u32,
    pub(super) inode_mode: u32,
    pub(super) inode_number: u32,
    pub(super) inode_locks: u32,
    pub(super) task_files: u32,
    pub(super) files_table: u32,
    pub(super) table_closing: u32,
    pub(super) socket_sock: u32,
    /// What is copied of a `struct tcp6_sock`.
    pub(super) pieces: Vec<Range<usize>>,
    /// What in the copy is that of options and the network: of IPv4 and of IPv6 sockets.
    pub(super) options: [Kept; 2],
    /// In the copy.
    pub(super) family: usize,
    pub(super) state: usize,
    pub(super) protocol: usize,
    /// What handles the data of a connection instead of TCP, such as TLS.
    pub(super) upper: usize,
    /// What a connection has for itself, where the kernel keeps it as we know it.
    pub(super) states: Option<States>,
    /// The members in which options are kept, as far as there are any with their names.
    pub(super) names: Vec<&'static str>,
}

impl Layout {
    pub(super) fn find() -> io::Result<Self> {
        let types = Types::read()?;
        // Each of them begins with the one before.
        let nested = [
            types.offset("sock", "__sk_common")?,
            types.offset("inet_sock", "sk")?,
            types.offset("inet_connection_sock", "icsk_inet")?,
            types.offset("tcp_sock", "inet_conn")?,
            types.offset("tcp6_sock", "tcp")?,
        ];
        if nested != [0; 5] {
            return Err(io::ErrorKind::Unsupported.into());
        }
        let place = |structure, member| types.offset(structure, member).map(|at| at as usize);
        let whole = |at, len| Member { at, len, mask: 0xff };
        let all = |base, members: &[(&str, &str, u32)]| -> Vec<Member> {
            members.iter().filter_map(|member| Member::find(&types, base, member)).collect()
        };
        let mut members = all(0, MEMBERS);
        members.push(whole(place("sock_common", "skc_net")?, 8));
        members.push(whole(place("sock_common", "skc_family")?, 2));
        let members6 = all(types.offset("tcp6_sock", "inet6")?, MEMBERS6);
        let own = [
            whole(place("sock_common", "skc_state")?, 1),
            whole(place("sock", "sk_protocol")?, 2),
            whole(place("inet_connection_sock", "icsk_ulp_ops")?, 8),
        ];
        let family = place("sock_common", "skc_family")?;
        let states = States::find(&types).ok();
        let ranges = states.iter().flat_map(States::ranges);
        let known = members.iter().chain(&members6).chain(&own).map(Member::range);
        let pieces = Pieces::of(known.chain(ranges));
        let copied = |at| pieces.place(at);
        let options =
            [Kept::of(members.iter(), copied), Kept::of(members.iter().chain(&members6), copied)];
        let [state, protocol, upper] = own.map(|member| copied(member.at));
        let is_there = |it: &&(&str, &str, u32)| types.bit(it.0, it.1).is_ok();
        let names = MEMBERS.iter().chain(MEMBERS6).filter(is_there).map(|it| it.1).collect();
        Ok(Self {
            names,
            iterator: types.function("bpf_iter_task_file")?,
            file_inode: types.offset("file", "f_inode")?,
            file_private: types.offset("file", "private_data")?,
            file_flags: types.offset("file", "f_flags")?,
            file_owner: types.offset("file", "f_owner")?,
            inode_mode: types.offset("inode", "i_mode")?,
            inode_number: types.offset("inode", "i_ino")?,
            inode_locks: types.offset("inode", "i_flctx")?,
            task_files: types.offset("task_struct", "files")?,
            files_table: types.offset("files_struct", "fdt")?,
            table_closing: types.offset("fdtable", "close_on_exec")?,
            socket_sock: types.offset("socket", "sk")?,
            options,
            family: copied(family),
            state,
            protocol,
            upper,
            states: states.map(|states| states.moved(copied)),
            pieces: pieces.0,
        })
    }

    /// How long the copy is.
    pub(super) fn len(&self) -> usize {
        self.pieces.iter().map(ExactSizeIterator::len).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_near_is_one_piece_and_is_found_in_the_copy() {
        let pieces = Pieces::of([1000..1004, 8..16, 20..24, 1002..1010].into_iter());
        assert_eq!(pieces.0, [8..24, 1000..1010]);
        assert_eq!([8, 20, 1000, 1009].map(|at| pieces.place(at)), [0, 12, 16, 25]);
    }

    #[test]
    fn of_a_copy_only_the_bits_of_members_are_kept() {
        let member = |at, len, mask| Member { at, len, mask };
        let members = [member(2, 2, 0xff), member(6, 1, 0x03), member(6, 1, 0x10)];
        let kept = Kept::of(members.iter(), |at| at - 2);
        assert_eq!(kept.take(&[1, 2, 3, 4, 0xff, 6]).unwrap(), [1, 2, 0x13]);
        assert_eq!(kept.take(&[1, 2, 3]), None);
    }
}
