//! Attaches a container's mounts. Runs as its pid 1, in its own mount namespace.
//!
//! All superblocks and all mounts are made detached while the host's own proc and sysfs are in
//! sight, which the kernel demands of whoever makes these. Then each nested namespace is put
//! together, and the container's own last, because everything else stands in it until then. How
//! mounts pass new ones on to each other is set at the very end: sooner, each of ours would be
//! passed on.

use std::{
    collections::BTreeMap,
    fs::{File, OpenOptions},
    io,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::fs::OpenOptionsExt,
    },
    path::Path,
};

use ckpt_format::container::{
    Container as Plan, Filesystem, FilesystemKind, HOST_DEVICES, Mount, TUN_DEVICE, inside, late,
    locked, made_late, parts,
};
use nix::{
    fcntl::{OFlag, openat},
    mount::{MntFlags, umount2},
    sys::stat::Mode,
};

use super::{
    groups::Groups,
    nested::{Handles, Own, owner},
    place,
};
use crate::sys::{
    mount::{
        FilesystemContext, Propagation, attach, clone_tree, set_attributes,
        set_private_recursively, set_propagation,
    },
    namespace::{join, unshare},
};

/// What failed, and why.
pub(super) type Failure = (String, io::Error);

/// For `map_err`: names what failed.
pub(super) fn at<'a>(act: &'a str, point: &'a str) -> impl FnOnce(io::Error) -> Failure + 'a {
    move |source| (format!("{act} {point}"), source)
}

/// What is left of the work for others.
#[derive(Debug)]
pub(super) struct Built {
    /// The files in memory, in the order of [`parts`].
    pub(super) trees: Vec<OwnedFd>,
    /// The nested mount namespaces.
    pub(super) namespaces: Vec<OwnedFd>,
    /// For the mounts that have to wait, see
    /// [`LateMount::collect`](super::LateMount::collect).
    pub(super) late: Vec<OwnedFd>,
}

/// Attaches everything and makes it the root.
pub(super) fn build(
    plan: &Plan,
    (root, devices): (OwnedFd, OwnedFd),
    own: &Own,
    handles: &Handles,
) -> Result<Built, Failure> {
    let here = File::open("/").map_err(at("open", "/"))?;
    set_private_recursively(here.as_fd()).map_err(at("keep private", "/"))?;
    let filesystems = superblocks(plan, (root, &devices), own, handles)?;
    let mut trees = Vec::new();
    let wanted = parts(plan).map_err(|point| at("find", point)(io::ErrorKind::NotFound.into()))?;
    for part in wanted {
        let filesystem = filesystems[part.filesystem].as_fd();
        let clone = || {
            place::make(filesystem, relative(part.root), libc::S_IFDIR)?;
            clone_tree(filesystem, relative(part.root))
        };
        trees.push(clone().map_err(at("clone", "a tmpfs"))?);
    }
    let groups = Groups::stage(plan, &filesystems)?;
    let mut tables = Vec::new();
    for mounts in plan.mount_tables() {
        let prepare = |mount| {
            let made = prepare(mount, &filesystems).map_err(at("prepare", &mount.point))?;
            Ok((mount, made))
        };
        tables.push(mounts.iter().map(prepare).collect::<Result<Vec<_>, Failure>>()?);
    }
    let mut namespaces = Vec::new();
    let mut places = vec![Places::new()];
    let back = own.open("mnt").map_err(at("keep", "the mounts"))?;
    for (place, table) in tables[1..].iter_mut().enumerate() {
        let users = owner(&plan.nested.owners.mounts, place, &handles.users);
        let users = users.map_err(at("find the owner of", "a mount namespace"))?;
        unshare(libc::CLONE_NEWNS).map_err(at("make", "a mount namespace"))?;
        namespaces.push(match users {
            None => {
                places.push(assemble(plan, table)?);
                own.open("mnt").map_err(at("keep", "a mount namespace"))?
            }
            Some(users) => {
                let (namespace, kept) = hand_over(plan, table, users, own)?;
                places.push(kept);
                namespace
            }
        });
        join(back.as_fd(), libc::CLONE_NEWNS).map_err(at("leave", "a mount namespace"))?;
    }
    places[0] = assemble(plan, &tables[0])?;
    let late = waiting(plan, &tables, places).map_err(at("keep", "mounts for later"))?;
    let there = |(mount, _): &&Prepared<'_>| !made_late(plan, mount);
    groups.apply(tables.iter().flatten().filter(there))?;
    Ok(Built { trees, namespaces, late })
}

