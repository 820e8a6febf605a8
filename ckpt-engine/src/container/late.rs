//! Mounts that have to wait: the `/proc` of a pid namespace below the container's own can be made
//! only when that has a process. Where each is to stand is kept until then, and so is what stands
//! on it.

use std::{
    collections::{BTreeMap, HashMap},
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::Path,
};

use ckpt_format::container::{Container as Plan, Filesystem, FilesystemKind, Mount, inside};

use super::{groups::Groups, mounts::relative};
use crate::sys::{
    mount::{
        Propagation, attach, clone_tree, join_group, set_attributes, set_private, set_propagation,
    },
    namespace::{in_mounts_of, in_own_mounts},
    pids::open_proc,
};

/// The pid namespace of a file system, unless it is the container's own.
pub(super) fn space_of(plan: &Plan, mount: &Mount) -> Option<u32> {
    let filesystem = plan.filesystems.get(usize::try_from(mount.filesystem).ok()?)?;
    let proc = filesystem.kind == FilesystemKind::Proc;
    (proc && filesystem.pids != 0).then_some(filesystem.pids)
}

/// Which mounts of a namespace have to wait.
pub(super) fn late(plan: &Plan, mounts: &[Mount]) -> Vec<bool> {
    let mut late = vec![false; mounts.len()];
    for (place, mount) in mounts.iter().enumerate().skip(1) {
        let parent = usize::try_from(mount.parent).ok().filter(|&parent| parent < place);
        late[place] = parent.is_some_and(|parent| late[parent]) || space_of(plan, mount).is_some();
    }
    late
}

/// A mount that waits.
#[derive(Debug)]
pub struct LateMount {
    /// The mount namespace; 0 is the container's own.
    table: usize,
    mount: Mount,
    ground: Ground,
    made: Made,
}

/// What it is to stand on.
#[derive(Debug)]
enum Ground {
    /// A mount that is there, which passes new ones on to others or not.
    There { mount: OwnedFd, shared: bool },
    /// Another one that waits.
    Late(usize),
}

#[derive(Debug)]
enum Made {
    /// It only has to be attached.
    Ready(OwnedFd),
    /// The `/proc` of a pid namespace.
    Proc { number: u32, filesystem: Filesystem },
}

impl LateMount {
    /// All of a plan, with the descriptors that pid 1 has sent for them: for each what it stands
    /// on, unless that waits too, and the mount itself, unless it is to be made. `None` if they do
    /// not fit.
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
                        Ground::There { mount: descriptors.next()?, shared }
                    }
                };
                let number = mount.filesystem;
                let made = match space_of(plan, mount) {
                    None => Made::Ready(descriptors.next()?),
                    Some(_) => {
                        let filesystem = plan.filesystems.get(usize::try_from(number).ok()?)?;
                        Made::Proc { number, filesystem: filesystem.clone() }
                    }
                };
                places.insert(place, all.len());
                // As seen from what it stands on.
                let from = &mounts[parent].point;
                let point = inside(from, &mount.point)?.to_owned();
                all.push(Self { table, mount: Mount { point, ..mount.clone() }, ground, made });
            }
        }
        descriptors.next().is_none().then_some(all)
    }

    /// The pid namespace that must be there before.
    pub(crate) fn space(&self) -> Option<u32> {
        match &self.made {
            Made::Ready(_) => None,
            Made::Proc { filesystem, .. } => Some(filesystem.pids),
        }
    }
}

/// Mounts all of them. `tables` are the mount namespaces, the container's own first, and `spaces`
/// the pid namespaces by their numbers. The ids of the container start at `id_base`.
pub(crate) fn mount_late(
    late: Vec<LateMount>,
    tables: &[OwnedFd],
    spaces: &HashMap<u32, OwnedFd>,
    id_base: u32,
) -> io::Result<()> {
    let mut filesystems = BTreeMap::new();
    for waits in &late {
        if let Made::Proc { number, filesystem } = &waits.made
            && !filesystems.contains_key(number)
        {
            let pids = spaces.get(&filesystem.pids).ok_or(io::ErrorKind::NotFound)?;
            filesystems.insert(*number, make(filesystem, pids.as_fd(), id_base)?);
        }
    }
    // Their places in a plan of nothing else.
    let numbers: Vec<u32> = filesystems.keys().copied().collect();
    let filesystems: Vec<OwnedFd> = filesystems.into_values().collect();
    let place_of = |number: u32| numbers.iter().position(|it| *it == number).unwrap_or(0);
    let of_proc = late.iter().filter(|waits| matches!(waits.made, Made::Proc { .. }));
    let alone = of_proc.map(|waits| {
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
            Made::Proc { .. } => clones.next().ok_or(io::ErrorKind::NotFound)?,
        };
        let is_proc = numbers.contains(&waits.mount.filesystem);
        made.push((waits.table, waits.mount, mount, is_proc));
        grounds.push(waits.ground);
    }
    for ((table, mount, fd, _), ground) in made.iter().zip(&grounds) {
        let namespace = tables.get(*table).ok_or(io::ErrorKind::NotFound)?;
        let point = Path::new(&mount.point);
        in_mounts_of(namespace, || {
            match ground {
                Ground::Late(on) => attach(fd.as_fd(), made[*on].2.as_fd(), point)?,
                Ground::There { mount, shared: false } => attach(fd.as_fd(), mount.as_fd(), point)?,
                Ground::There { mount, shared: true } => {
                    quietly(mount.as_fd(), || attach(fd.as_fd(), mount.as_fd(), point))?
                }
            }
            match mount.unbindable {
                true => set_propagation(fd.as_fd(), Propagation::Unbindable),
                false => Ok(()),
            }
        })?;
    }
    let of_proc = made.into_iter().filter(|(.., is_proc)| *is_proc);
    let fds: Vec<OwnedFd> = of_proc.map(|(_, _, fd, _)| fd).collect();
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
