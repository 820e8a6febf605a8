//! Keeps the frames for a VE while it is moved, and delivers them afterwards.
//!
//! A lost frame costs the client a retransmission timeout, 200 ms and more: longer than the whole
//! blackout. So the frames are *held*. Beside the VE's port on the bridge stands a TAP, and the
//! bridge's entry for the VE's hardware address points to one of the two:
//!
//! ```text
//!   running     LAN ── bridge ──▶ veth ── VE          TAP
//!   held        LAN ── bridge ─┐  veth ── VE
//!                              └────────▶ TAP   frames wait in its queue
//!   replayed    LAN ── bridge ──▶ veth ── VE
//!                                  ▲
//!      frames held here and there ─┘  straight into the pair, past the bridge
//! ```
//!
//! The order of use on the source: [`Hold::prepare`] during pre-copy, [`Hold::cut`] right after
//! the freeze, [`Hold::drain`], and either [`Hold::open_outgoing`] before the VE goes on and
//! [`Hold::reopen`] afterwards, or, once the VE runs elsewhere, more `drain` for the late ones and
//! [`Hold::remove`]. On the target: `prepare`, `cut`, `open_outgoing` when the VE may speak,
//! [`Hold::replay`] with the source's frames, [`Hold::release`], `replay` for the source's late
//! ones, `remove`.
//!
//! Frames keep their order. Those that arrive in the microseconds in which the bridge's entry is
//! turned back to the VE may overtake the last held ones; none is lost.
//!
//! Dropping a hold removes the TAP. It does not open the gate: who drops it by accident has a VE
//! that is silent, and [`super::Interface::set_gate`] makes it speak again.

use std::os::fd::{AsFd, BorrowedFd};

use ckpt_engine::sys::{
    packet::{FrameHeader, PacketSender},
    tap::{FRAME_MAX, Tap, VNET_HEADER},
};
use ckpt_format::network::{Frame, Mac};
use netlink_packet_route::link::{InfoBridgePort, LinkAttribute};

use super::{
    Interface, NetworkError, backlog,
    interface::{Gate, gate_properties, gate_requests},
    link::{fdb_removal_request, fdb_request, port_request},
    netlink::{Netlink, NetlinkError},
    system,
};

/// How many frames the TAP's queue takes before the kernel drops the next.
pub const QUEUE_FRAMES: u32 = 8192;
/// One drain returns at most this many bytes; what is left waits in the queue.
pub const DRAIN_BYTES_MAX: usize = 64 << 20;

/// Frames that were held.
#[derive(Debug, Default)]
pub struct Drained {
    /// In the order in which they arrived.
    pub frames: Vec<Frame>,
    /// How many frames did not fit into the queue since the hold was cut.
    pub lost: u64,
}

/// A hold on the frames of one VE.
#[derive(Debug)]
pub struct Hold {
    netlink: Netlink,
    tap: Tap,
    tap_index: u32,
    interface: Interface,
    sender: PacketSender,
    buffer: Vec<u8>,
}

impl Hold {
    /// Makes the TAP called `tap_name` beside the VE's port. Nothing changes for the VE.
    pub fn prepare(interface: &Interface, tap_name: &str) -> Result<Self, NetworkError> {
        let tap = Tap::create(tap_name).map_err(system("make a TAP"))?;
        let mut netlink = Netlink::open()?;
        let tap_index = netlink.index(tap_name)?;
        netlink.keep_silent(tap_index)?;
        let queue = vec![LinkAttribute::TxQueueLen(QUEUE_FRAMES)];
        netlink.set_attributes("set the queue of a TAP", tap_index, queue)?;
        netlink.enslave(tap_index, interface.bridge.index)?;
        netlink.change_all("silence a port", [port_request(tap_index, tap_properties(false))])?;
        netlink.set_up(tap_index)?;
        let sender = PacketSender::open(interface.host_index, FrameHeader::Vnet)
            .map_err(system("open a packet socket"))?;
        let interface = interface.clone();
        Ok(Self { netlink, tap, tap_index, interface, sender, buffer: vec![0; FRAME_MAX] })
    }

    /// From now on no frame passes between VE and bridge; those for the VE are held. What was
    /// under way to it or from it has arrived.
    pub fn cut(&mut self) -> Result<(), NetworkError> {
        let veth = self.interface.host_index;
        // The group frames reach the TAP before they stop reaching the VE: twice is better
        // than never, for an ARP request.
        let requests = [
            port_request(self.tap_index, tap_properties(true)),
            fdb_request(self.interface.mac, self.tap_index),
        ];
        self.netlink.change_all("hold the frames of a VE", requests)?;
        // What the VE sent just before it was frozen passes the gate before that is closed, and
        // what went to the VE is in its sockets before they are read.
        backlog::settle();
        let closed = port_request(veth, gate_properties(false, false));
        self.netlink.change_all("silence a VE", [closed])?;
        Ok(())
    }

