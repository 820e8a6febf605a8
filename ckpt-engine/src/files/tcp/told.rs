//! A connection as the kernel's record tells it.
//!
//! What counts time is told by comparison: one connection is asked, and the others are as far from
//! it as their records are from its record. The same one shows whether records tell the truth: what
//! its record tells must be what it has answered.

use ckpt_format::files::{TcpClosing, TcpConnection};

use super::{capture::QUIET_MS, record::Record};

/// How long a tick of the kernel is, in µs.
#[derive(Clone, Copy, Debug)]
pub(super) struct Tick {
    pub(super) least_us: i64,
    pub(super) most_us: i64,
}

/// A connection that was asked.
#[derive(Debug)]
pub(super) struct Reference {
    pub(super) record: Record,
    pub(super) timestamp: Option<u32>,
    pub(super) silent_ms: u32,
    pub(super) tick: Tick,
}

impl Reference {
    /// What [`super::capture::connection`] would tell of an open connection with this record;
    /// nothing if it has to be asked.
    pub(super) fn connection(&self, record: &Record) -> Option<TcpConnection> {
        if !record.is_complete() {
            return None;
        }
        let timestamp = match record.has_timestamps() {
            true => Some(self.timestamp(record)?),
            false => None,
        };
        let window = record.window();
        // The last acknowledgement went out before packets were held, and not just now.
        let quiet = window[4] == record.received() && self.silent_ms(record) >= i64::from(QUIET_MS);
        Some(TcpConnection {
            remote: record.remote,
            closing: TcpClosing::Open,
            quiet,
            unread: Vec::new(),
            receive_sequence: record.received(),
            unsent: 0,
            unacknowledged: Vec::new(),
            send_sequence: record.written(),
            segment_size: record.segment_size(),
            window_scale: record.window_scale(),
            selective_acknowledgement: record.selective_acknowledgement(),
            timestamp,
            window,
        })
    }

    fn timestamp(&self, record: &Record) -> Option<u32> {
        let micro = record.is_in_microseconds();
        if micro != self.record.is_in_microseconds() {
            return None;
        }
        let ahead = record.clock().wrapping_sub(self.record.clock());
        // The last bit says in what it counts.
        let timestamp = self.timestamp?.wrapping_add(ahead) & !1;
        Some(timestamp | u32::from(micro))
    }

    /// How long nothing was received, at least.
    pub(super) fn silent_ms(&self, record: &Record) -> i64 {
        let earlier = self.record.last_received().wrapping_sub(record.last_received());
        let earlier = i64::from(earlier.cast_signed());
        let tick_us = if earlier < 0 { self.tick.most_us } else { self.tick.least_us };
        i64::from(self.silent_ms) + tick_us * earlier / 1000
    }
}
