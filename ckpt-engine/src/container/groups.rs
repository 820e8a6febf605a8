//! Peer groups and slaves: which mounts pass new mounts on to which.
//!
//! A mount joins a group by being told another member that shows at least as much as itself. So
//! for each group one mount of the whole file system is made, which is nowhere in any tree: it
//! goes through the changes that make a group, the others join it, and at the end it goes.

use std::{
    collections::{BTreeMap, BTreeSet, btree_map::Entry},
    io,
    os::fd::{AsFd, OwnedFd},
    path::Path,
};

use ckpt_format::container::{Container as Plan, Mount};

use super::mounts::{Failure, at};
use crate::sys::mount::{Propagation, clone_tree, join_group, set_attributes, set_propagation};

/// The groups of a plan.
#[derive(Debug)]
pub(super) struct Groups {
    /// By the number of the group: the mount, and the group that it is a slave of.
    shared: BTreeMap<u32, (OwnedFd, Option<u32>)>,
    /// By the number of the group that they are slaves of: the mount for those in no group.
    slaves: BTreeMap<u32, OwnedFd>,
}

impl Groups {
    /// Makes the mounts that the groups begin with.
    pub(super) fn stage(plan: &Plan, filesystems: &[OwnedFd]) -> Result<Self, Failure> {
        let mut this = Self { shared: BTreeMap::new(), slaves: BTreeMap::new() };
        for mount in plan.mount_tables().flatten() {
            let whole = || whole(mount, filesystems).map_err(at("share", &mount.point));
            if let Some(group) = mount.peers
                && this.shared.get(&group).is_none_or(|known| known.1.is_none())
            {
                // A master that was seen by its slaves only did not say whose slave it is.
                this.shared.insert(group, (whole()?, mount.master));
            }
            let Some(master) = mount.master else { continue };
            if let Entry::Vacant(place) = this.shared.entry(master) {
                place.insert((whole()?, None));
            }
            if mount.peers.is_none()
                && let Entry::Vacant(place) = this.slaves.entry(master)
            {
                place.insert(whole()?);
            }
        }
        Ok(this)
    }

    /// Makes the mounts members of their groups.
    pub(super) fn apply<'a>(
        self,
        mounts: impl Iterator<Item = &'a (&'a Mount, OwnedFd)>,
    ) -> Result<(), Failure> {
        let mut settled = BTreeSet::new();
        for &group in self.shared.keys() {
            self.settle(group, &mut settled).map_err(at("share", "mounts"))?;
        }
        for (master, mount) in &self.slaves {
            self.enslave(mount, *master).map_err(at("share", "mounts"))?;
        }
        for (mount, made) in mounts {
            let group = match (mount.peers, mount.master) {
                (Some(group), _) => self.shared.get(&group).map(|(of, _)| of),
                (None, Some(master)) => self.slaves.get(&master),
                (None, None) => None,
            };
            if let Some(of) = group {
                join_group(of.as_fd(), made.as_fd()).map_err(at("share", &mount.point))?;
            }
        }
        Ok(())
    }

    /// Makes a group what it is, after the one that it is a slave of.
    fn settle(&self, group: u32, settled: &mut BTreeSet<u32>) -> io::Result<()> {
        let Some((mount, master)) = self.shared.get(&group) else { return Ok(()) };
        // A damaged plan could be a circle.
        if !settled.insert(group) {
            return Ok(());
        }
        if let Some(master) = *master
            && master != group
        {
            self.settle(master, settled)?;
            self.enslave(mount, master)?;
        }
        set_propagation(mount.as_fd(), Propagation::Shared)
    }

    fn enslave(&self, mount: &OwnedFd, master: u32) -> io::Result<()> {
        let Some((of, _)) = self.shared.get(&master) else { return Ok(()) };
        join_group(of.as_fd(), mount.as_fd())?;
        set_propagation(mount.as_fd(), Propagation::Slave)
    }
}

/// A detached mount of all of the file system that a mount shows.
fn whole(mount: &Mount, filesystems: &[OwnedFd]) -> io::Result<OwnedFd> {
    let index = usize::try_from(mount.filesystem).map_err(io::Error::other)?;
    let filesystem = filesystems.get(index).ok_or(io::ErrorKind::InvalidInput)?;
    let made = clone_tree(filesystem.as_fd(), Path::new(""))?;
    set_attributes(made.as_fd(), 0)?;
    Ok(made)
}
