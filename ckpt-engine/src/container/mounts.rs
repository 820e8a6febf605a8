//! Attaches a container's mounts. Runs as its pid 1, in its own mount namespace.

use std::{
    fs::{DirBuilder, File, OpenOptions},
    io,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::fs::{DirBuilderExt, OpenOptionsExt},
    },
    path::Path,
};

use ckpt_format::container::{Container as Plan, Filesystem, FilesystemKind, HOST_DEVICES, Mount};
use nix::mount::{MntFlags, umount2};

use crate::sys::mount::{
    FilesystemContext, attach, clone_tree, set_attributes, set_private_recursively, set_shared,
};

/// What failed, and why.
pub(super) type Failure = (String, io::Error);

/// For `map_err`: names what failed.
fn at<'a>(act: &'a str, point: &'a str) -> impl FnOnce(io::Error) -> Failure + 'a {
    move |source| (format!("{act} {point}"), source)
}

/// Attaches everything and makes it the root. Returns the tmpfs file systems, from their tops.
pub(super) fn build(plan: &Plan, root: OwnedFd) -> Result<Vec<(usize, OwnedFd)>, Failure> {
    let here = File::open("/").map_err(at("open", "/"))?;
    set_private_recursively(here.as_fd()).map_err(at("keep private", "/"))?;
    // proc and sysfs can be made only while the host's own are in sight, so all superblocks are
    // made before the host's tree goes.
    let mut root = Some(root);
    let mut filesystems = Vec::new();
    for filesystem in &plan.filesystems {
        let made = match filesystem.kind {
            FilesystemKind::Root => root.take().ok_or_else(|| io::ErrorKind::InvalidInput.into()),
            _ => make(filesystem),
        };
        filesystems.push(made.map_err(at("make", name(&filesystem.kind)))?);
    }
    // Kernels before 6.15 clone attached mounts only. Where these stand does not matter: they go
    // with the host's tree.
    let aside = File::open("/proc").map_err(at("open", "/proc"))?;
    for (made, filesystem) in filesystems.iter().zip(&plan.filesystems) {
        if !matches!(filesystem.kind, FilesystemKind::Device { .. }) {
            attach(made.as_fd(), aside.as_fd(), Path::new(""))
                .map_err(at("attach", name(&filesystem.kind)))?;
        }
    }
    let mut trees = Vec::new();
    for (index, filesystem) in plan.filesystems.iter().enumerate() {
        if filesystem.kind == FilesystemKind::Tmpfs {
            let tree = clone_tree(filesystems[index].as_fd(), Path::new(""));
            trees.push((index, tree.map_err(at("clone", "tmpfs"))?));
        }
    }
    let mut mounts = Vec::new();
    for mount in &plan.mounts {
        let made = prepare(mount, &filesystems).map_err(at("prepare", &mount.point))?;
        mounts.push((mount, made));
    }
    let mut mounts = mounts.into_iter();
    let (first, top) = mounts
        .next()
        .filter(|(mount, _)| mount.point == "/")
        .ok_or_else(|| at("find", "/")(io::ErrorKind::InvalidInput.into()))?;
    attach(top.as_fd(), here.as_fd(), Path::new("")).map_err(at("mount", "/"))?;
    change_root(top.as_fd()).map_err(at("change to", "/"))?;
    let mut shared = Vec::new();
    for (mount, made) in mounts {
        make_point(mount).map_err(at("make", &mount.point))?;
        attach(made.as_fd(), top.as_fd(), relative(&mount.point))
            .map_err(at("mount", &mount.point))?;
        if mount.shared {
            shared.push(made);
        }
    }
    // Sharing comes last, or a mount would be passed on to its parent's peers.
    for mount in shared {
        set_shared(mount.as_fd()).map_err(at("share", "a mount"))?;
    }
    if first.shared {
        set_shared(top.as_fd()).map_err(at("share", "/"))?;
    }
    Ok(trees)
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
    let kind = name(&filesystem.kind);
    let context = FilesystemContext::open(kind)?;
    context.set("source", Some(kind))?;
    for option in &filesystem.options {
        context.set(&option.name, option.value.as_deref())?;
    }
    context.mount(0)
}

fn name(kind: &FilesystemKind) -> &str {
    match kind {
        FilesystemKind::Root => "root",
        FilesystemKind::Tmpfs => "tmpfs",
        FilesystemKind::Proc => "proc",
        FilesystemKind::Sysfs => "sysfs",
        FilesystemKind::Devpts => "devpts",
        FilesystemKind::Mqueue => "mqueue",
        FilesystemKind::Cgroup => "cgroup2",
        FilesystemKind::Device { name } => name,
    }
}

/// A detached mount of what is to be attached.
fn prepare(mount: &Mount, filesystems: &[OwnedFd]) -> io::Result<OwnedFd> {
    let index = usize::try_from(mount.filesystem).map_err(io::Error::other)?;
    let filesystem = filesystems.get(index).ok_or(io::ErrorKind::InvalidInput)?;
    let root = relative(&mount.root);
    if mount.root != "/" {
        make_inside(filesystem.as_fd(), root, mount.directory)?;
    }
    let made = clone_tree(filesystem.as_fd(), root)?;
    set_attributes(made.as_fd(), mount.attributes)?;
    Ok(made)
}

/// The directory or file of a file system that is mounted on its own, made if it is missing.
fn make_inside(filesystem: BorrowedFd<'_>, root: &Path, directory: bool) -> io::Result<()> {
    use nix::{
        errno::Errno,
        fcntl::{OFlag, openat},
        sys::stat::{Mode, mkdirat},
    };
    let flags = OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    let (mut at, mut parts) = (filesystem.try_clone_to_owned()?, root.iter().peekable());
    while let Some(part) = parts.next() {
        if parts.peek().is_none() && !directory {
            let flags = flags | OFlag::O_CREAT | OFlag::O_RDONLY;
            openat(&at, part, flags, Mode::from_bits_truncate(0o644))?;
            return Ok(());
        }
        match mkdirat(&at, part, Mode::from_bits_truncate(0o755)) {
            Ok(()) | Err(Errno::EEXIST) => (),
            Err(source) => return Err(source.into()),
        }
        at = openat(&at, part, flags | OFlag::O_DIRECTORY, Mode::empty())?;
    }
    Ok(())
}

/// The place that a mount covers. The container's root is `/` by now.
fn make_point(mount: &Mount) -> io::Result<()> {
    let point = Path::new(&mount.point);
    if mount.directory {
        return DirBuilder::new().recursive(true).mode(0o755).create(point);
    }
    if let Some(parent) = point.parent() {
        DirBuilder::new().recursive(true).mode(0o755).create(parent)?;
    }
    OpenOptions::new().create(true).truncate(false).write(true).open(point).map(drop)
}

fn relative(path: &str) -> &Path {
    let path = path.trim_start_matches('/');
    Path::new(path)
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
