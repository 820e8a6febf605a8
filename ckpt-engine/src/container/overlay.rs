//! The root of a container: an overlay of its own files over a layer shared with others.
//!
//! Both layers hold plain ids from 0; the idmap of the mounts shifts them, so that one layer
//! serves every VE and a VE's files mean the same on another node. The host mounts the overlay,
//! so root inside cannot change it or reach the kernel's own notes in it.

use std::{
    fs::{File, OpenOptions},
    io,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::fs::OpenOptionsExt,
    },
    path::{Path, PathBuf},
};

use super::error::{ContainerError, step};
use crate::sys::{
    mount::{FilesystemContext, attach, attribute, clone_tree, set_attributes, set_idmap},
    namespace::{become_user, in_own_mounts},
};

/// The directories that a root is made of.
#[derive(Clone, Debug)]
pub struct Layers {
    /// The shared layer, never written.
    pub lower: PathBuf,
    /// The container's own files.
    pub upper: PathBuf,
    /// An empty directory on the file system of `upper`, for the kernel.
    pub work: PathBuf,
}

impl Layers {
    /// Makes two detached mounts of the root, for a container whose ids start at `id_base`.
    ///
    /// Kernels before 6.13 take layers by their paths alone, which must lead to attached mounts,
    /// and before 6.15 only attached ones can be cloned: so the mapped layers, and then the root,
    /// stand over the directories for a moment, where only one thread sees it.
    pub(super) fn mount(
        &self,
        users: BorrowedFd<'_>,
        id_base: u32,
    ) -> Result<[OwnedFd; 2], ContainerError> {
        // Upper and work directory must come from one mount.
        let parent = match (self.upper.parent(), self.work.parent()) {
            (Some(upper), Some(work)) if upper == work => upper,
            _ => return Err(layer(&self.work)(io::ErrorKind::CrossesDevices.into())),
        };
        for path in [&self.lower, &self.upper, &self.work] {
            directory(path).map_err(layer(path))?;
        }
        let shared = mapped(&self.lower, users)?;
        let own = mapped(parent, users)?;
        in_own_mounts(|| {
            attach(shared.as_fd(), directory(&self.lower)?.as_fd(), Path::new(""))?;
            attach(own.as_fd(), directory(parent)?.as_fd(), Path::new(""))?;
            // Made as root of the container: as host root, whose id the mapped layers cannot
            // express, the kernel would make the overlay read-only.
            become_user(id_base)?;
            let context = FilesystemContext::open("overlay")?;
            context.set("source", Some("root"))?;
            context.set_path("lowerdir+", &self.lower)?;
            context.set_path("upperdir", &self.upper)?;
            context.set_path("workdir", &self.work)?;
            // Whatever the host's defaults are: notes of these kinds in the upper layer would
            // refer to this host's lower layer, and the files could not go to another one.
            for feature in ["redirect_dir", "metacopy", "index"] {
                context.set(feature, Some("off"))?;
            }
            let mount = context.mount(0)?;
            set_attributes(mount.as_fd(), 0)?;
            attach(mount.as_fd(), directory(&self.lower)?.as_fd(), Path::new(""))?;
            let clone = || clone_tree(mount.as_fd(), Path::new(""));
            Ok([clone()?, clone()?])
        })
        .map_err(step("mount the root"))
    }
}

fn layer(path: &Path) -> impl FnOnce(io::Error) -> ContainerError {
    let path = path.to_owned();
    move |source| ContainerError::Layer { path, source }
}

fn directory(path: &Path) -> io::Result<File> {
    let flags = libc::O_PATH | libc::O_DIRECTORY | libc::O_NOFOLLOW;
    OpenOptions::new().read(true).custom_flags(flags).open(path)
}

/// A detached clone of the mount under a directory, with the container's ids.
fn mapped(path: &Path, users: BorrowedFd<'_>) -> Result<OwnedFd, ContainerError> {
    let map = || {
        let mount = clone_tree(directory(path)?.as_fd(), Path::new(""))?;
        set_attributes(mount.as_fd(), attribute::NODIRATIME)?;
        set_idmap(mount.as_fd(), users)?;
        Ok(mount)
    };
    map().map_err(layer(path))
}
