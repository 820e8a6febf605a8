//! Names of unix sockets: on the VE's files, and where nobody sees them.

use std::{
    fs, io,
    os::{
        fd::{AsFd, BorrowedFd},
        unix::{ffi::OsStrExt, fs::PermissionsExt},
    },
    path::Path,
    thread,
};

use ckpt_format::files::{SocketNode, UnixSocket};

use super::super::address;
use crate::sys::{descriptor, socket};

/// Where a socket is reached now, which is not its name when its node was renamed.
pub(super) fn address_of(unix: &UnixSocket) -> Option<Vec<u8>> {
    let name = unix.name.as_ref()?;
    match &unix.node {
        Some(node) => Some(address::encode_unix(&node.path)),
        None => Some(address::encode_unix(name)),
    }
}

/// Whether a name is a path.
pub(super) fn is_path(name: &[u8]) -> bool {
    name.first().is_some_and(|&byte| byte != 0)
}

/// Whether a socket has this name already: an accepted end has that of its listener.
pub(super) fn is_named(fd: BorrowedFd<'_>, name: &[u8]) -> io::Result<bool> {
    let address = socket::address(fd, socket::End::Local)?;
    Ok(address::decode_unix(&address).is_some_and(|own| own == name))
}

/// Runs `work` in a file system that is empty and that nobody else sees, as `/` and as the
/// working directory: there any path can be bound, which becomes the socket's name for ever.
pub(super) fn in_empty_root<T: Send>(work: impl FnOnce() -> io::Result<T> + Send) -> io::Result<T> {
    let own_root = || {
        descriptor::unshare_directories()?;
        let root = descriptor::detached_tmpfs()?;
        nix::unistd::fchdir(&root)?;
        nix::unistd::chroot(".")?;
        work()
    };
    in_thread(own_root)
}

/// Runs `work` on a thread that may change its directories.
fn in_thread<T: Send>(work: impl FnOnce() -> io::Result<T> + Send) -> io::Result<T> {
    thread::scope(|scope| scope.spawn(work).join())
        .unwrap_or_else(|_| Err(io::Error::other("the thread that names sockets panicked")))
}

/// Binds a path in the empty root.
pub(super) fn bind_in_empty_root(fd: BorrowedFd<'_>, name: &[u8]) -> io::Result<()> {
    let path = Path::new(std::ffi::OsStr::from_bytes(name));
    if let Some(parent) = path.parent().filter(|parent| !parent.as_os_str().is_empty()) {
        fs::create_dir_all(parent)?;
    }
    socket::bind(fd, &address::encode_unix(name))
}

/// Binds a socket to its node among the VE's files, in place of the node that came with them.
pub(super) fn bind_node(
    fd: BorrowedFd<'_>,
    name: &[u8],
    node: &SocketNode,
    id_base: u32,
) -> io::Result<()> {
    let path = Path::new(std::ffi::OsStr::from_bytes(&node.path));
    match fs::symlink_metadata(path) {
        Ok(_) => fs::remove_file(path)?,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(error),
    }
    let address = address::encode_unix(name);
    if name == node.path {
        socket::bind(fd, &address)?;
    } else if let Some(directory) = directory_of_relative(name, &node.path) {
        in_thread(|| {
            descriptor::unshare_directories()?;
            std::env::set_current_dir(directory)?;
            socket::bind(fd.as_fd(), &address)
        })?;
    } else {
        // Renamed since: its name stays the old one.
        socket::bind(fd, &address)?;
        fs::rename(std::ffi::OsStr::from_bytes(name), path)?;
    }
    std::os::unix::fs::lchown(path, Some(id_base + node.uid), Some(id_base + node.gid))?;
    fs::set_permissions(path, fs::Permissions::from_mode(node.mode))
}

/// The directory in which a relative name leads to this path.
fn directory_of_relative<'a>(name: &[u8], path: &'a [u8]) -> Option<&'a Path> {
    let directory = path.strip_suffix(name)?;
    let fits = name.first() != Some(&b'/') && directory.ends_with(b"/");
    fits.then(|| Path::new(std::ffi::OsStr::from_bytes(directory)))
}
