//! What a connection has for itself, read from the kernel's record of it.
//!
//! Some twenty numbers, each of which costs a system call otherwise. That they are what the calls
//! tell is not believed but found out: see [`super::proof`] and [`super::told`].

use std::{
    io,
    net::{Ipv4Addr, Ipv6Addr, SocketAddr},
    ops::Range,
};

use crate::btf::Types;

/// Copies a few bytes.
pub(super) fn part<const SIZE: usize>(bytes: &[u8], at: usize) -> Option<[u8; SIZE]> {
    bytes.get(at..)?.first_chunk().copied()
}

/// A number of 64 bits.
pub(super) fn long(bytes: &[u8], at: usize) -> Option<u64> {
    part(bytes, at).map(u64::from_ne_bytes)
}

/// Where a number is that may be smaller than a byte.
#[derive(Clone, Copy, Debug)]
struct Number {
    bit: usize,
    bits: usize,
}

impl Number {
    /// The byte behind it.
    fn end(self) -> usize {
        (self.bit + self.bits).div_ceil(8)
    }

    fn of(self, sock: &[u8]) -> Option<u32> {
        let bytes = sock.get(self.bit / 8..self.end())?;
        let mut word = [0; 8];
        word.get_mut(..bytes.len())?.copy_from_slice(bytes);
        let word = u64::from_ne_bytes(word) >> (self.bit % 8);
        Some((word & ((1 << self.bits) - 1)) as u32)
    }
}

/// Where in a `struct tcp6_sock` the numbers are.
#[derive(Clone, Debug)]
pub(super) struct States {
    numbers: [Number; COUNT],
    /// Two bytes each, in the order of the network; the addresses have four, or sixteen.
    ports: [usize; 2],
    addresses: [usize; 2],
    addresses6: [usize; 2],
    /// Of 64 bits.
    active: usize,
}

const COUNT: usize = 24;

/// The places of [`NUMBERS`]; the window has five. The last three are about the buffers.
const RECEIVED: usize = 0;
const READ: usize = 1;
const WRITTEN: usize = 2;
const ACKNOWLEDGED: usize = 3;
const WINDOW: usize = 4;
const SEGMENT_SIZE: usize = 9;
const IS_SCALED: usize = 10;
const SCALE_SENDING: usize = 11;
const SCALE_RECEIVING: usize = 12;
const SELECTIVE: usize = 13;
const TIMESTAMPS: usize = 14;
const MICROSECONDS: usize = 15;
const CLOCK: usize = 16;
const URGENT: usize = 17;
const REPAIRED: usize = 18;
const REUSE: usize = 19;
const SIGNED: usize = 20;

/// Where the keys are with which segments are signed; a kernel can be one without them.
const KEYS: &str = "md5sig_info";

/// Structure, name, bits.
const NUMBERS: [(&str, &str, usize); COUNT] = [
    ("tcp_sock", "rcv_nxt", 32),
    ("tcp_sock", "copied_seq", 32),
    ("tcp_sock", "write_seq", 32),
    ("tcp_sock", "snd_una", 32),
    ("tcp_sock", "snd_wl1", 32),
    ("tcp_sock", "snd_wnd", 32),
    ("tcp_sock", "max_window", 32),
    ("tcp_sock", "rcv_wnd", 32),
    ("tcp_sock", "rcv_wup", 32),
    ("tcp_sock", "rx_opt.mss_clamp", 16),
    ("tcp_sock", "rx_opt.wscale_ok", 1),
    ("tcp_sock", "rx_opt.snd_wscale", 4),
    ("tcp_sock", "rx_opt.rcv_wscale", 4),
    ("tcp_sock", "rx_opt.sack_ok", 3),
    ("tcp_sock", "rx_opt.tstamp_ok", 1),
    ("tcp_sock", "tcp_usec_ts", 1),
    ("tcp_sock", "tsoffset", 32),
    ("tcp_sock", "urg_data", 16),
    ("tcp_sock", "repair", 1),
    ("sock_common", "skc_reuse", 4),
    ("tcp_sock", KEYS, 64),
    ("sock", "sk_sndbuf", 32),
    ("sock", "sk_rcvbuf", 32),
    ("sock", "sk_userlocks", 4),
];

impl States {
    pub(super) fn find(types: &Types) -> io::Result<Self> {
        let place = |structure, name| types.offset(structure, name).map(|at| at as usize);
        let mut numbers = [Number { bit: 0, bits: 0 }; COUNT];
        for (number, (structure, name, bits)) in numbers.iter_mut().zip(NUMBERS) {
            *number = match types.bit(structure, name) {
                // Of an address in the kernel the upper half is never 0.
                Ok(bit) if name == KEYS => Number { bit: bit as usize + 32, bits: 32 },
                Err(_) if name == KEYS => Number { bit: 0, bits: 0 },
                bit => Number { bit: bit? as usize, bits },
            };
        }
        let common = |name| place("sock_common", name);
        Ok(Self {
            numbers,
            ports: [place("inet_sock", "inet_sport")?, common("skc_dport")?],
            addresses: [common("skc_rcv_saddr")?, common("skc_daddr")?],
            addresses6: [common("skc_v6_rcv_saddr")?, common("skc_v6_daddr")?],
            active: place("tcp_sock", "tcp_mstamp")?,
        })
    }

