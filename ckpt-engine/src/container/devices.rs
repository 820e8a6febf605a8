//! Device nodes that are made for containers, because those of the host may be for its root alone:
//! `/dev/net/tun` is, where no udev has changed it.

use std::{io, os::fd::OwnedFd};

use ckpt_format::container::{HOST_DEVICES, TUN_DEVICE};
use nix::sys::stat::{FchmodatFlags, Mode, SFlag, fchmodat, mkdirat, mknodat};

use crate::sys::mount::FilesystemContext;

/// By which a mount of them is known, also where something else hides the node.
pub(super) const SOURCE: &str = "container-devices";

/// A file system that holds them, mounted nowhere. It is the host's: a container cannot make any.
pub(super) fn make() -> io::Result<OwnedFd> {
    let context = FilesystemContext::open("tmpfs")?;
    context.set("source", Some(SOURCE))?;
    context.set("mode", Some("755"))?;
    let top = context.mount(0)?;
    for (name, major, minor) in HOST_DEVICES.iter().filter(|(name, ..)| *name == TUN_DEVICE) {
        if let Some((directory, _)) = name.rsplit_once('/') {
            mkdirat(&top, directory, Mode::from_bits_truncate(0o755))?;
            fchmodat(
                &top,
                directory,
                Mode::from_bits_truncate(0o755),
                FchmodatFlags::FollowSymlink,
            )?;
        }
        let device = libc::makedev(*major, *minor);
        let everybody = Mode::from_bits_truncate(0o666);
        mknodat(&top, *name, SFlag::S_IFCHR, everybody, device)?;
        // Whatever the umask is.
        fchmodat(&top, *name, everybody, FchmodatFlags::FollowSymlink)?;
    }
    Ok(top)
}
