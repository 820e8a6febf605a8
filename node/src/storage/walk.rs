//! Reads the names in a tree: what is where, without contents.
//!
//! A tree that is in use may change during the walk. What cannot be found again where it was seen
//! is left out, and a directory is visited once, where it was seen first; so the result is
//! always a tree. What was left out or seen in the wrong place is put right by the next round.

use std::{
    collections::{BTreeMap, HashMap},
    ffi::CStr,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

use ckpt_engine::sys::xattr;
use ckpt_format::tree::PATH_LENGTH_MAX;
use nix::{
    dir::Dir,
    errno::Errno,
    fcntl::{OFlag, readlinkat},
};

use super::{
    error::{TreeError, at, has_gone, show},
    path,
    status::{self, Identity, Recall, Status},
};

/// A name in a directory.
pub(super) type Name = Vec<u8>;

/// What a name stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Entry {
    /// A file of the VE.
    Node(Identity),
    /// The overlay's note that a file of the template is gone.
    Whiteout,
}

/// What was found.
#[derive(Debug)]
pub(super) struct Found {
    pub(super) status: Status,
    pub(super) detail: Detail,
    /// The entries of a directory.
    pub(super) children: BTreeMap<Name, Entry>,
}

/// What only some files have, read for those that were not known.
#[derive(Debug)]
pub(super) enum Detail {
    Plain,
    Directory { opaque: bool },
    Symlink { target: Vec<u8> },
}

/// A tree as it was.
#[derive(Debug)]
pub(super) struct Scan {
    pub(super) top: Identity,
    pub(super) nodes: HashMap<Identity, Found>,
}

/// How to walk.
pub(super) struct Walk<'a> {
    /// The top of the tree.
    pub(super) top: BorrowedFd<'a>,
    /// It is the upper directory of an overlay, with the overlay's notes in it.
    pub(super) overlay: bool,
    /// Nobody changes anything: what cannot be found is an error.
    pub(super) steady: bool,
    /// Whether the details of a file are known already.
    pub(super) known: &'a dyn Fn(&Identity) -> bool,
    /// In a steady tree: files that need not be identified once more.
    pub(super) recall: Recall,
}

/// A directory yet to be read.
struct Pending {
    identity: Identity,
    path: Vec<u8>,
    parent: Option<(Identity, Name)>,
}

