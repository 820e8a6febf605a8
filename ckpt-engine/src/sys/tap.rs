//! A TAP device: an Ethernet port whose other end is a file descriptor.
//!
//! Frames carry a `virtio_net_hdr`, so that segments that a local sender left for a network card
//! to cut, and checksums that it left to be filled in, arrive here as they are and can be put
//! back on a wire the same way.

use std::{
    fs::OpenOptions,
    io::{self, Read},
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd},
        unix::fs::OpenOptionsExt,
    },
};

/// The length of the `virtio_net_hdr` in front of each frame, in bytes.
pub const VNET_HEADER: usize = 10;

/// The largest read from a TAP: header, Ethernet header with a VLAN tag, and a full segment train.
pub const FRAME_MAX: usize = VNET_HEADER + 18 + 65_536;

const TUN_F_USO4: libc::c_uint = 0x20;
const TUN_F_USO6: libc::c_uint = 0x40;

nix::ioctl_write_ptr_bad!(
    /// Binds the descriptor to a device.
    tun_set_interface,
    libc::TUNSETIFF,
    libc::ifreq
);
nix::ioctl_write_int_bad!(
    /// Says what the reader can do for the sender.
    tun_set_offload,
    libc::TUNSETOFFLOAD
);

/// A TAP device that disappears when it is dropped.
#[derive(Debug)]
pub struct Tap {
    file: std::fs::File,
}

impl Tap {
    /// Makes a new device called `name` in the network namespace of the calling thread, down and
    /// without addresses. Reading from it never blocks.
    pub fn create(name: &str) -> io::Result<Self> {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NONBLOCK)
            .open("/dev/net/tun")?;
        let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR | libc::IFF_TUN_EXCL;
        let request = interface_request(name, flags)?;
        // SAFETY: the descriptor is open, and `request` is a whole ifreq whose name is
        // NUL-terminated; the kernel reads and writes nothing beyond it.
        unsafe { tun_set_interface(file.as_raw_fd(), &raw const request) }?;
        let offload = libc::TUN_F_CSUM | libc::TUN_F_TSO4 | libc::TUN_F_TSO6 | libc::TUN_F_TSO_ECN;
        // SAFETY: the descriptor is a TAP; the argument is a plain number.
        unsafe { tun_set_offload(file.as_raw_fd(), int(offload | TUN_F_USO4 | TUN_F_USO6)) }
            // Kernels before 6.2 do not know UDP segmentation.
            // SAFETY: the descriptor is a TAP; the argument is a plain number.
            .or_else(|_| unsafe { tun_set_offload(file.as_raw_fd(), int(offload)) })?;
        Ok(Self { file })
    }

    /// Reads the next frame with its header into `buffer` (of [`FRAME_MAX`] bytes), or says that
    /// there is none now.
    pub fn read(&self, buffer: &mut [u8]) -> io::Result<Option<usize>> {
        match (&self.file).read(buffer) {
            Ok(length) => Ok(Some(length)),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
            Err(error) => Err(error),
        }
    }
}

impl AsFd for Tap {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

fn int(flags: libc::c_uint) -> libc::c_int {
    libc::c_int::try_from(flags).expect("offload flags are small")
}

fn interface_request(name: &str, flags: libc::c_int) -> io::Result<libc::ifreq> {
    if name.is_empty() || name.len() >= libc::IFNAMSIZ || name.contains(['\0', '/', '%']) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let mut ifr_name = [0; libc::IFNAMSIZ];
    for (to, from) in ifr_name.iter_mut().zip(name.bytes()) {
        *to = libc::c_char::from_ne_bytes([from]);
    }
    let ifru_flags = libc::c_short::from_ne_bytes(
        u16::try_from(flags).map_err(|_| io::ErrorKind::InvalidInput)?.to_ne_bytes(),
    );
    Ok(libc::ifreq { ifr_name, ifr_ifru: libc::__c_anonymous_ifr_ifru { ifru_flags } })
}
