//! Attaches a container's mounts. Runs as its pid 1, in its own mount namespace.
//!
//! All superblocks and all mounts are made detached while the host's own proc and sysfs are in
//! sight, which the kernel demands of whoever makes these. Then each nested namespace is put
//! together, and the container's own last, because everything else stands in it until then. How
//! mounts pass new ones on to each other is set at the very end: sooner, each of ours would be
//! passed on.

use std::{
    fs::{File, OpenOptions},
    io,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::fs::OpenOptionsExt,
    },
    path::Path,
};

use ckpt_format::container::{
    Container as Plan, Filesystem, FilesystemKind, HOST_DEVICES, Mount, inside, parts,
};
use nix::mount::{MntFlags, umount2};

use super::{groups::Groups, nested::Own, place, sysfs};
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
}

/// Attaches everything and makes it the root.
pub(super) fn build(
    plan: &Plan,
    root: OwnedFd,
    own: &Own,
    networks: &[OwnedFd],
) -> Result<Built, Failure> {
    let here = File::open("/").map_err(at("open", "/"))?;
    set_private_recursively(here.as_fd()).map_err(at("keep private", "/"))?;
    let filesystems = superblocks(plan, root, own, networks)?;
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
    let back = own.open("mnt").map_err(at("keep", "the mounts"))?;
    for table in &tables[1..] {
        unshare(libc::CLONE_NEWNS).map_err(at("make", "a mount namespace"))?;
        namespaces.push(own.open("mnt").map_err(at("keep", "a mount namespace"))?);
        assemble(plan, table)?;
        join(back.as_fd(), libc::CLONE_NEWNS).map_err(at("leave", "a mount namespace"))?;
    }
    assemble(plan, &tables[0])?;
    groups.apply(tables.iter().flatten())?;
    Ok(Built { trees, namespaces })
}

/// Makes all file systems. `networks` are those that programs have made.
fn superblocks(
    plan: &Plan,
    root: OwnedFd,
    own: &Own,
    networks: &[OwnedFd],
) -> Result<Vec<OwnedFd>, Failure> {
    let mut root = Some(root);
    let network = own.open("net").map_err(at("keep", "the network"))?;
    let all: Vec<&OwnedFd> = std::iter::once(&network).chain(networks).collect();
    let of = |filesystem: &Filesystem| {
        let place = usize::try_from(filesystem.network).ok();
        let found = place.and_then(|place| all.get(place).copied());
        found.ok_or_else(|| io::Error::from(io::ErrorKind::InvalidInput))
    };
    let mut filesystems = Vec::new();
    for filesystem in &plan.filesystems {
        let made = match filesystem.kind {
            FilesystemKind::Root => root.take().ok_or_else(|| io::ErrorKind::InvalidInput.into()),
            FilesystemKind::Network => of(filesystem).and_then(OwnedFd::try_clone),
            FilesystemKind::Sysfs if filesystem.network != 0 => of(filesystem).and_then(|other| {
                sysfs::make_in(other.as_fd(), network.as_fd(), || make(filesystem))
            }),
            _ => make(filesystem),
        };
        filesystems.push(made.map_err(at("make", filesystem.kind.name()))?);
    }
    // Kernels before 6.15 clone attached mounts only. Where these stand does not matter: they go
    // with the host's tree.
    let aside = File::open("/proc").map_err(at("open", "/proc"))?;
    for (made, filesystem) in filesystems.iter().zip(&plan.filesystems) {
        if !matches!(filesystem.kind, FilesystemKind::Device { .. } | FilesystemKind::Network) {
            attach(made.as_fd(), aside.as_fd(), Path::new(""))
                .map_err(at("attach", filesystem.kind.name()))?;
        }
    }
    Ok(filesystems)
}

fn make(filesystem: &Filesystem) -> io::Result<OwnedFd> {
    if let FilesystemKind::Device { name } = &filesystem.kind {
        if !HOST_DEVICES.iter().any(|(known, ..)| known == name) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let mut device = OpenOptions::new();
        device.read(true).custom_flags(libc::O_PATH);
        return Ok(device.open(Path::new("/dev").join(name))?.into());
    }
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
fn finish(mount: &Mount, made: &OwnedFd) -> io::Result<()> {
    set_attributes(made.as_fd(), mount.attributes)?;
    if mount.unbindable {
        set_propagation(made.as_fd(), Propagation::Unbindable)?;
    }
    Ok(())
}

/// Attaches the mounts of one namespace, which becomes the caller's tree.
fn assemble(plan: &Plan, table: &[(&Mount, OwnedFd)]) -> Result<(), Failure> {
    let here = File::open("/").map_err(at("open", "/"))?;
    let top = table.first().filter(|(mount, _)| mount.point == "/");
    let (_, top) = top.ok_or_else(|| at("find", "/")(io::ErrorKind::InvalidInput.into()))?;
    attach(top.as_fd(), here.as_fd(), Path::new("")).map_err(at("mount", "/"))?;
    change_root(top.as_fd()).map_err(at("change to", "/"))?;
    for (index, (mount, made)) in table.iter().enumerate().skip(1) {
        let parent = usize::try_from(mount.parent).ok().filter(|&parent| parent < index);
        let on = parent.and_then(|parent| {
            let (parent, fd) = &table[parent];
            Some((fd, Path::new(inside(&parent.point, &mount.point)?)))
        });
        let (parent, point) =
            on.ok_or_else(|| at("find what holds", &mount.point)(io::ErrorKind::NotFound.into()))?;
        let shown = usize::try_from(mount.filesystem).ok().and_then(|it| plan.filesystems.get(it));
        let device = shown.is_some_and(|it| matches!(it.kind, FilesystemKind::Device { .. }));
        let directory = mount.is_directory() && !device;
        let file_type = if directory { libc::S_IFDIR } else { libc::S_IFREG };
        place::make(parent.as_fd(), point, file_type).map_err(at("make", &mount.point))?;
        attach(made.as_fd(), parent.as_fd(), point).map_err(at("mount", &mount.point))?;
    }
    for (mount, made) in table {
        finish(mount, made).map_err(at("set the attributes of", &mount.point))?;
    }
    Ok(())
}

pub(super) fn relative(path: &str) -> &Path {
    Path::new(path.trim_start_matches('/'))
}

/// Makes the mount the root of the process and lets go of the one before.
fn change_root(root: BorrowedFd<'_>) -> io::Result<()> {
    nix::unistd::fchdir(root)?;
    // The old root ends up on top of the new one, where the next call can reach it.
    nix::unistd::pivot_root(".", ".")?;
    umount2(".", MntFlags::MNT_DETACH)?;
    nix::unistd::chdir("/")?;
    Ok(())
}
