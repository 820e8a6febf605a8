//! Carries out steps in one tree.

use std::{
    collections::HashSet,
    fs::File,
    io,
    os::{
        fd::{AsFd, OwnedFd},
        unix::fs::FileExt,
    },
};

use ckpt_format::tree::{Node, Step};
use nix::{
    errno::Errno,
    fcntl::{AT_FDCWD, AtFlags, FallocateFlags, OFlag, fallocate, openat, renameat},
    sys::stat::{Mode, SFlag, fstat, makedev, mkdirat, mknodat},
    unistd::{UnlinkatFlags, ftruncate, linkat, symlinkat, unlinkat},
};

use super::{
    apply::TargetTree,
    attributes::{self, Ids},
    error::{TreeError, at, show},
    limits::{self, Raised},
    path,
    remove::{self, MountPoints},
};

/// One tree and what is known about it.
pub(super) struct Maker {
    top: OwnedFd,
    mount_points: MountPoints,
    ids: Ids,
    /// Nothing can be changed at the end.
    read_only: bool,
    /// Where parked files are, while there are any.
    parking: Option<Parking>,
    /// The directory that was used last, with its path.
    recent_directory: Option<(Vec<u8>, OwnedFd)>,
    /// The file that was written last, with its path.
    recent_file: Option<(Vec<u8>, File)>,
}

struct Parking {
    name: String,
    place: OwnedFd,
    numbers: HashSet<u64>,
}

impl Maker {
    pub(super) fn new(tree: TargetTree, ids: Ids) -> Self {
        Self {
            top: tree.top,
            read_only: tree.read_only,
            mount_points: MountPoints::new(tree.mount_points),
            ids,
            parking: None,
            recent_directory: None,
            recent_file: None,
        }
    }

    /// Gives the file system its own limits back.
    pub(super) fn finish(&mut self, raised: &mut Raised) -> Result<(), TreeError> {
        self.forget();
        raised.give_back(&self.top).map_err(at("limit the space in", b""))?;
        match self.read_only {
            true => limits::set_read_only(&self.top).map_err(at("protect what is in", b"")),
            false => Ok(()),
        }
    }

    /// Carries out a step that has been checked.
    pub(super) fn step(&mut self, step: Step) -> Result<(), TreeError> {
        match step {
            Step::Remove { path } => self.clear(&path),
            Step::Park { path, number } => self.park(&path, number),
            Step::Place { number, path } => self.place(number, &path),
            Step::Discard { number } => self.discard(number),
            Step::Make { path, node } => self.make(&path, &node),
            Step::Link { existing, path } => self.link(&existing, &path),
            Step::Resize { path, size } => {
                let size = i64::try_from(size).map_err(io::Error::other);
                let size = size.map_err(at("resize", &path))?;
                let file = self.file(&path)?;
                ftruncate(file, size).map_err(at("resize", &path))
            }
            Step::Data { path, offset, data } => {
                let file = self.file(&path)?;
                file.write_all_at(&data, offset).map_err(at("write", &path))
            }
            Step::Hole { path, offset, length } => self.hole(&path, offset, length),
            Step::Describe { path, attributes } => {
                // The last word about a file; a new one is opened for what may follow.
                self.recent_file = None;
                let place = self.existing(&path)?;
                attributes::is_symlink(place.as_fd())
                    .and_then(|symlink| {
                        attributes::write(place.as_fd(), symlink, &attributes, self.ids)
                    })
                    .map_err(at("describe", &path))
            }
        }
    }

    /// The directory with this path.
    fn directory(&mut self, path: &[u8]) -> Result<OwnedFd, TreeError> {
        let known = self.recent_directory.take().filter(|(known, _)| known == path);
        let place = match known {
            Some((_, place)) => place,
            None => path::open_directory(self.top.as_fd(), path).map_err(at("open", path))?,
        };
        let copy = place.try_clone().map_err(at("open", path))?;
        self.recent_directory = Some((path.to_vec(), place));
        Ok(copy)
    }

