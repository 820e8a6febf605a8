//! Mounts that have to wait: the `/proc` of a pid namespace below the container's own can be made
//! only when that has a process, an overlay only when its layers have all their files. Where each
//! is to stand is kept until then, and so is what stands on it.

use std::{
    collections::{BTreeMap, HashMap},
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::Path,
};

use ckpt_format::container::{
    Container as Plan, Filesystem, FilesystemKind, Mount, inside, late, made_late,
};

use super::{bench::Bench, groups::Groups, mounts::relative};
use crate::sys::{
    mount::{
        Propagation, attach, clone_tree, join_group, set_attributes, set_private, set_propagation,
    },
    namespace::{in_mounts_of, in_own_mounts},
    pids::open_proc,
};

/// A mount that waits.
#[derive(Debug)]
pub struct LateMount {
    /// The mount namespace; 0 is the container's own.
    table: usize,
    /// Where it is among the mounts of its namespace.
    path: String,
    /// With its place as seen from what it stands on.
    mount: Mount,
    ground: Ground,
    made: Made,
}

/// What it is to stand on.
#[derive(Debug)]
enum Ground {
    /// A mount that is there, which passes new ones on to others or not, and the place on it.
    There { mount: OwnedFd, place: OwnedFd, shared: bool },
    /// Another one that waits.
    Late(usize),
}

#[derive(Debug)]
enum Made {
    /// It only has to be attached.
    Ready(OwnedFd),
    /// It shows a file system that is to be made: its place in the plan, and what it is.
    Anew { number: u32, filesystem: Filesystem },
}

impl LateMount {
    /// All of a plan, with the descriptors that pid 1 has sent for them: for each the mount that it
    /// stands on and the place there, unless that waits too, and the mount itself, unless it is to
    /// be made. `None` if they do not fit.
    pub(super) fn collect(plan: &Plan, descriptors: Vec<OwnedFd>) -> Option<Vec<Self>> {
        let mut descriptors = descriptors.into_iter();
        let mut all = Vec::new();
        for (table, mounts) in plan.mount_tables().enumerate() {
            let mut places = HashMap::new();
            let waits = late(plan, mounts);
            for (place, mount) in mounts.iter().enumerate().filter(|(place, _)| waits[*place]) {
                let parent = usize::try_from(mount.parent).ok()?;
                let ground = match places.get(&parent) {
                    Some(&late) => Ground::Late(late),
                    None => {
                        let shared = mounts.get(parent)?.peers.is_some();
                        let (mount, place) = (descriptors.next()?, descriptors.next()?);
                        Ground::There { mount, place, shared }
                    }
                };
                let number = mount.filesystem;
                let made = match made_late(plan, mount) {
                    false => Made::Ready(descriptors.next()?),
                    true => {
                        let filesystem = plan.filesystems.get(usize::try_from(number).ok()?)?;
                        Made::Anew { number, filesystem: filesystem.clone() }
                    }
                };
                places.insert(place, all.len());
                let path = mount.point.clone();
                let from = &mounts[parent].point;
                let point = inside(from, &mount.point)?.to_owned();
                let mount = Mount { point, ..mount.clone() };
                all.push(Self { table, path, mount, ground, made });
            }
        }
        descriptors.next().is_none().then_some(all)
    }

    /// The pid namespace that must be there before.
    pub(crate) fn space(&self) -> Option<u32> {
        match &self.made {
            Made::Anew { filesystem, .. } if filesystem.kind == FilesystemKind::Proc => {
                Some(filesystem.pids)
            }
            Made::Ready(_) | Made::Anew { .. } => None,
        }
    }
}

/// All that is needed to make the file systems of mounts that have to wait.
#[derive(Debug)]
pub(crate) struct Site<'a> {
    /// The mount namespaces, the container's own first.
    pub(crate) tables: &'a [OwnedFd],
    /// The pid namespaces by their numbers.
    pub(crate) spaces: &'a HashMap<u32, OwnedFd>,
    /// Where overlays are made, if there are any.
    pub(crate) bench: Option<Bench>,
    /// The host's id of the container's id 0.
    pub(crate) id_base: u32,
}

impl Site<'_> {
    /// Makes the file systems that mounts show, by their places in the plan.
    fn make(&self, late: &[LateMount]) -> io::Result<BTreeMap<u32, OwnedFd>> {
        let mut made = BTreeMap::new();
        let mut overlays = BTreeMap::new();
        for waits in late {
            let Made::Anew { number, filesystem } = &waits.made else { continue };
            match filesystem.kind {
                FilesystemKind::Overlay(_) => drop(overlays.insert(*number, filesystem)),
                _ if made.contains_key(number) => {}
                _ => {
                    let pids = self.spaces.get(&filesystem.pids).ok_or(io::ErrorKind::NotFound)?;
                    made.insert(*number, make(filesystem, pids.as_fd(), self.id_base)?);
                }
            }
        }
        // Those that others are made of come first; a damaged plan could be a circle.
        while !overlays.is_empty() {
            let ready = overlays.iter().find_map(|(&number, filesystem)| {
                let FilesystemKind::Overlay(overlay) = &filesystem.kind else { return None };
                let there = overlay.on.iter().all(|on| made.contains_key(on));
                there.then_some((number, *filesystem, overlay))
            });
            let (number, filesystem, overlay) = ready.ok_or(io::ErrorKind::InvalidData)?;
            let table = usize::try_from(overlay.table).map_err(io::Error::other)?;
            let on = late.iter().filter(|waits| {
                waits.table == table && overlay.on.contains(&waits.mount.filesystem)
            });
            let on = on.map(|it| (it.mount.filesystem, it.path.clone(), it.mount.root.clone()));
            let bench = self.bench.as_ref().ok_or(io::ErrorKind::NotFound)?;
            let namespace = self.tables.get(table).ok_or(io::ErrorKind::NotFound)?.as_fd();
            let covers = &overlay.covers;
            let overlay = bench.make(number, filesystem, covers, namespace, on.collect())?;
            overlays.remove(&number);
            made.insert(number, overlay);
        }
        Ok(made)
    }
}

