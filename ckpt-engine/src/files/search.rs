//! Which path of the VE leads to an inode.
//!
//! Where a file handle can be opened it tells at once. Files of an overlay have none that could
//! be: those are searched for, level by level.

use std::{
    collections::{BTreeMap, HashMap, VecDeque},
    ffi::OsStr,
    fs, io,
    os::{
        fd::{AsFd, OwnedFd},
        unix::{
            ffi::{OsStrExt, OsStringExt},
            fs::{DirEntryExt, MetadataExt},
        },
    },
    path::{Path, PathBuf},
    sync::{Mutex, PoisonError},
};

use nix::{
    fcntl::{OFlag, OpenHow, ResolveFlag, openat2},
    sys::stat::Mode,
};

use super::find::own_link;
use crate::sys::{
    descriptor,
    handle::{self, Handle},
};

/// How many directory entries are looked at in one search.
const ENTRIES: usize = 400_000;

/// Device and inode.
pub(super) type Inode = (u64, u64);

/// Paths inside the VE by inode, as far as they were found.
pub(super) type Paths = HashMap<Inode, Option<Vec<u8>>>;

/// The mounts of the VE by device: where they are.
#[derive(Debug)]
pub(super) struct Mounts {
    root: OwnedFd,
    points: Vec<Point>,
}

/// One of them.
#[derive(Debug, PartialEq, Eq)]
struct Point {
    /// Its number in mountinfo.
    number: u64,
    device: u64,
    path: PathBuf,
    is_overlay: bool,
}

impl Mounts {
    /// Those that a process sees, as the host numbers it.
    pub(super) fn of(host: i32) -> io::Result<Self> {
        let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        let root = nix::fcntl::open(format!("/proc/{host}/root").as_str(), flags, Mode::empty())?;
        let table = fs::read_to_string(format!("/proc/{host}/mountinfo"))?;
        let points = table.lines().filter_map(read_line).collect();
        Ok(Self { root, points })
    }

    /// The path of the inode that a handle of a file system names.
    pub(super) fn path_of(&self, inode: Inode, handle: &Handle) -> Option<Vec<u8>> {
        let points = self.points.iter().filter(|point| point.device == inode.0);
        points.filter_map(|point| self.path_through(&point.path, inode, handle)).next()
    }

    /// Whether this is the device number of an overlay other than the VE's own files.
    pub(super) fn is_of_overlay(&self, device: u64) -> bool {
        let own = descriptor::status(self.root.as_fd()).map_or(device, |status| status.device);
        device != own && self.points.iter().any(|it| it.is_overlay && it.device == device)
    }

    /// The path of an inode of an overlay of a program, which `root` shows. stat(2) shows its files
    /// as those of the layers, so each is asked for its handle.
    pub(super) fn path_in_overlay(
        &self,
        root: &Path,
        inode: Inode,
        handle: Option<&Handle>,
    ) -> Option<Vec<u8>> {
        let points = self.points.iter().filter(|it| it.is_overlay && it.device == inode.0);
        let mut directories: VecDeque<PathBuf> = points
            .filter(|point| self.in_sight(point).is_some())
            .map(|it| it.path.clone())
            .collect();
        let mut looked_at = 0;
        let is_it = |path: &Path, number: u64| {
            let opened = (number == inode.1).then(|| self.open(path, OFlag::O_PATH).ok()).flatten();
            opened.is_some_and(|opened| match handle {
                Some(handle) => handle::to_tell_apart(opened.as_fd())
                    .is_ok_and(|it| it.as_ref() == Some(handle)),
                None => true,
            })
        };
        while let Some(directory) = directories.pop_front() {
            let inside = root.join(directory.strip_prefix("/").unwrap_or(&directory));
            let Ok(metadata) = fs::symlink_metadata(&inside) else { continue };
            if is_it(&directory, metadata.ino()) {
                return Some(directory.into_os_string().into_vec());
            }
            // What is mounted in it shows itself as another file system.
            if metadata.dev() != inode.0 {
                continue;
            }
            for entry in fs::read_dir(&inside).into_iter().flatten().flatten() {
                looked_at += 1;
                let path = directory.join(entry.file_name());
                match entry.file_type() {
                    Ok(kind) if kind.is_dir() => directories.push_back(path),
                    Ok(_) if entry.metadata().is_ok_and(|it| is_it(&path, it.ino())) => {
                        return Some(path.into_os_string().into_vec());
                    }
                    _ => {}
                }
            }
            if looked_at > ENTRIES {
                break;
            }
        }
        None
    }

