//! Room to work in a tmpfs.
//!
//! A tmpfs that is full on the source can be copied only if the target may hold more for a
//! moment: what is gone and what has come overlap while the rounds run.

use std::{
    collections::{HashMap, hash_map::Entry},
    io,
    os::fd::AsFd,
};

use ckpt_engine::sys::mount::FilesystemContext;
use nix::sys::{
    stat::fstat,
    statfs::{TMPFS_MAGIC, fstatfs},
};

/// The limits that a tmpfs has of its own.
#[derive(Clone, Copy, Debug)]
struct Limits {
    bytes: u64,
    inodes: u64,
}

/// The limits that have been raised, by the device number of the file system: several trees may be
/// parts of one.
#[derive(Debug, Default)]
pub(super) struct Raised(HashMap<u64, Limits>);

impl Raised {
    /// Raises the limits of a file system if it is a tmpfs whose limits are still its own.
    pub(super) fn raise(&mut self, top: impl AsFd) -> io::Result<()> {
        /// Even the smallest one gets so much more.
        const BYTES_MORE: u64 = 64 << 20;
        const INODES_MORE: u64 = 64 << 10;
        let status = fstatfs(top.as_fd())?;
        if status.filesystem_type() != TMPFS_MAGIC {
            return Ok(());
        }
        let Entry::Vacant(place) = self.0.entry(fstat(top.as_fd())?.st_dev) else { return Ok(()) };
        let block = u64::try_from(status.block_size()).unwrap_or(4096);
        let limits =
            Limits { bytes: status.blocks().saturating_mul(block), inodes: status.files() };
        let more = |now: u64, more: u64| if now == 0 { 0 } else { now.saturating_mul(2) + more };
        let raised = Limits {
            bytes: more(limits.bytes, BYTES_MORE),
            inodes: more(limits.inodes, INODES_MORE),
        };
        set(top, raised)?;
        place.insert(limits);
        Ok(())
    }

    /// Gives a file system its own limits back, if it does not have them yet.
    pub(super) fn give_back(&mut self, top: impl AsFd) -> io::Result<()> {
        match self.0.remove(&fstat(top.as_fd())?.st_dev) {
            Some(limits) => set(top, limits),
            None => Ok(()),
        }
    }
}

/// Lets nobody change anything in a file system any more.
pub(super) fn set_read_only(top: impl AsFd) -> io::Result<()> {
    let context = FilesystemContext::pick(top.as_fd())?;
    context.set("ro", None)?;
    context.reconfigure()
}

fn set(top: impl AsFd, limits: Limits) -> io::Result<()> {
    let context = FilesystemContext::pick(top.as_fd())?;
    // No limit stays none: the kernel does not take a limit away or add one later.
    for (name, value) in [("size", limits.bytes), ("nr_inodes", limits.inodes)] {
        if value != 0 {
            context.set(name, Some(&value.to_string()))?;
        }
    }
    context.reconfigure()
}