    /// Whatever has this path, as a place.
    fn existing(&mut self, path: &[u8]) -> Result<OwnedFd, TreeError> {
        let (parent, name) = path::split(path);
        let parent = self.directory(parent)?;
        path::open_name(parent.as_fd(), name).map_err(at("open", path))
    }

    /// The regular file with this path, for writing.
    fn file(&mut self, path: &[u8]) -> Result<&File, TreeError> {
        let known = self.recent_file.take().filter(|(known, _)| known == path);
        let file = match known {
            Some((_, file)) => file,
            None => self.open_file(path, OFlag::empty())?,
        };
        Ok(&self.recent_file.insert((path.to_vec(), file)).1)
    }

    fn open_file(&mut self, path: &[u8], flags: OFlag) -> Result<File, TreeError> {
        let place = self.existing(path)?;
        let kind = fstat(&place).map_err(at("look at", path))?.st_mode & libc::S_IFMT;
        if kind != libc::S_IFREG {
            return Err(TreeError::Refused { path: show(path), reason: "contents of no file" });
        }
        let file = path::reopen(place.as_fd(), OFlag::O_WRONLY | flags);
        Ok(File::from(file.map_err(at("open", path))?))
    }

    /// Names change: what was open under a path may have another one now.
    fn forget(&mut self) {
        self.recent_directory = None;
        self.recent_file = None;
    }

    /// Removes whatever has this path, except places that something is mounted on.
    fn clear(&mut self, path: &[u8]) -> Result<(), TreeError> {
        let (parent, name) = path::split(path);
        let parent = match self.directory(parent) {
            // The template has not even the directory.
            Err(TreeError::File { source, .. })
                if matches!(source.raw_os_error(), Some(libc::ENOENT | libc::ENOTDIR)) =>
            {
                return Ok(());
            }
            parent => parent?,
        };
        if remove::remove(parent.as_fd(), name, path, &self.mount_points)? {
            self.forget();
        }
        Ok(())
    }

    fn hole(&mut self, path: &[u8], offset: u64, length: u64) -> Result<(), TreeError> {
        let number = |value: u64| i64::try_from(value).map_err(io::Error::other);
        let start = number(offset).map_err(at("write", path))?;
        let count = number(length).map_err(at("write", path))?;
        let file = self.file(path)?;
        let mode = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        match fallocate(file, mode, start, count) {
            Err(Errno::EOPNOTSUPP) => zeros(file, offset, length).map_err(at("write", path)),
            done => done.map_err(at("write", path)),
        }
    }

    fn park(&mut self, path: &[u8], number: u64) -> Result<(), TreeError> {
        self.forget();
        let (parent, name) = path::split(path);
        let parent = self.directory(parent)?;
        let parking = match &mut self.parking {
            Some(parking) => parking,
            none => none.insert(Parking::open(&self.top).map_err(at("park", path))?),
        };
        if !parking.numbers.insert(number) {
            return Err(TreeError::Refused { path: show(path), reason: "parked twice" });
        }
        renameat(&parent, name, &parking.place, number.to_string().as_str())
            .map_err(at("park", path))?;
        self.forget();
        Ok(())
    }

    fn place(&mut self, number: u64, path: &[u8]) -> Result<(), TreeError> {
        self.clear(path)?;
        let (parent, name) = path::split(path);
        let parent = self.directory(parent)?;
        let from = self.parked(number, path)?;
        // Only a place that must stay can still be there, and a rename would replace it.
        if path::open_name(parent.as_fd(), name).is_ok() {
            return Err(TreeError::Refused { path: show(path), reason: "a mount is in the way" });
        }
        renameat(&from.place, number.to_string().as_str(), &parent, name)
            .map_err(at("rename", path))?;
        self.forget();
        self.close_parking(path)
    }

    fn discard(&mut self, number: u64) -> Result<(), TreeError> {
        let name = number.to_string();
        let from = self.parked(number, name.as_bytes())?;
        unlinkat(&from.place, name.as_str(), UnlinkatFlags::NoRemoveDir)
            .map_err(at("discard", name.as_bytes()))?;
        self.close_parking(name.as_bytes())
    }