    /// Where a mount is, by its number in mountinfo.
    pub(super) fn point_of(&self, number: u64) -> Option<Vec<u8>> {
        let point = self.points.iter().find(|point| point.number == number)?;
        self.in_sight(point)
    }

    /// A place where a file system is mounted.
    pub(super) fn point_on(&self, device: u64) -> Option<Vec<u8>> {
        let points = self.points.iter().filter(|point| point.device == device);
        points.filter_map(|point| self.in_sight(point)).next()
    }

    /// The path of a mount, unless another one is over it.
    fn in_sight(&self, point: &Point) -> Option<Vec<u8>> {
        let opened = self.open(&point.path, OFlag::O_PATH).ok()?;
        let found = descriptor::status(opened.as_fd()).ok()?.mount;
        (found == point.number).then(|| point.path.as_os_str().as_bytes().to_vec())
    }

    fn path_through(&self, point: &Path, inode: Inode, handle: &Handle) -> Option<Vec<u8>> {
        let directory = self.open(point, OFlag::O_RDONLY | OFlag::O_DIRECTORY).ok()?;
        // Another mount may be over it.
        if descriptor::status(directory.as_fd()).ok()?.device != inode.0 {
            return None;
        }
        let found = handle::open(directory.as_fd(), handle).ok()?;
        let path = own_link(found.as_fd()).ok()?;
        // The link of a file that is not in sight leads nowhere, or elsewhere.
        let again = self.open(Path::new(OsStr::from_bytes(&path)), OFlag::O_PATH).ok()?;
        let status = descriptor::status(again.as_fd()).ok()?;
        ((status.device, status.inode) == inode).then_some(path)
    }

    /// Opens something of the VE; no link in it leads out.
    fn open(&self, path: &Path, flags: OFlag) -> nix::Result<OwnedFd> {
        let flags = flags | OFlag::O_CLOEXEC | OFlag::O_NOFOLLOW;
        let resolve = ResolveFlag::RESOLVE_IN_ROOT | ResolveFlag::RESOLVE_NO_MAGICLINKS;
        openat2(&self.root, path, OpenHow::new().flags(flags).resolve(resolve))
    }
}

/// "36 35 98:0 /mnt1 /mnt2 rw,noatime master:1 - ext3 /dev/root rw".
fn read_line(line: &str) -> Option<Point> {
    let mut words = line.split(' ');
    let number = words.next()?.parse().ok()?;
    let (major, minor) = words.nth(1)?.split_once(':')?;
    let device = libc::makedev(major.parse().ok()?, minor.parse().ok()?);
    let point = words.nth(1)?;
    // Spaces and the like are written as three octal digits.
    let mut parts = point.split('\\');
    let mut bytes = parts.next()?.as_bytes().to_vec();
    for part in parts {
        let (digits, rest) = part.split_at_checked(3)?;
        bytes.push(u8::from_str_radix(digits, 8).ok()?);
        bytes.extend(rest.as_bytes());
    }
    let path = PathBuf::from(std::ffi::OsString::from_vec(bytes));
    let is_overlay = line.contains(" - overlay ");
    Some(Point { number, device, path, is_overlay })
}

/// Finds one inode below a directory of the VE.
pub(super) fn by_inode(root: &Path, start: &Path, inode: Inode) -> Option<Vec<u8>> {
    let wanted = Paths::from([(inode, None)]);
    below(root, start, wanted).remove(&inode).flatten()
}

