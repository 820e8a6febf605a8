//! Files without a name: memfds, and files of the VE whose name has gone while somebody holds them
//! open, maps them or runs them. Their contents travel with the memory of the processes.

use std::{
    ffi::OsStr,
    fs::{self, File},
    io,
    os::{
        fd::{AsFd, OwnedFd},
        unix::{
            ffi::OsStrExt,
            fs::{MetadataExt, fchown},
        },
    },
    path::Path,
};

use ckpt_format::memory::{SharedKind, SharedObject};
use nix::{
    errno::Errno,
    fcntl::{FcntlArg, OFlag, fcntl, open},
    sys::stat::{Mode, fchmod},
};

use crate::{
    momentary,
    sys::{identity, namespace, task},
};

/// What the kernel appends to a name that has gone.
const SUFFIX: &[u8] = b" (deleted)";

/// Set in the ids of files of the VE, whose numbers are those of another file system.
const OF_A_FILE: u64 = 1 << 62;

/// The [`SharedObject::id`] of a file of the VE.
pub(crate) fn file_id(device: u64, inode: u64) -> u64 {
    let mut hasher = blake3::Hasher::new();
    hasher.update(&device.to_le_bytes()).update(&inode.to_le_bytes());
    let hash = hasher.finalize().as_bytes().first_chunk().map_or(0, |it| u64::from_le_bytes(*it));
    OF_A_FILE | hash & (OF_A_FILE - 1)
}

/// The name that a link of `/proc` shows for a file that has lost it.
pub(crate) fn lost_name(link: &[u8]) -> Option<&[u8]> {
    link.strip_suffix(SUFFIX)
}

/// The name of a memfd, from what a link of `/proc` shows.
pub(crate) fn memfd_name(link: &[u8]) -> Option<&[u8]> {
    lost_name(link)?.strip_prefix(b"/memfd:")
}

/// Describes an open memfd or file without a name.
pub(crate) fn describe(file: &File, link: &[u8], id_base: u32) -> io::Result<SharedObject> {
    let metadata = file.metadata()?;
    let mode = metadata.mode() & 0o7777;
    let inside = |id: u32| id.checked_sub(id_base).unwrap_or(65534);
    let (uid, gid) = (inside(metadata.uid()), inside(metadata.gid()));
    let size = metadata.len();
    let huge = huge_page(file)?;
    // The numbers of the kernel's own file systems would be taken for each other.
    let own_id = match huge {
        Some(_) => file_id(metadata.dev(), metadata.ino()),
        None => metadata.ino(),
    };
    if let Some(name) = memfd_name(link) {
        let name = String::from_utf8_lossy(name).into_owned();
        let seals = fcntl(file, FcntlArg::F_GET_SEALS)?.cast_unsigned();
        let kind = SharedKind::Memfd { name, seals, mode, uid, gid, huge: huge.unwrap_or(0) };
        return Ok(SharedObject { id: own_id, size, kind });
    }
    if let Some(page) = huge {
        return Ok(SharedObject { id: own_id, size, kind: SharedKind::Huge { page } });
    }
    let path = lost_name(link).unwrap_or(link).to_vec();
    let name = path.rsplit(|&byte| byte == b'/').next().unwrap_or(&[]);
    // O_TMPFILE shows a name of `#` and the inode number, and may be linked to a name later.
    let linkable = name.strip_prefix(b"#").is_some_and(|rest| rest.iter().all(u8::is_ascii_digit));
    let id = file_id(metadata.dev(), metadata.ino());
    Ok(SharedObject { id, size, kind: SharedKind::Deleted { path, mode, uid, gid, linkable } })
}

/// The size of the huge pages that a file is made of, in bytes. No file of a VE's own is: only the
/// kernel makes such for it.
pub(crate) fn huge_page(file: &File) -> io::Result<Option<u64>> {
    let found = nix::sys::statfs::fstatfs(file)?;
    let is_huge = found.filesystem_type() == nix::sys::statfs::HUGETLBFS_MAGIC;
    Ok(is_huge.then(|| u64::try_from(found.block_size()).unwrap_or(0)))
}

/// A file without a name, empty, in the file system that it belongs to.
#[derive(Debug)]
pub(crate) struct Blank<'a> {
    pub(crate) path: &'a [u8],
    pub(crate) mode: u32,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) linkable: bool,
}

