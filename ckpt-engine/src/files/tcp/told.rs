//! A connection as the kernel's record tells it.
//!
//! Its timestamp is told by comparison: one connection is asked, and those of the others are as far
//! from it as their records are from its record. The same one shows whether records tell the truth:
//! what its record tells must be what it has answered.

use ckpt_format::files::{TcpClosing, TcpConnection};

use super::record::Record;

/// How long before the VE stopped the last packet must have come or gone, in µs. All that the VE had
/// sent by then has left the host: a limit of its rate keeps packets for 50 ms at most.
pub(super) const REST_US: i64 = 100_000;

/// Whether nothing has come or gone for a while before this moment.
pub(super) fn rests(record: &Record, now_us: i64) -> bool {
    // What was received last is acknowledged: nothing is left to be sent.
    record.window()[4] == record.received() && now_us - record.active_us >= REST_US
}

/// An open connection with nothing in its queues, as its record tells it.
pub(super) fn connection(record: &Record, timestamp: Option<u32>, quiet: bool) -> TcpConnection {
    TcpConnection {
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
        window: record.window(),
    }
}

/// A connection that was asked.
#[derive(Debug)]
pub(super) struct Reference {
    pub(super) record: Record,
    pub(super) timestamp: Option<u32>,
    /// When the VE stopped.
    pub(super) stopped_us: i64,
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
        Some(connection(record, timestamp, rests(record, self.stopped_us)))
    }

    /// Whether it is quiet itself.
    pub(super) fn is_quiet(&self) -> bool {
        rests(&self.record, self.stopped_us)
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
}
