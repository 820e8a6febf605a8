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
    mount::{FilesystemContext, attribute, clone_tree, set_attributes, set_idmap},
    namespace::as_user,
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
    /// Makes a detached mount of the root, for a container whose ids start at `id_base`.
    pub(super) fn mount(
        &self,
        users: BorrowedFd<'_>,
        id_base: u32,
    ) -> Result<OwnedFd, ContainerError> {
        let lower = mapped(&self.lower, users)?;
        // Upper and work directory must come from one mount.
        let parent = match (self.upper.parent(), self.work.parent()) {
            (Some(upper), Some(work)) if upper == work => upper,
            _ => {
                let source = io::ErrorKind::CrossesDevices.into();
                return Err(ContainerError::Layer { path: self.work.clone(), source });
            }
        };
        let parent = mapped(parent, users)?;
        let upper = below(parent.as_fd(), &self.upper)?;
        let work = below(parent.as_fd(), &self.work)?;
        // Made as root of the container: as host root, whose id the mapped layers cannot
        // express, the kernel would make the overlay read-only.
        as_user(id_base, || {
            let context = FilesystemContext::open("overlay")?;
            context.set("source", Some("root"))?;
            context.set_descriptor("lowerdir+", lower.as_fd())?;
            context.set_descriptor("upperdir", upper.as_fd())?;
            context.set_descriptor("workdir", work.as_fd())?;
            // Whatever the host's defaults are: notes of these kinds in the upper layer would
            // refer to this host's lower layer, and the files could not go to another one.
            for feature in ["redirect_dir", "metacopy", "index"] {
                context.set(feature, Some("off"))?;
            }
            let mount = context.mount(0)?;
            set_attributes(mount.as_fd(), 0)?;
            Ok(mount)
        })
        .map_err(step("mount the root"))
    }
}

fn mapped(path: &Path, users: BorrowedFd<'_>) -> Result<OwnedFd, ContainerError> {
    let map = || {
        let directory = OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_PATH | libc::O_DIRECTORY)
            .open(path)?;
        let mount = clone_tree(directory.as_fd(), Path::new(""))?;
        set_attributes(mount.as_fd(), attribute::NODIRATIME)?;
        set_idmap(mount.as_fd(), users)?;
        Ok(mount)
    };
    map().map_err(|source| ContainerError::Layer { path: path.into(), source })
}

fn below(parent: BorrowedFd<'_>, path: &Path) -> Result<File, ContainerError> {
    let open = || {
        let name = path.file_name().ok_or(io::ErrorKind::InvalidInput)?;
        let flags = nix::fcntl::OFlag::O_PATH
            | nix::fcntl::OFlag::O_DIRECTORY
            | nix::fcntl::OFlag::O_NOFOLLOW
            | nix::fcntl::OFlag::O_CLOEXEC;
        let fd = nix::fcntl::openat(parent, name, flags, nix::sys::stat::Mode::empty())?;
        Ok(File::from(fd))
    };
    open().map_err(|source| ContainerError::Layer { path: path.into(), source })
}