impl Walk<'_> {
    /// Walks the whole tree.
    pub(super) fn run(&self) -> Result<Scan, TreeError> {
        let opened = path::open_directory(self.top, b"").map_err(at("open", b""))?;
        let (top, status) = status::of_open(opened.as_fd()).map_err(at("look at", b""))?;
        let mut scan = Scan { top, nodes: HashMap::new() };
        scan.nodes.insert(top, found(status, Detail::Directory { opaque: false }));
        let mut pending = vec![Pending { identity: top, path: Vec::new(), parent: None }];
        while let Some(directory) = pending.pop() {
            match self.directory(&directory, &mut scan, &mut pending) {
                Ok(()) => (),
                Err(Stop::Fatal(error)) => return Err(error),
                Err(Stop::Gone(errno)) => {
                    let Some((parent, name)) = directory.parent.filter(|_| !self.steady) else {
                        return Err(at("read", &directory.path)(errno));
                    };
                    if let Some(parent) = scan.nodes.get_mut(&parent) {
                        parent.children.remove(&name);
                    }
                    scan.nodes.remove(&directory.identity);
                }
            }
        }
        Ok(scan)
    }

    fn directory(
        &self,
        directory: &Pending,
        scan: &mut Scan,
        pending: &mut Vec<Pending>,
    ) -> Result<(), Stop> {
        let here = &directory.path;
        let opened = self.open(directory).map_err(stop("open", here))?;
        if self.overlay && !(self.known)(&directory.identity) {
            let opaque = overlay_notes(opened.as_fd(), here)?;
            let detail = Detail::Directory { opaque };
            if let Some(found) = scan.nodes.get_mut(&directory.identity) {
                found.detail = detail;
            }
        }
        let copy = opened.try_clone().map_err(|source| Stop::Fatal(at("open", here)(source)))?;
        let mut names = Dir::from_fd(copy).map_err(stop("read", here))?;
        let names_of = opened.as_fd();
        let mut children = BTreeMap::new();
        for item in names.iter() {
            let item = item.map_err(stop("read", here))?;
            let name = item.file_name();
            if matches!(name.to_bytes(), b"." | b"..") {
                continue;
            }
            let looked = match self.steady {
                true => status::of_steady_name(names_of, name, &self.recall),
                false => status::of_name(names_of, name),
            };
            let (identity, status) = match looked {
                Err(errno) if has_gone(errno) && !self.steady => continue,
                other => other.map_err(fatal("look at", here, name))?,
            };
            if self.overlay && identity.kind == libc::S_IFCHR && status.rdev == 0 {
                children.insert(name.to_bytes().to_vec(), Entry::Whiteout);
                continue;
            }
            let seen = scan.nodes.contains_key(&identity);
            if seen && identity.kind == libc::S_IFDIR {
                // It has been moved here since it was seen elsewhere.
                continue;
            }
            if !seen {
                let Some(detail) = self.detail(opened.as_fd(), here, name, &identity)? else {
                    continue;
                };
                scan.nodes.insert(identity, found(status, detail));
            }
            if identity.kind == libc::S_IFDIR {
                let name = name.to_bytes();
                let path = path::join(here, name);
                if path.len() > PATH_LENGTH_MAX {
                    let what = "too deep in directories to be named";
                    return Err(Stop::Fatal(TreeError::Unsupported { path: show(&path), what }));
                }
                let parent = Some((directory.identity, name.to_vec()));
                pending.push(Pending { identity, path, parent });
            }
            children.insert(name.to_bytes().to_vec(), Entry::Node(identity));
        }
        if let Some(found) = scan.nodes.get_mut(&directory.identity) {
            found.children = children;
        }
        Ok(())
    }

    /// Opens a directory for reading, if it still is the one that was seen.
    fn open(&self, directory: &Pending) -> Result<OwnedFd, Errno> {
        let access = OFlag::O_RDONLY | OFlag::O_NOATIME;
        let opened = path::open_directory_for(self.top, &directory.path, access)?;
        match status::of_open_known(opened.as_fd(), &self.recall)? {
            (identity, _) if identity == directory.identity => Ok(opened),
            _ => Err(Errno::ESTALE),
        }
    }

    /// The details of a file; `None` when it has gone.
    fn detail(
        &self,
        directory: BorrowedFd<'_>,
        here: &[u8],
        name: &CStr,
        identity: &Identity,
    ) -> Result<Option<Detail>, Stop> {
        match identity.kind {
            libc::S_IFDIR => Ok(Some(Detail::Directory { opaque: false })),
            libc::S_IFLNK if !(self.known)(identity) => {
                let read = path::open_name(directory, name.to_bytes()).and_then(|place| {
                    match status::of_open(place.as_fd())?.0 == *identity {
                        true => readlinkat(&place, ""),
                        false => Err(Errno::ESTALE),
                    }
                });
                match read {
                    Err(errno) if has_gone(errno) && !self.steady => Ok(None),
                    read => {
                        use std::os::unix::ffi::OsStringExt;
                        let target = read.map_err(fatal("read", here, name))?.into_vec();
                        Ok(Some(Detail::Symlink { target }))
                    }
                }
            }
            _ => Ok(Some(Detail::Plain)),
        }
    }
}

/// Why a directory was not read.
enum Stop {
    /// It has gone.
    Gone(Errno),
    /// Something is wrong.
    Fatal(TreeError),
}

fn stop<'a>(action: &'static str, path: &'a [u8]) -> impl FnOnce(Errno) -> Stop + 'a {
    move |errno| match has_gone(errno) {
        true => Stop::Gone(errno),
        false => Stop::Fatal(at(action, path)(errno)),
    }
}

fn fatal<'a>(
    action: &'static str,
    here: &'a [u8],
    name: &'a CStr,
) -> impl FnOnce(Errno) -> Stop + 'a {
    move |errno| Stop::Fatal(at(action, &path::join(here, name.to_bytes()))(errno))
}

pub(super) fn found(status: Status, detail: Detail) -> Found {
    Found { status, detail, children: BTreeMap::new() }
}

/// Whether the overlay's notes say that nothing of the template shows through a directory.
fn overlay_notes(directory: BorrowedFd<'_>, path: &[u8]) -> Result<bool, Stop> {
    let get = |name| {
        xattr::get(directory, name)
            .map_err(|source| Stop::Fatal(at("read the attributes of", path)(source)))
    };
    if get(c"trusted.overlay.redirect")?.is_some() {
        let what = "a renamed directory of the template, kept as a redirect";
        return Err(Stop::Fatal(TreeError::Unsupported { path: show(path), what }));
    }
    Ok(get(c"trusted.overlay.opaque")?.is_some_and(|value| value == b"y"))
}