/// Mounts all of them.
pub(crate) fn mount_late(late: Vec<LateMount>, site: Site<'_>) -> io::Result<()> {
    let tables = site.tables;
    let filesystems = site.make(&late)?;
    // Their places in a plan of nothing else.
    let numbers: Vec<u32> = filesystems.keys().copied().collect();
    let filesystems: Vec<OwnedFd> = filesystems.into_values().collect();
    let place_of = |number: u32| numbers.iter().position(|it| *it == number).unwrap_or(0);
    let anew = late.iter().filter(|waits| matches!(waits.made, Made::Anew { .. }));
    let alone = anew.map(|waits| {
        let filesystem = u32::try_from(place_of(waits.mount.filesystem)).unwrap_or(0);
        Mount { filesystem, ..waits.mount.clone() }
    });
    let alone = Plan { mounts: alone.collect(), ..Plan::default() };
    // Kernels before 6.15 clone attached mounts only.
    let (groups, mut clones) = in_own_mounts(|| {
        let aside = std::fs::File::open("/proc")?;
        for made in &filesystems {
            attach(made.as_fd(), aside.as_fd(), Path::new(""))?;
        }
        let clone = |mount: &Mount| {
            let place = usize::try_from(mount.filesystem).map_err(io::Error::other)?;
            let made = clone_tree(filesystems[place].as_fd(), relative(&mount.root))?;
            set_attributes(made.as_fd(), mount.attributes)?;
            Ok(made)
        };
        let clones = alone.mounts.iter().map(clone).collect::<io::Result<Vec<_>>>()?;
        let groups = Groups::stage(&alone, &filesystems).map_err(|(_, source)| source)?;
        Ok((groups, clones.into_iter()))
    })?;
    let mut made = Vec::with_capacity(late.len());
    let mut grounds = Vec::with_capacity(late.len());
    for waits in late {
        let mount = match waits.made {
            Made::Ready(mount) => mount,
            Made::Anew { .. } => clones.next().ok_or(io::ErrorKind::NotFound)?,
        };
        let is_new = numbers.contains(&waits.mount.filesystem);
        made.push((waits.table, waits.mount, mount, is_new));
        grounds.push(waits.ground);
    }
    for ((table, mount, fd, _), ground) in made.iter().zip(&grounds) {
        let namespace = tables.get(*table).ok_or(io::ErrorKind::NotFound)?;
        let point = Path::new(&mount.point);
        in_mounts_of(namespace, || {
            match ground {
                Ground::Late(on) => attach(fd.as_fd(), made[*on].2.as_fd(), point)?,
                Ground::There { mount, place, shared } => {
                    let attach = || attach(fd.as_fd(), place.as_fd(), Path::new(""));
                    if *shared { quietly(mount.as_fd(), attach)? } else { attach()? }
                }
            }
            match mount.unbindable {
                true => set_propagation(fd.as_fd(), Propagation::Unbindable),
                false => Ok(()),
            }
        })?;
    }
    let anew = made.into_iter().filter(|(.., is_new)| *is_new);
    let fds: Vec<OwnedFd> = anew.map(|(_, _, fd, _)| fd).collect();
    let members: Vec<(&Mount, OwnedFd)> = alone.mounts.iter().zip(fds).collect();
    groups.apply(members.iter()).map_err(|(_, source)| source)
}

/// Does something to a mount that others learn of, without that they do.
fn quietly(mount: BorrowedFd<'_>, act: impl FnOnce() -> io::Result<()>) -> io::Result<()> {
    // A copy is in the same group, and keeps the place there.
    let copy = clone_tree(mount, Path::new(""))?;
    set_private(mount)?;
    act()?;
    join_group(copy.as_fd(), mount)
}

/// The `/proc` of a pid namespace, with options as the container sees them.
fn make(filesystem: &Filesystem, pids: BorrowedFd<'_>, id_base: u32) -> io::Result<OwnedFd> {
    let context = open_proc(pids)?;
    let source = Some(filesystem.source.as_str()).filter(|source| !source.is_empty());
    context.set("source", source.or(Some("proc")))?;
    for option in &filesystem.options {
        let value = match (option.name.as_str(), &option.value) {
            ("gid", Some(id)) => {
                let id: u32 = id.parse().map_err(io::Error::other)?;
                Some(id_base.saturating_add(id).to_string())
            }
            (_, value) => value.clone(),
        };
        context.set(&option.name, value.as_deref())?;
    }
    let made = context.mount(0)?;
    set_attributes(made.as_fd(), 0)?;
    Ok(made)
}
