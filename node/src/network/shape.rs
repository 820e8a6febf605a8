//! Limits how fast an interface sends, with a token bucket.

use netlink_packet_core::DefaultNla;
use netlink_packet_route::{
    RouteNetlinkMessage,
    tc::{TcAttribute, TcHandle, TcMessage, TcOption},
};

use super::netlink::{CHANGE, Netlink, NetlinkError, PUT};

const TBF_PARAMETERS: u16 = 1;
const TBF_RATE64: u16 = 4;
const TBF_BURST: u16 = 6;
const LINKLAYER_ETHERNET: u8 = 1;

/// What is sent in one go at full speed, at least, in bytes: a few full segment trains.
const BURST_MIN: u64 = 128 << 10;

impl Netlink {
    /// Limits what the interface sends to this many bytes per second.
    pub fn limit_rate(&mut self, index: u32, bytes_per_s: u64) -> Result<(), NetlinkError> {
        let burst = (bytes_per_s / 250).max(BURST_MIN);
        let limit = bytes_per_s / 20 + burst; // 50 ms of queue
        let clamp = |value: u64| u32::try_from(value).unwrap_or(u32::MAX);
        let mut parameters = Vec::with_capacity(36);
        // struct tc_ratespec: cell_log, linklayer, overhead, cell_align, mpu, rate.
        parameters.extend([0, LINKLAYER_ETHERNET, 0, 0, 0, 0, 0, 0]);
        parameters.extend(clamp(bytes_per_s).to_ne_bytes());
        parameters.extend([0; 12]); // no peak rate
        parameters.extend(clamp(limit).to_ne_bytes());
        parameters.extend([0; 8]); // buffer and mtu: from TBF_BURST
        let options = vec![
            TcOption::Other(DefaultNla::new(TBF_PARAMETERS, parameters)),
            TcOption::Other(DefaultNla::new(TBF_RATE64, bytes_per_s.to_ne_bytes().to_vec())),
            TcOption::Other(DefaultNla::new(TBF_BURST, clamp(burst).to_ne_bytes().to_vec())),
        ];
        let mut message = root_qdisc(index);
        message.attributes.push(TcAttribute::Kind("tbf".into()));
        message.attributes.push(TcAttribute::Options(options));
        let message = RouteNetlinkMessage::NewQueueDiscipline(message);
        self.change("limit the rate of an interface", message, PUT)
    }

    /// Lifts the limit. That there is none is no error.
    pub fn lift_rate(&mut self, index: u32) -> Result<(), NetlinkError> {
        let message = RouteNetlinkMessage::DelQueueDiscipline(root_qdisc(index));
        match self.change("lift the limit of an interface", message, CHANGE) {
            Err(error) if matches!(error.errno(), Some(libc::ENOENT | libc::EINVAL)) => Ok(()),
            result => result,
        }
    }
}

fn root_qdisc(index: u32) -> TcMessage {
    let mut message = TcMessage::default();
    message.header.index = i32::try_from(index).expect("the kernel counts interfaces in an i32");
    message.header.parent = TcHandle::ROOT;
    message
}