/// Where on what is there mounts of a namespace that wait are to stand, by their places in its
/// table: what is attached there until then may hide it.
type Places = BTreeMap<usize, OwnedFd>;

/// What is needed to attach the mounts that have to wait, see
/// [`LateMount::collect`](super::LateMount::collect).
fn waiting(
    plan: &Plan,
    tables: &[Vec<Prepared<'_>>],
    places: Vec<Places>,
) -> io::Result<Vec<OwnedFd>> {
    let mut descriptors = Vec::new();
    for ((table, mounts), mut places) in tables.iter().zip(plan.mount_tables()).zip(places) {
        let late = late(plan, mounts);
        for (place, (mount, made)) in table.iter().enumerate().filter(|(place, _)| late[*place]) {
            let parent = usize::try_from(mount.parent).ok().filter(|&parent| parent < place);
            let parent = parent.ok_or(io::ErrorKind::InvalidData)?;
            if !late[parent] {
                descriptors.push(table[parent].1.try_clone()?);
                descriptors.push(places.remove(&place).ok_or(io::ErrorKind::NotFound)?);
            }
            if !made_late(plan, mount) {
                // It is private from here on, and joins its group next.
                set_attributes(made.as_fd(), mount.attributes)?;
                descriptors.push(made.try_clone()?);
            }
        }
    }
    Ok(descriptors)
}

/// Makes all file systems. What is of namespaces of programs is made of `handles`.
fn superblocks(
    plan: &Plan,
    (root, devices): (OwnedFd, &OwnedFd),
    own: &Own,
    handles: &Handles,
) -> Result<Vec<OwnedFd>, Failure> {
    let mut root = Some(root);
    // Kernels before 6.15 clone attached mounts only. Where these stand does not matter: they go
    // with the host's tree.
    let aside = File::open("/proc").map_err(at("open", "/proc"))?;
    attach(devices.as_fd(), aside.as_fd(), Path::new("")).map_err(at("attach", "devices"))?;
    let network = own.open("net").map_err(at("keep", "the network"))?;
    let ipc = own.open("ipc").map_err(at("keep", "the IPC namespace"))?;
    let all: Vec<&OwnedFd> = std::iter::once(&network).chain(&handles.networks).collect();
    let of = |filesystem: &Filesystem| {
        let place = usize::try_from(filesystem.network).ok();
        let found = place.and_then(|place| all.get(place).copied());
        found.ok_or_else(|| io::Error::from(io::ErrorKind::InvalidInput))
    };
    let mut filesystems = Vec::new();
    for filesystem in &plan.filesystems {
        let made = match filesystem.kind {
            FilesystemKind::Root => root.take().ok_or_else(|| io::ErrorKind::InvalidInput.into()),
            FilesystemKind::Namespace { ref kind, number } => handles.find(own, kind, number),
            FilesystemKind::Network => of(filesystem).and_then(OwnedFd::try_clone),
            FilesystemKind::Sysfs if filesystem.network != 0 => of(filesystem)
                .and_then(|other| make_in(other, &network, libc::CLONE_NEWNET, filesystem)),
            FilesystemKind::Mqueue if filesystem.ipc != 0 => {
                let place = usize::try_from(filesystem.ipc - 1).ok();
                let other = place.and_then(|place| handles.ipcs.get(place));
                let other = other.ok_or_else(|| io::ErrorKind::InvalidInput.into());
                other.and_then(|other| make_in(other, &ipc, libc::CLONE_NEWIPC, filesystem))
            }
            // Its place is kept, but nothing will ever show it.
            FilesystemKind::Proc if filesystem.pids != 0 => placeholder(),
            FilesystemKind::Overlay(_) => placeholder(),
            FilesystemKind::Device { ref name } => device(name, devices),
            _ => make(filesystem),
        };
        filesystems.push(made.map_err(at("make", filesystem.kind.name()))?);
    }
    for (made, filesystem) in filesystems.iter().zip(&plan.filesystems) {
        if !matches!(
            filesystem.kind,
            FilesystemKind::Device { .. }
                | FilesystemKind::Network
                | FilesystemKind::Namespace { .. }
        ) {
            attach(made.as_fd(), aside.as_fd(), Path::new(""))
                .map_err(at("attach", filesystem.kind.name()))?;
        }
    }
    Ok(filesystems)
}

/// A file system of another namespace of this kind than the caller's, which is `own`.
fn make_in(
    other: &OwnedFd,
    own: &OwnedFd,
    kind: libc::c_int,
    filesystem: &Filesystem,
) -> io::Result<OwnedFd> {
    join(other.as_fd(), kind)?;
    let made = make(filesystem);
    join(own.as_fd(), kind)?;
    made
}

/// A device node: of the host, or of those that were made for containers.
fn device(name: &str, devices: &OwnedFd) -> io::Result<OwnedFd> {
    if !HOST_DEVICES.iter().any(|(known, ..)| *known == name) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    if name == TUN_DEVICE {
        return Ok(openat(devices, name, OFlag::O_PATH | OFlag::O_CLOEXEC, Mode::empty())?);
    }
    let mut device = OpenOptions::new();
    device.read(true).custom_flags(libc::O_PATH);
    Ok(device.open(Path::new("/dev").join(name))?.into())
}

fn placeholder() -> io::Result<OwnedFd> {
    FilesystemContext::open("tmpfs")?.mount(0)
}

fn make(filesystem: &Filesystem) -> io::Result<OwnedFd> {
    let context = FilesystemContext::open(filesystem.kind.name())?;
    let source = Some(filesystem.source.as_str()).filter(|source| !source.is_empty());
    context.set("source", source.or(Some(filesystem.kind.name())))?;
    for option in &filesystem.options {
        // What is in memory is filled first.
        if option.name != "ro" || !filesystem.holds_files() {
            context.set(&option.name, option.value.as_deref())?;
        }
    }
    context.mount(0)
}

/// A detached mount of what is to be attached.
fn prepare(mount: &Mount, filesystems: &[OwnedFd]) -> io::Result<OwnedFd> {
    let index = usize::try_from(mount.filesystem).map_err(io::Error::other)?;
    let filesystem = filesystems.get(index).ok_or(io::ErrorKind::InvalidInput)?;
    let root = relative(&mount.root);
    if mount.root != "/" {
        place::make(filesystem.as_fd(), root, mount.file_type)?;
    }
    clone_tree(filesystem.as_fd(), root)
}

/// Makes an attached mount what it is to be. Comes after the places of others on it were made:
/// it may be read-only.
fn finish((mount, made): &Prepared<'_>) -> Result<(), Failure> {
    let finish = || {
        set_attributes(made.as_fd(), mount.attributes)?;
        match mount.unbindable {
            true => set_propagation(made.as_fd(), Propagation::Unbindable),
            false => Ok(()),
        }
    };
    finish().map_err(at("set the attributes of", &mount.point))
}

/// A mount with its descriptor.
type Prepared<'a> = (&'a Mount, OwnedFd);