/// Finds paths below `start` in the tree at `root` by device and inode, level by level.
pub(super) fn below(root: &Path, start: &Path, mut wanted: Paths) -> Paths {
    for (inode, place) in &mut wanted {
        *place = remembered(root, *inode);
    }
    if wanted.values().all(Option::is_some) {
        return wanted;
    }
    let mut looked_at = 0;
    let found = |path: &Path, wanted: &mut Paths| {
        let metadata = fs::symlink_metadata(path).ok()?;
        let place = wanted.get_mut(&(metadata.dev(), metadata.ino()));
        if let Some(place @ None) = place {
            let inside = path.strip_prefix(root).unwrap_or(path);
            *place = Some(Path::new("/").join(inside).into_os_string().into_vec());
        }
        Some(metadata.dev())
    };
    let start = root.join(start.strip_prefix("/").unwrap_or(start));
    // Whatever happens to be a link on the way: only the path itself is looked at.
    found(&start.join(""), &mut wanted);
    let mut directories = VecDeque::from([start]);
    while let Some(directory) = directories.pop_front() {
        let inside = directory.strip_prefix(root).unwrap_or(Path::new(""));
        // Nothing there is found by its number, and there is no end to it.
        if inside == Path::new("proc") || inside == Path::new("sys") {
            continue;
        }
        let Ok(entries) = fs::read_dir(&directory) else { continue };
        for entry in entries.flatten() {
            looked_at += 1;
            let is_directory = entry.file_type().is_ok_and(|kind| kind.is_dir());
            // A mount has another inode than the directory under it.
            if is_directory || wanted.keys().any(|&(_, inode)| inode == entry.ino()) {
                found(&entry.path(), &mut wanted);
            }
            if is_directory {
                directories.push_back(entry.path());
            }
        }
        let complete = wanted.values().all(Option::is_some);
        if complete || looked_at > ENTRIES {
            break;
        }
    }
    remember(&wanted);
    wanted
}

/// What was found before, for instance when the VE was looked at before its move: a search while
/// it stands still costs its users time.
static FOUND: Mutex<BTreeMap<Inode, Vec<u8>>> = Mutex::new(BTreeMap::new());
/// The most that is remembered.
const FOUND_MAX: usize = 10_000;

fn remembered(root: &Path, inode: Inode) -> Option<Vec<u8>> {
    let found = FOUND.lock().unwrap_or_else(PoisonError::into_inner).get(&inode).cloned()?;
    let inside = found.strip_prefix(b"/").unwrap_or(&found);
    let metadata = fs::symlink_metadata(root.join(OsStr::from_bytes(inside))).ok()?;
    ((metadata.dev(), metadata.ino()) == inode).then_some(found)
}

fn remember(paths: &Paths) {
    let mut found = FOUND.lock().unwrap_or_else(PoisonError::into_inner);
    if found.len() > FOUND_MAX {
        found.clear();
    }
    let known = paths.iter().filter_map(|(inode, path)| Some((*inode, path.clone()?)));
    found.extend(known);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mount_point_with_a_space_is_read() {
        let line = "36 35 98:2 / /a\\040b\\134 rw,noatime master:1 - ext3 /dev/root rw";
        let (device, path) = (libc::makedev(98, 2), PathBuf::from("/a b\\"));
        assert_eq!(read_line(line).unwrap(), Point { number: 36, device, path, is_overlay: false });
    }

    #[test]
    fn a_handle_leads_to_the_path() {
        let directory = tempfile::tempdir_in("/run").unwrap();
        let path = directory.path().join("watched");
        fs::create_dir(&path).unwrap();
        let opened = fs::File::open(&path).unwrap();
        let metadata = opened.metadata().unwrap();
        let handle = handle::handle(opened.as_fd(), c"").unwrap().unwrap();
        let mounts = Mounts::of(std::process::id().cast_signed()).unwrap();
        let found = mounts.path_of((metadata.dev(), metadata.ino()), &handle);
        assert_eq!(found.unwrap(), path.as_os_str().as_bytes());
    }
}
