//! An AF_PACKET socket that only sends: whole Ethernet frames, out of one interface.

use std::{
    io,
    os::fd::{AsRawFd, FromRawFd, OwnedFd},
};

/// A sender of raw frames. It never receives anything.
#[derive(Debug)]
pub struct PacketSender {
    fd: OwnedFd,
}

/// What stands in front of each frame that is sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FrameHeader {
    /// Nothing: the frame is complete.
    None,
    /// A `virtio_net_hdr` of [`super::tap::VNET_HEADER`] bytes, as read from a TAP.
    Vnet,
}

impl PacketSender {
    /// Opens a sender on the interface with this index, in the network namespace of the calling
    /// thread. It stays in that namespace wherever it is used.
    pub fn open(interface: u32, header: FrameHeader) -> io::Result<Self> {
        // SAFETY: plain numbers; the result is checked before it is used.
        let raw = unsafe { libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_CLOEXEC, 0) };
        let raw = nix::errno::Errno::result(raw)?;
        // SAFETY: the descriptor was just made and belongs to nobody else.
        let fd = unsafe { OwnedFd::from_raw_fd(raw) };
        if header == FrameHeader::Vnet {
            let on: libc::c_int = 1;
            // SAFETY: the option's value is a c_int that lives across the call.
            let result = unsafe {
                libc::setsockopt(
                    fd.as_raw_fd(),
                    libc::SOL_PACKET,
                    libc::PACKET_VNET_HDR,
                    (&raw const on).cast(),
                    length_of(&on),
                )
            };
            nix::errno::Errno::result(result)?;
        }
        let address = libc::sockaddr_ll {
            sll_family: u16::try_from(libc::AF_PACKET).expect("a small constant"),
            // Protocol 0: nothing is ever received.
            sll_protocol: 0,
            sll_ifindex: i32::try_from(interface).map_err(|_| io::ErrorKind::InvalidInput)?,
            sll_hatype: 0,
            sll_pkttype: 0,
            sll_halen: 0,
            sll_addr: [0; 8],
        };
        // SAFETY: `address` is a whole sockaddr_ll and its true length is passed.
        let result =
            unsafe { libc::bind(fd.as_raw_fd(), (&raw const address).cast(), length_of(&address)) };
        nix::errno::Errno::result(result)?;
        Ok(Self { fd })
    }

    /// Sends one frame, with its header where the sender has one.
    pub fn send(&self, frame: &[u8]) -> io::Result<()> {
        nix::sys::socket::send(
            self.fd.as_raw_fd(),
            frame,
            nix::sys::socket::MsgFlags::MSG_DONTWAIT,
        )?;
        Ok(())
    }
}

fn length_of<T>(value: &T) -> libc::socklen_t {
    libc::socklen_t::try_from(size_of_val(value)).expect("a small structure")
}
