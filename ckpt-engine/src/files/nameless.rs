//! Symbolic links and nodes of unix sockets and devices that have no name any more: only a
//! descriptor of `O_PATH` holds them.

use std::{
    ffi::OsStr,
    fs, io,
    os::{
        fd::{AsFd, OwnedFd},
        unix::{
            ffi::{OsStrExt, OsStringExt},
            fs::{PermissionsExt, lchown, symlink},
        },
    },
    path::Path,
};

use ckpt_format::{
    container::may_have_device,
    files::{DeletedNode, Kind},
};
use nix::{
    fcntl::{OFlag, open, readlinkat},
    sys::stat::{Mode, SFlag, makedev, mknod},
};

use super::{
    capture::Capture,
    find::{Object, Refusal},
    rebuild::{Rebuild, RebuildError, lossy},
};
use crate::{momentary, unnamed};

/// Whether it is of a type that can be made by its name alone, and has nothing in it. A device node
/// is made by the host in the place of the VE, which may not make one: only of a device that may be
/// among the files of a VE.
pub(super) fn is_node(object: &Object) -> bool {
    match object.file_type() {
        libc::S_IFLNK | libc::S_IFSOCK => true,
        libc::S_IFCHR => may_have_device(device(object)),
        _ => false,
    }
}

fn device(object: &Object) -> (u32, u32) {
    (libc::major(object.status.special), libc::minor(object.status.special))
}

pub(super) fn capture(capture: &mut Capture<'_>, id: usize) -> Result<Kind, Refusal> {
    let object = &capture.found.objects[id];
    if let Some(&node) = capture.nodes.get(&object.inode()) {
        return Ok(Kind::DeletedNode { node });
    }
    let target = match object.file_type() {
        libc::S_IFLNK => Some(readlinkat(object.fd(), c"")?.into_vec().into()),
        _ => None,
    };
    let node = DeletedNode {
        path: unnamed::lost_name(&object.link).unwrap_or(&object.link).to_vec(),
        target,
        device: (object.file_type() == libc::S_IFCHR).then(|| device(object)),
        mode: object.status.mode & 0o7777,
        uid: capture.source.inside(object.status.uid),
        gid: capture.source.inside(object.status.gid),
    };
    let place = u32::try_from(capture.files.nodes.len()).map_err(io::Error::other)?;
    capture.nodes.insert(object.inode(), place);
    capture.files.nodes.push(node);
    Ok(Kind::DeletedNode { node: place })
}

pub(super) fn rebuild(
    rebuild: &mut Rebuild<'_>,
    node: u32,
    flags: u32,
) -> Result<OwnedFd, RebuildError> {
    let described = rebuild.files.nodes.get(node as usize).ok_or(RebuildError::Damaged)?;
    // Whoever sends it could ask for a disk of the host.
    if described.device.is_some_and(|number| !may_have_device(number)) {
        return Err(RebuildError::Damaged);
    }
    let failed = |source| RebuildError::Open { path: lossy(&described.path), source };
    if !rebuild.nodes.contains_key(&node) {
        let made = make(described, rebuild.target.id_base).map_err(failed)?;
        rebuild.nodes.insert(node, made);
    }
    rebuild.target.reopen(rebuild.nodes[&node].as_fd(), flags).map_err(failed)
}

fn make(node: &DeletedNode, id_base: u32) -> io::Result<OwnedFd> {
    momentary::near_old_name(Path::new(OsStr::from_bytes(&node.path)), |path| {
        match &node.target {
            Some(target) => symlink(OsStr::from_bytes(target), path)?,
            None => {
                let (kind, number) = match node.device {
                    Some((major, minor)) => (SFlag::S_IFCHR, makedev(major.into(), minor.into())),
                    None => (SFlag::S_IFSOCK, 0),
                };
                mknod(path, kind, Mode::empty(), number)?;
                fs::set_permissions(path, fs::Permissions::from_mode(node.mode & 0o7777))?;
            }
        }
        lchown(path, Some(id_base + node.uid), Some(id_base + node.gid))?;
        let naming = OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        Ok(open(path, naming, Mode::empty())?)
    })
}