    /// What has to be copied.
    pub(super) fn ranges(&self) -> impl Iterator<Item = Range<usize>> {
        let numbers = self.numbers.iter().map(|number| number.bit / 8..number.end());
        let ports = self.ports.iter().map(|&at| at..at + 2);
        let addresses = self.addresses.iter().map(|&at| at..at + 4);
        let addresses6 = self.addresses6.iter().map(|&at| at..at + 16);
        let active = std::iter::once(self.active..self.active + 8);
        numbers.chain(ports).chain(addresses).chain(addresses6).chain(active)
    }

    /// The same in a copy, where things are at other places.
    pub(super) fn moved(mut self, place: impl Fn(usize) -> usize) -> Self {
        for number in &mut self.numbers {
            number.bit = place(number.bit / 8) * 8 + number.bit % 8;
        }
        let inet = self.ports.iter_mut().chain(&mut self.addresses).chain(&mut self.addresses6);
        inet.chain([&mut self.active]).for_each(|at| *at = place(*at));
        self
    }

    pub(super) fn record(&self, sock: &[u8], v6: bool) -> Option<Record> {
        let mut numbers = [0; COUNT];
        for (value, number) in numbers.iter_mut().zip(&self.numbers) {
            *value = number.of(sock)?;
        }
        let address = |end: usize| -> Option<SocketAddr> {
            let port = u16::from_be_bytes(part(sock, self.ports[end])?);
            Some(match v6 {
                true => (Ipv6Addr::from(part::<16>(sock, self.addresses6[end])?), port).into(),
                false => (Ipv4Addr::from(part::<4>(sock, self.addresses[end])?), port).into(),
            })
        };
        let active_us = long(sock, self.active)?.cast_signed();
        Some(Record { local: address(0)?, remote: address(1)?, active_us, numbers })
    }
}

/// What is read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Record {
    pub(super) local: SocketAddr,
    pub(super) remote: SocketAddr,
    /// When something has come or gone last, as CLOCK_MONOTONIC of the host.
    pub(super) active_us: i64,
    numbers: [u32; COUNT],
}

impl Record {
    /// The sequence number behind what was received.
    pub(super) fn received(&self) -> u32 {
        self.numbers[RECEIVED]
    }

    /// The sequence number behind what was written.
    pub(super) fn written(&self) -> u32 {
        self.numbers[WRITTEN]
    }

    /// As `struct tcp_repair_window` has it.
    pub(super) fn window(&self) -> [u32; 5] {
        std::array::from_fn(|place| self.numbers[WINDOW + place])
    }

    /// Largest segment, `TCP_MAXSEG` in repair mode.
    pub(super) fn segment_size(&self) -> u32 {
        self.numbers[SEGMENT_SIZE]
    }

    /// Ours for sending, ours for receiving.
    pub(super) fn window_scale(&self) -> Option<(u8, u8)> {
        let scales = || (self.numbers[SCALE_SENDING] as u8, self.numbers[SCALE_RECEIVING] as u8);
        (self.numbers[IS_SCALED] != 0).then(scales)
    }

    pub(super) fn selective_acknowledgement(&self) -> bool {
        self.numbers[SELECTIVE] != 0
    }

    pub(super) fn has_timestamps(&self) -> bool {
        self.numbers[TIMESTAMPS] != 0
    }

    /// Whether timestamps count microseconds.
    pub(super) fn is_in_microseconds(&self) -> bool {
        self.numbers[MICROSECONDS] != 0
    }

    /// How far timestamps are ahead of the kernel's clock.
    pub(super) fn clock(&self) -> u32 {
        self.numbers[CLOCK]
    }

    pub(super) fn is_repaired(&self) -> bool {
        self.numbers[REPAIRED] != 0
    }

    /// `SO_REUSEADDR`.
    pub(super) fn reuse(&self) -> i32 {
        self.numbers[REUSE].cast_signed()
    }

    /// `SO_SNDBUF`, `SO_RCVBUF` and `SO_BUF_LOCK`.
    pub(super) fn buffers(&self) -> [u32; 3] {
        /// `SOCK_BUF_LOCK_MASK`
        const MASK: u32 = 3;
        let [.., send, receive, locks] = self.numbers;
        [send, receive, locks & MASK]
    }

    /// Whether it has keys with which segments are signed.
    pub(super) fn is_signed(&self) -> bool {
        self.numbers[SIGNED] != 0
    }

    /// Whether everything is read and acknowledged, and there is nothing unusual about it: then the
    /// record tells all. An address within a link says nothing without the link.
    pub(super) fn is_complete(&self) -> bool {
        let is_plain = |address: SocketAddr| match address {
            SocketAddr::V6(v6) => !v6.ip().is_unicast_link_local() && !v6.ip().is_unspecified(),
            SocketAddr::V4(v4) => !v4.ip().is_unspecified(),
        };
        self.numbers[RECEIVED] == self.numbers[READ]
            && self.numbers[WRITTEN] == self.numbers[ACKNOWLEDGED]
            && self.numbers[URGENT] == 0
            && !self.is_signed()
            && is_plain(self.local)
            && is_plain(self.remote)
    }
}