/// Attaches the mounts of one namespace, which becomes the caller's tree.
fn assemble(plan: &Plan, table: &[Prepared<'_>]) -> Result<Places, Failure> {
    change_root(table)?;
    let mounts: Vec<Mount> = table.iter().map(|(mount, _)| (*mount).clone()).collect();
    let late = late(plan, &mounts);
    let mut places = Places::new();
    for index in 1..table.len() {
        if !late[index] {
            make_place(plan, table, index)?;
            stand(table, index)?;
        } else if !late[usize::try_from(mounts[index].parent).unwrap_or(0)] {
            make_place(plan, table, index)?;
            places.insert(index, open_place(table, index)?);
        }
    }
    let there = table.iter().zip(&late).filter(|(_, late)| !**late);
    there.map(|(prepared, _)| prepared).try_for_each(finish)?;
    Ok(places)
}

/// Attaches the mounts of a namespace that belongs to a user namespace, which becomes the
/// caller's, and returns it.
///
/// What is locked there came with the namespace when it was made, as a copy of another one: so it
/// is made in one that has nothing else, and copied in the same way. What the copy has of the
/// mounts takes their places in the table. The second value is as of [`assemble`].
fn hand_over(
    plan: &Plan,
    table: &mut [Prepared<'_>],
    users: &OwnedFd,
    own: &Own,
) -> Result<(OwnedFd, Places), Failure> {
    let mounts: Vec<Mount> = table.iter().map(|(mount, _)| (*mount).clone()).collect();
    let waits = late(plan, &mounts);
    let (came, later): (Vec<usize>, Vec<usize>) = {
        let locked = locked(&mounts);
        (0..table.len()).partition(|&index| locked[index])
    };
    change_root(table)?;
    let stands = |index: &usize| usize::try_from(mounts[*index].parent).unwrap_or(0);
    for &index in &came[1..] {
        make_place(plan, table, index)?;
        stand(table, index)?;
    }
    if came.iter().any(|&index| waits[index]) {
        return Err(at("lock", "a mount that waits")(io::ErrorKind::Unsupported.into()));
    }
    // What is read-only takes no new places afterwards.
    for &index in later.iter().filter(|index| came.contains(&stands(index))) {
        make_place(plan, table, index)?;
    }
    came.iter().try_for_each(|&index| finish(&table[index]))?;
    let copy = own.helper_in(users, || unshare(libc::CLONE_NEWNS));
    let copy = copy.map_err(at("copy", "a mount namespace"))?;
    let namespace = own.open_of(copy.host, "mnt").map_err(at("keep", "a mount namespace"))?;
    join(namespace.as_fd(), libc::CLONE_NEWNS).map_err(at("enter", "a mount namespace"))?;
    for &index in &came {
        let mut open = OpenOptions::new();
        open.read(true).custom_flags(libc::O_PATH | libc::O_NOFOLLOW);
        let point = &mounts[index].point;
        table[index].1 = open.open(point).map_err(at("find the copy of", point))?.into();
    }
    let mut places = Places::new();
    for &index in &later {
        if later.contains(&stands(&index)) && !waits[stands(&index)] {
            make_place(plan, table, index)?;
        }
        match waits[index] {
            false => stand(table, index)?,
            true if waits[stands(&index)] => {}
            true => drop(places.insert(index, open_place(table, index)?)),
        }
    }
    later.iter().filter(|&&index| !waits[index]).try_for_each(|&index| finish(&table[index]))?;
    Ok((namespace, places))
}

/// The mount that another one stands on, and where on it.
fn ground<'a>(
    table: &'a [Prepared<'_>],
    index: usize,
) -> Result<(BorrowedFd<'a>, &'a Path), Failure> {
    let mount = table[index].0;
    let parent = usize::try_from(mount.parent).ok().filter(|&parent| parent < index);
    let on = parent.and_then(|parent| {
        let (parent, fd) = &table[parent];
        Some((fd.as_fd(), Path::new(inside(&parent.point, &mount.point)?)))
    });
    on.ok_or_else(|| at("find what holds", &mount.point)(io::ErrorKind::NotFound.into()))
}