    /// Takes the frames held so far, without waiting.
    pub fn drain(&mut self) -> Result<Drained, NetworkError> {
        Ok(Drained { frames: self.read_all()?, lost: self.lost()? })
    }

    /// Lets the VE send, while frames for it are still held.
    pub fn open_outgoing(&mut self) -> Result<(), NetworkError> {
        let request = port_request(self.interface.host_index, gate_properties(true, false));
        self.netlink.change_all("let a VE send", [request])?;
        Ok(())
    }

    /// Delivers frames to the VE, straight into its interface. Returns how many the kernel took:
    /// a frame that it refuses (one too long for this link, say) is as lost as on any wire.
    pub fn replay<'a>(&self, frames: impl IntoIterator<Item = &'a Frame>) -> usize {
        let mut delivered = 0;
        for frame in frames {
            // Shorter than its headers: damaged, and the kernel would refuse it anyway.
            if frame.bytes.len() > VNET_HEADER + 14 && self.sender.send(&frame.bytes).is_ok() {
                delivered += 1;
            }
        }
        delivered
    }

    /// Delivers what is held here, then lets the bridge deliver again. Returns how many frames
    /// were delivered.
    pub fn release(&mut self) -> Result<usize, NetworkError> {
        let mut delivered = 0;
        loop {
            let frames = self.read_all()?;
            if frames.is_empty() {
                break;
            }
            delivered += self.replay(&frames);
        }
        // One request alone, and at once the frames that came meanwhile: the shorter this is,
        // the fewer frames are overtaken.
        let (message, flags) = fdb_request(self.interface.mac, self.interface.host_index);
        self.netlink.change("release the frames of a VE", message, flags)?;
        let last = self.read_all()?;
        delivered += self.replay(&last);
        let mut requests = gate_requests(&self.interface, Gate::Open);
        requests.push(port_request(self.tap_index, tap_properties(false)));
        self.netlink.change_all("release the frames of a VE", requests)?;
        let last = self.read_all()?;
        Ok(delivered + self.replay(&last))
    }

    /// Takes back a [`Hold::cut`]: the VE goes on here and gets all that was held, after the
    /// frames in `taken`, which were drained before.
    pub fn reopen(&mut self, taken: &[Frame]) -> Result<usize, NetworkError> {
        self.open_outgoing()?;
        let delivered = self.replay(taken);
        Ok(delivered + self.release()?)
    }

    /// Ends the hold. What still waits in the TAP is dropped.
    pub fn remove(mut self) -> Result<(), NetworkError> {
        let (message, flags) = fdb_removal_request(self.interface.mac, self.tap_index);
        match self.netlink.change("forget an address", message, flags) {
            Err(error) if error.errno() == Some(libc::ENOENT) => {}
            result => result?,
        }
        Ok(self.netlink.remove_link(self.tap_index)?)
    }

    fn read_all(&mut self) -> Result<Vec<Frame>, NetworkError> {
        let mut frames = Vec::new();
        let mut bytes = 0;
        while bytes < DRAIN_BYTES_MAX {
            let Some(length) =
                self.tap.read(&mut self.buffer).map_err(system("read from a TAP"))?
            else {
                break;
            };
            let frame = &self.buffer[..length];
            if is_for(frame, self.interface.mac) {
                bytes += length;
                frames.push(Frame { bytes: frame.to_vec() });
            }
        }
        Ok(frames)
    }

    fn lost(&mut self) -> Result<u64, NetlinkError> {
        let link = self.netlink.link_at(self.tap_index)?;
        Ok(link
            .into_iter()
            .flat_map(|link| link.attributes)
            .find_map(|attribute| match attribute {
                LinkAttribute::Stats64(stats) => Some(stats.tx_dropped),
                _ => None,
            })
            .unwrap_or(0))
    }
}

impl AsFd for Hold {
    /// Readable when frames are held.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.tap.as_fd()
    }
}

/// A TAP never learns who is behind it, and sees group frames only while it stands for the VE.
fn tap_properties(holding: bool) -> Vec<InfoBridgePort> {
    vec![
        InfoBridgePort::Learning(false),
        InfoBridgePort::UnicastFlood(false),
        InfoBridgePort::MulticastFlood(holding),
        InfoBridgePort::BroadcastFlood(holding),
    ]
}

/// True for a frame to the VE alone or to a group; behind its header stands the destination.
fn is_for(frame: &[u8], mac: Mac) -> bool {
    match frame.get(VNET_HEADER..VNET_HEADER + 6) {
        Some(destination) => destination[0] & 1 == 1 || destination == mac.bytes(),
        None => false,
    }
}