impl Blank<'_> {
    /// Makes it among the mounts of a process of the VE.
    pub(crate) fn make(&self, process: &OwnedFd, id_base: u32) -> io::Result<File> {
        namespace::in_mounts_of(process, || {
            identity::own_new_files(id_base, id_base)?;
            let file = File::from(self.open()?);
            fchown(&file, Some(id_base + self.uid), Some(id_base + self.gid))?;
            fchmod(file.as_fd(), Mode::from_bits_truncate(self.mode & 0o7777))?;
            Ok(file)
        })
    }

    /// Makes it among the mounts of the calling thread, as whom it acts.
    pub(crate) fn open(&self) -> io::Result<OwnedFd> {
        let path = Path::new(OsStr::from_bytes(self.path));
        if !self.linkable {
            // So that it shows that name as deleted again.
            if let Ok(fd) = momentary::under_old_name(path, new) {
                return Ok(fd);
            }
        }
        // Something else may be in its way.
        let mut flags = OFlag::O_TMPFILE | OFlag::O_RDWR | OFlag::O_CLOEXEC;
        flags.set(OFlag::O_EXCL, !self.linkable);
        let mut failure = Errno::ENOENT;
        for directory in path.ancestors().skip(1) {
            match open(directory, flags, private()) {
                Ok(fd) => return Ok(fd),
                Err(errno) => failure = errno,
            }
        }
        Err(failure.into())
    }
}

fn private() -> Mode {
    Mode::S_IRUSR | Mode::S_IWUSR
}

fn new(path: &Path) -> io::Result<OwnedFd> {
    let flags = OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_RDWR | OFlag::O_CLOEXEC;
    Ok(open(path, flags | OFlag::O_NOFOLLOW, private())?)
}

/// Finds memfds and files without a name that are large enough to be copied while the VE runs:
/// descriptors of these processes (as the host numbers them). What changes meanwhile is left out.
pub fn find_large(processes: impl Iterator<Item = i32>, id_base: u32) -> Vec<(SharedObject, File)> {
    const LARGE: u64 = 256 << 10;
    let mut found: Vec<(SharedObject, File)> = Vec::new();
    for host in processes {
        let Ok(entries) = fs::read_dir(format!("/proc/{host}/fd")) else { continue };
        for entry in entries.flatten() {
            let Ok(link) = fs::read_link(entry.path()) else { continue };
            let link = link.as_os_str().as_bytes();
            if !link.starts_with(b"/") || lost_name(link).is_none() {
                continue;
            }
            let Ok(metadata) = fs::metadata(entry.path()) else { continue };
            if !metadata.is_file() || metadata.len() < LARGE {
                continue;
            }
            let Ok(file) = File::open(entry.path()) else { continue };
            let Ok(object) = describe(&file, link, id_base) else { continue };
            if found.iter().all(|(known, _)| known.id != object.id) {
                found.push((object, file));
            }
        }
    }
    found
}

/// The id of the file behind a mapping of a process that shows no name any more.
pub(crate) fn mapped_id(pid: i32, start: u64, end: u64) -> io::Result<u64> {
    let path = crate::procfs::path(pid, &format!("map_files/{start:x}-{end:x}"));
    let metadata = fs::metadata(path)?;
    Ok(file_id(metadata.dev(), metadata.ino()))
}

/// The id of the program of a process, where its name has gone or it is a memfd, by what its link
/// of `/proc` shows.
pub(crate) fn program_id(pid: i32, link: &[u8]) -> io::Result<u64> {
    let metadata = fs::metadata(crate::procfs::path(pid, "exe"))?;
    Ok(match memfd_name(link) {
        Some(_) => metadata.ino(),
        None => file_id(metadata.dev(), metadata.ino()),
    })
}

/// Another description of a file of our own, for reading only.
pub(crate) fn reopen_to_read(file: &impl std::os::fd::AsRawFd) -> io::Result<File> {
    File::open(format!("/proc/self/fd/{}", file.as_raw_fd()))
}

/// A descriptor for a process, by its number on the host.
pub(crate) fn process(host: i32) -> io::Result<OwnedFd> {
    task::pidfd_open(host)
}

#[cfg(test)]
mod tests {
    use std::{os::fd::AsRawFd, path::PathBuf};

    use super::*;

    fn link(fd: &OwnedFd) -> PathBuf {
        fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd())).unwrap()
    }

    fn blank(path: &Path) -> Blank<'_> {
        let path = path.as_os_str().as_bytes();
        Blank { path, mode: 0o640, uid: 0, gid: 0, linkable: false }
    }

    #[test]
    fn a_file_shows_its_old_name_also_when_another_one_has_it() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("program");
        let lost = format!("{} (deleted)", path.display());
        assert_eq!(link(&blank(&path).open().unwrap()).to_str().unwrap(), lost);
        fs::write(&path, "new version").unwrap();
        let before = fs::metadata(directory.path()).unwrap();
        assert_eq!(link(&blank(&path).open().unwrap()).to_str().unwrap(), lost);
        let after = fs::metadata(directory.path()).unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "new version");
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 1);
        assert_eq!(before.modified().unwrap(), after.modified().unwrap());
    }

    #[test]
    fn a_file_whose_directory_has_gone_shows_it_all_the_same() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("gone/deeper/file");
        let lost = format!("{} (deleted)", path.display());
        assert_eq!(link(&blank(&path).open().unwrap()).to_str().unwrap(), lost);
        fs::write(directory.path().join("gone"), "a file by now").unwrap();
        assert!(link(&blank(&path).open().unwrap()).starts_with(directory.path()));
    }
}