fn make_place(plan: &Plan, table: &[Prepared<'_>], index: usize) -> Result<(), Failure> {
    let mount = table[index].0;
    let (parent, point) = ground(table, index)?;
    let shown = usize::try_from(mount.filesystem).ok().and_then(|it| plan.filesystems.get(it));
    let device = shown.is_some_and(|it| matches!(it.kind, FilesystemKind::Device { .. }));
    let directory = mount.is_directory() && !device;
    let file_type = if directory { libc::S_IFDIR } else { libc::S_IFREG };
    place::make(parent, point, file_type).map_err(at("make", &mount.point))
}

/// Where a mount is to stand.
fn open_place(table: &[Prepared<'_>], index: usize) -> Result<OwnedFd, Failure> {
    let (parent, point) = ground(table, index)?;
    let flags = OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    let opened = match point.as_os_str().is_empty() {
        true => parent.try_clone_to_owned(),
        false => openat(parent, point, flags, Mode::empty()).map_err(io::Error::from),
    };
    opened.map_err(at("find", &table[index].0.point))
}

fn stand(table: &[Prepared<'_>], index: usize) -> Result<(), Failure> {
    let (mount, made) = &table[index];
    let (parent, point) = ground(table, index)?;
    attach(made.as_fd(), parent, point).map_err(at("mount", &mount.point))
}

pub(super) fn relative(path: &str) -> &Path {
    Path::new(path.trim_start_matches('/'))
}

/// Makes the first mount the root of the process, and lets go of the one before.
fn change_root(table: &[Prepared<'_>]) -> Result<(), Failure> {
    let here = File::open("/").map_err(at("open", "/"))?;
    let top = table.first().filter(|(mount, _)| mount.point == "/");
    let (_, top) = top.ok_or_else(|| at("find", "/")(io::ErrorKind::InvalidInput.into()))?;
    let change = || {
        attach(top.as_fd(), here.as_fd(), Path::new(""))?;
        nix::unistd::fchdir(top)?;
        // The old root ends up on top of the new one, where the next call can reach it.
        nix::unistd::pivot_root(".", ".")?;
        umount2(".", MntFlags::MNT_DETACH)?;
        nix::unistd::chdir("/")?;
        Ok(())
    };
    change().map_err(at("change to", "/"))
}
