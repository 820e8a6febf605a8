//! Ways through a tree that never leave it: no symbolic link is followed, no mount is crossed.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use nix::{
    errno::Errno,
    fcntl::{OFlag, OpenHow, ResolveFlag, openat, openat2},
    sys::stat::Mode,
};

/// The kernel takes no longer path in one call.
const STEP_LENGTH_MAX: usize = 4000;

/// The path of `name` in the directory `parent`.
pub(super) fn join(parent: &[u8], name: &[u8]) -> Vec<u8> {
    let mut path = Vec::with_capacity(parent.len() + 1 + name.len());
    path.extend_from_slice(parent);
    if !parent.is_empty() {
        path.push(b'/');
    }
    path.extend_from_slice(name);
    path
}

/// A path as its directory and its last name.
pub(super) fn split(path: &[u8]) -> (&[u8], &[u8]) {
    match path.iter().rposition(|&byte| byte == b'/') {
        Some(slash) => (&path[..slash], &path[slash + 1..]),
        None => (&[], path),
    }
}

/// Opens a directory of the tree as a place (`O_PATH`).
pub(super) fn open_directory(top: BorrowedFd<'_>, path: &[u8]) -> Result<OwnedFd, Errno> {
    open_directory_for(top, path, OFlag::O_PATH)
}

/// Opens a directory of the tree, in steps that the kernel accepts.
pub(super) fn open_directory_for(
    top: BorrowedFd<'_>,
    path: &[u8],
    access: OFlag,
) -> Result<OwnedFd, Errno> {
    let mut place: Option<OwnedFd> = None;
    let mut rest = path;
    loop {
        let (step, next) = match rest.len() {
            0 => (&b"."[..], &[][..]),
            length if length <= STEP_LENGTH_MAX => (rest, &[][..]),
            _ => {
                let cut = rest[..STEP_LENGTH_MAX].iter().rposition(|&byte| byte == b'/');
                let cut = cut.ok_or(Errno::ENAMETOOLONG)?;
                (&rest[..cut], &rest[cut + 1..])
            }
        };
        let access = if next.is_empty() { access } else { OFlag::O_PATH };
        let flags = OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        let how = OpenHow::new().flags(access | flags).resolve(
            ResolveFlag::RESOLVE_BENEATH
                | ResolveFlag::RESOLVE_NO_SYMLINKS
                | ResolveFlag::RESOLVE_NO_XDEV,
        );
        let base = place.as_ref().map_or(top, AsFd::as_fd);
        let opened = openat2(base, step, how)?;
        if next.is_empty() {
            return Ok(opened);
        }
        (place, rest) = (Some(opened), next);
    }
}

/// Opens a name in a directory as a place (`O_PATH`), whatever it is. The empty name is the
/// directory itself.
pub(super) fn open_name(directory: BorrowedFd<'_>, name: &[u8]) -> Result<OwnedFd, Errno> {
    let name = if name.is_empty() { b"." } else { name };
    let flags = OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    openat(directory, name, flags, Mode::empty())
}

/// Opens again, for work, what is open as a place.
pub(super) fn reopen(place: BorrowedFd<'_>, flags: OFlag) -> Result<OwnedFd, Errno> {
    let flags = flags | OFlag::O_CLOEXEC | OFlag::O_NONBLOCK | OFlag::O_NOCTTY;
    openat(nix::fcntl::AT_FDCWD, proc_name(place).as_str(), flags, Mode::empty())
}

/// A path that the kernel follows to exactly the file that is open, even to a symbolic link.
pub(super) fn proc_name(place: BorrowedFd<'_>) -> String {
    use std::os::fd::AsRawFd;
    format!("/proc/self/fd/{}", place.as_raw_fd())
}

#[cfg(test)]
mod tests {
    use std::fs::{self, File};

    use super::*;

    #[test]
    fn paths_are_joined_and_split() {
        assert_eq!(join(b"", b"a"), b"a");
        assert_eq!(join(b"a/b", b"c"), b"a/b/c");
        assert_eq!(split(b"a/b/c"), (&b"a/b"[..], &b"c"[..]));
        assert_eq!(split(b"a"), (&b""[..], &b"a"[..]));
    }

    #[test]
    fn a_link_out_of_the_tree_is_not_followed() {
        let directory = tempfile::tempdir().unwrap();
        std::os::unix::fs::symlink("/", directory.path().join("out")).unwrap();
        fs::create_dir(directory.path().join("in")).unwrap();
        let top = File::open(directory.path()).unwrap();
        assert!(open_directory(top.as_fd(), b"in").is_ok());
        assert!(open_directory(top.as_fd(), b"").is_ok());
        assert!(open_directory(top.as_fd(), b"out").is_err());
        assert_eq!(open_directory(top.as_fd(), b"out/etc").unwrap_err(), Errno::ELOOP);
        assert_eq!(open_directory(top.as_fd(), b"in/../..").unwrap_err(), Errno::EXDEV);
    }

    #[test]
    fn a_path_longer_than_the_kernel_takes_is_walked() {
        let directory = tempfile::tempdir().unwrap();
        let top = File::open(directory.path()).unwrap();
        let name = [b'd'; 200];
        let (mut path, mut place) = (Vec::new(), open_directory(top.as_fd(), b"").unwrap());
        for _ in 0..60 {
            nix::sys::stat::mkdirat(&place, &name[..], Mode::S_IRWXU).unwrap();
            place = open_directory(place.as_fd(), &name).unwrap();
            path = join(&path, &name);
        }
        let found = open_directory(top.as_fd(), &path).unwrap();
        let inode = |fd: &OwnedFd| nix::sys::stat::fstat(fd).unwrap().st_ino;
        assert_eq!(inode(&found), inode(&place));
    }
}
