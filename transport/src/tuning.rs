//! How the connections are set up: liveness, windows, buffers.

use std::sync::Arc;
use std::time::Duration;

use quinn::{IdleTimeout, MtuDiscoveryConfig, TransportConfig, VarInt};

/// How quickly a dead peer is noticed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Timing {
    /// A peer silent for this long is dead.
    pub idle: Duration,
    /// A sign of life is sent this often.
    pub keep_alive: Duration,
    /// A connection must stand within this time.
    pub connect: Duration,
}

impl Default for Timing {
    /// Dead within two seconds; five lost signs of life in a row on a busy machine are forgiven.
    fn default() -> Self {
        Self {
            idle: Duration::from_secs(2),
            keep_alive: Duration::from_millis(400),
            connect: Duration::from_secs(2),
        }
    }
}

/// Bulk streams of one link at a time.
pub(crate) const BULK_STREAMS: u32 = 16;
/// What a receiver holds unread per bulk stream, in bytes.
pub(crate) const STREAM_WINDOW: u32 = 4 << 20;
/// What a sender holds unacknowledged per connection, in bytes.
const SEND_WINDOW: u64 = 16 << 20;
/// Calls and control streams that a peer may have open at a time.
const CONTROL_STREAMS: u32 = 1024;
/// Wanted size of the socket's buffers, in bytes: with the default, a burst of a fast sender
/// overflows the receiver's and thousands of packets per GiB are lost.
pub(crate) const SOCKET_BUFFER: usize = 8 << 20;

fn base(timing: Timing) -> TransportConfig {
    let mut config = TransportConfig::default();
    let idle = IdleTimeout::try_from(timing.idle).unwrap_or(IdleTimeout::from(VarInt::MAX));
    let mut discovery = MtuDiscoveryConfig::default();
    // Ethernet with jumbo frames, less the headers; on a plain link the probes are few and lost.
    discovery.upper_bound(8952);
    config
        .max_idle_timeout(Some(idle))
        .keep_alive_interval(Some(timing.keep_alive))
        .mtu_discovery_config(Some(discovery))
        // LAN: the first flight should not wait for an estimate made for the Internet.
        .initial_rtt(Duration::from_millis(20))
        .datagram_receive_buffer_size(None);
    config
}

/// For calls and control streams.
pub(crate) fn services(timing: Timing) -> Arc<TransportConfig> {
    let mut config = base(timing);
    config
        .max_concurrent_bidi_streams(CONTROL_STREAMS.into())
        .max_concurrent_uni_streams(BULK_STREAMS.into())
        .stream_receive_window(STREAM_WINDOW.into())
        // Every stream can be full and there is still room for the others.
        .receive_window((STREAM_WINDOW * (BULK_STREAMS + 1)).into())
        .send_window(SEND_WINDOW);
    Arc::new(config)
}
