//! AF_PACKET sockets: whole Ethernet frames, out of and into one interface.

use std::{
    io,
    os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd},
    time::Duration,
};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::socket;

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
        let fd = open()?;
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
        // Protocol 0: nothing is ever received.
        bind(&fd, interface, 0)?;
        Ok(Self { fd })
    }

    /// What is sent from now on goes straight to the interface: no queueing discipline holds it
    /// back, and nobody who listens there sees it.
    pub fn go_straight(&self) -> io::Result<()> {
        let on: libc::c_int = 1;
        socket::set_option(
            self.fd.as_fd(),
            libc::SOL_PACKET,
            libc::PACKET_QDISC_BYPASS,
            &on.to_ne_bytes(),
        )
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

/// A socket for a short conversation in one protocol: it receives, too.
#[derive(Debug)]
pub struct PacketSocket(PacketSender);

impl PacketSocket {
    /// Opens a socket on the interface with this index for frames of one EtherType, in the
    /// network namespace of the calling thread.
    pub fn open(interface: u32, ethertype: u16) -> io::Result<Self> {
        let fd = open()?;
        bind(&fd, interface, ethertype)?;
        Ok(Self(PacketSender { fd }))
    }

    /// Sends one whole frame.
    pub fn send(&self, frame: &[u8]) -> io::Result<()> {
        self.0.send(frame)
    }

    /// Waits for a frame. Returns what of it fits into the buffer, or nothing after `patience`.
    pub fn receive<'a>(
        &self,
        buffer: &'a mut [u8],
        patience: Duration,
    ) -> io::Result<Option<&'a [u8]>> {
        let mut set = [PollFd::new(self.0.fd.as_fd(), PollFlags::POLLIN)];
        let timeout = PollTimeout::try_from(patience).unwrap_or(PollTimeout::MAX);
        match poll(&mut set, timeout) {
            Ok(0) | Err(nix::errno::Errno::EINTR) => return Ok(None),
            Ok(_) => {}
            Err(errno) => return Err(errno.into()),
        }
        let flags = nix::sys::socket::MsgFlags::MSG_DONTWAIT;
        match nix::sys::socket::recv(self.0.fd.as_raw_fd(), buffer, flags) {
            Ok(length) => Ok(buffer.get(..length)),
            Err(nix::errno::Errno::EAGAIN) => Ok(None),
            Err(errno) => Err(errno.into()),
        }
    }
}

/// A packet socket that receives nothing yet.
fn open() -> io::Result<OwnedFd> {
    // SAFETY: plain numbers; the result is checked before it is used.
    let raw = unsafe { libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_CLOEXEC, 0) };
    let raw = nix::errno::Errno::result(raw)?;
    // SAFETY: the descriptor was just made and belongs to nobody else.
    let fd = unsafe { OwnedFd::from_raw_fd(raw) };
    Ok(fd)
}

/// Ties a packet socket to an interface; with a protocol it receives from now on.
fn bind(fd: &OwnedFd, interface: u32, protocol: u16) -> io::Result<()> {
    let address = libc::sockaddr_ll {
        sll_family: u16::try_from(libc::AF_PACKET).expect("a small constant"),
        sll_protocol: protocol.to_be(),
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
    Ok(())
}

fn length_of<T>(value: &T) -> libc::socklen_t {
    libc::socklen_t::try_from(size_of_val(value)).expect("a small structure")
}