    /// The parking, where the number is no longer taken.
    fn parked(&mut self, number: u64, path: &[u8]) -> Result<&Parking, TreeError> {
        let parking = self.parking.as_mut();
        parking
            .and_then(|parking| parking.numbers.remove(&number).then_some(&*parking))
            .ok_or_else(|| TreeError::Refused { path: show(path), reason: "nothing is parked so" })
    }

    /// Removes the parking once it is empty.
    fn close_parking(&mut self, path: &[u8]) -> Result<(), TreeError> {
        let Some(parking) = self.parking.take_if(|parking| parking.numbers.is_empty()) else {
            return Ok(());
        };
        unlinkat(&self.top, parking.name.as_str(), UnlinkatFlags::RemoveDir)
            .map_err(at("tidy up after", path))
    }

    fn make(&mut self, path: &[u8], node: &Node) -> Result<(), TreeError> {
        let (parent, name) = path::split(path);
        let directory = self.directory(parent)?;
        let is_directory = |found: &OwnedFd| {
            fstat(found).is_ok_and(|status| status.st_mode & libc::S_IFMT == libc::S_IFDIR)
        };
        if *node == (Node::Directory { opaque: false })
            && path::open_name(directory.as_fd(), name).is_ok_and(|found| is_directory(&found))
        {
            return Ok(());
        }
        self.clear(path)?;
        let made = match node {
            Node::File => {
                let flags = OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_WRONLY | OFlag::O_CLOEXEC;
                openat(&directory, name, flags, private()).map(|file| {
                    self.recent_file = Some((path.to_vec(), File::from(file)));
                })
            }
            Node::Directory { .. } => mkdirat(&directory, name, private() | Mode::S_IXUSR),
            Node::Symlink { target } => symlinkat(target.as_slice(), &directory, name),
            Node::Fifo => mknodat(&directory, name, SFlag::S_IFIFO, private(), 0),
            Node::Socket => mknodat(&directory, name, SFlag::S_IFSOCK, private(), 0),
            Node::Device { block, major, minor } => {
                let kind = if *block { SFlag::S_IFBLK } else { SFlag::S_IFCHR };
                let number = makedev(u64::from(*major), u64::from(*minor));
                mknodat(&directory, name, kind, private(), number)
            }
        };
        match made {
            // Something of the VE is mounted on it, so it stays. A file can be emptied; of what
            // else it may be nothing is seen below the mount.
            Err(Errno::EEXIST) if self.mount_points.at_or_above(path) => {
                if *node == Node::File {
                    self.open_file(path, OFlag::O_TRUNC)?;
                }
                Ok(())
            }
            made => made.map_err(at("make", path)),
        }
    }

    fn link(&mut self, existing: &[u8], path: &[u8]) -> Result<(), TreeError> {
        let place = self.existing(existing)?;
        self.clear(path)?;
        let (parent, name) = path::split(path);
        let parent = self.directory(parent)?;
        let from = path::proc_name(place.as_fd());
        linkat(AT_FDCWD, from.as_str(), &parent, name, AtFlags::AT_SYMLINK_FOLLOW)
            .map_err(at("link", path))
    }
}

impl Parking {
    fn open(top: &OwnedFd) -> Result<Self, Errno> {
        // Nobody else can know the name, so nobody can have taken it.
        let name = format!(".parked-{:032x}", rand::random::<u128>());
        mkdirat(top, name.as_str(), private() | Mode::S_IXUSR)?;
        let place = path::open_directory(top.as_fd(), name.as_bytes())?;
        Ok(Self { name, place, numbers: HashSet::new() })
    }
}

fn private() -> Mode {
    Mode::S_IRUSR | Mode::S_IWUSR
}

/// Writes zeros where the file system cannot make holes.
fn zeros(file: &File, offset: u64, length: u64) -> io::Result<()> {
    const PIECE: [u8; 4096] = [0; 4096];
    // A hole ends with the file.
    let end = file.metadata()?.len().min(offset.saturating_add(length));
    let mut at = offset;
    while at < end {
        let count = usize::try_from(end - at).map_or(PIECE.len(), |rest| rest.min(PIECE.len()));
        file.write_all_at(&PIECE[..count], at)?;
        at += count as u64;
    }
    Ok(())
}
