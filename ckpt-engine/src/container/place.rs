//! Makes the places that something is mounted on, or mounted from.

use std::{
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::Path,
};

use nix::{
    errno::Errno,
    fcntl::{OFlag, openat},
    sys::stat::{FileStat, Mode, SFlag, fstat, mkdirat, mknodat},
    unistd::{UnlinkatFlags, unlinkat},
};

/// Makes a directory, or a file of another type, where there is none, with all directories above
/// it. A symbolic link that is in the way goes: what is mounted has none in its path, so the VE
/// has replaced it, and only its files have not come yet.
pub(super) fn make(top: BorrowedFd<'_>, path: &Path, file_type: u32) -> io::Result<()> {
    let mut at = top.try_clone_to_owned()?;
    let mut parts = path.iter().peekable();
    while let Some(part) = parts.next() {
        let last = parts.peek().is_none();
        let wanted = if last { file_type } else { libc::S_IFDIR };
        let found = look(&at, part);
        if wanted != libc::S_IFDIR {
            return match found {
                Ok(found) if !is(&found.1, libc::S_IFLNK) => Ok(()),
                found => node(&at, part, file_type, found.is_ok()),
            };
        }
        at = match found {
            Ok((place, status)) if is(&status, libc::S_IFDIR) => place,
            found => {
                if found.is_ok() {
                    unlinkat(&at, part, UnlinkatFlags::NoRemoveDir)?;
                }
                mkdirat(&at, part, Mode::from_bits_truncate(0o755))?;
                look(&at, part)?.0
            }
        };
    }
    Ok(())
}

fn look(directory: &OwnedFd, name: &std::ffi::OsStr) -> Result<(OwnedFd, FileStat), Errno> {
    let flags = OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    let place = openat(directory, name, flags, Mode::empty())?;
    let status = fstat(&place)?;
    Ok((place, status))
}

fn is(status: &FileStat, file_type: u32) -> bool {
    status.st_mode & libc::S_IFMT == file_type
}

fn node(
    directory: &OwnedFd,
    name: &std::ffi::OsStr,
    file_type: u32,
    in_the_way: bool,
) -> io::Result<()> {
    if in_the_way {
        unlinkat(directory, name, UnlinkatFlags::NoRemoveDir)?;
    }
    let kind = SFlag::from_bits_truncate(file_type & libc::S_IFMT);
    // The only device that a VE can have made is the one that stands for nothing.
    mknodat(directory.as_fd(), name, kind, Mode::from_bits_truncate(0o600), 0)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileTypeExt;

    use super::*;

    #[test]
    fn places_are_made_with_all_above_them() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path();
        std::os::unix::fs::symlink("/nowhere", path.join("link")).unwrap();
        std::fs::write(path.join("kept"), b"x").unwrap();
        let top = std::fs::File::open(path).unwrap();
        let make = |name: &str, kind| make(top.as_fd(), Path::new(name), kind).unwrap();
        make("a/b/c", libc::S_IFDIR);
        make("a/b/file", libc::S_IFREG);
        make("link/below/socket", libc::S_IFSOCK);
        make("kept", libc::S_IFREG);
        make("", libc::S_IFDIR);
        let kind = |name: &str| path.join(name).symlink_metadata().unwrap().file_type();
        assert!(kind("a/b/c").is_dir() && kind("a/b/file").is_file() && kind("link").is_dir());
        assert!(kind("link/below/socket").is_socket());
        assert_eq!(std::fs::read(path.join("kept")).unwrap(), b"x");
    }
}
