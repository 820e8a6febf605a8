//! Finds out how the paths in the options of an overlay lead to its layers.
//!
//! The kernel tells the paths as they were given, and nothing about what they led to. Since then
//! other mounts may hide it, most often the overlay itself, and directories may have been renamed.
//! So the paths are followed in a copy of a mount namespace from which overlays, and then
//! whatever else is in the way, are taken away; what they lead to is believed only if it holds
//! what the overlay shows.

use std::{
    collections::{BTreeMap, HashMap},
    ffi::{CStr, CString},
    fs::File,
    io::{self, Read},
    os::fd::{AsFd, OwnedFd},
    path::Path,
};

use ckpt_format::container::{Filesystem, FilesystemKind, Mount, MountOption, Overlay};
use nix::{
    dir::Dir,
    fcntl::{AT_FDCWD, AtFlags, OFlag, OpenHow, ResolveFlag, openat, openat2},
    mount::{MntFlags, umount2},
    sys::stat::{FileStat, Mode, fstat, fstatat},
};

use super::{
    mountinfo::{Line, unescape},
    mounts::relative,
};
use crate::sys::{descriptor, handle, namespace::in_copy_of, xattr};

/// How many mounts may be in the way of the layers of one overlay.
const COVERS_MAX: usize = 16;
/// How often an overlay that changes meanwhile is compared with its layers.
const TRIES: usize = 5;

/// The options of an overlay as fsconfig(2) takes them. An error is what cannot be made again.
pub(super) fn options(shown: &str) -> Result<Vec<MountOption>, &'static str> {
    let mut found = Vec::new();
    for option in shown.split(',') {
        let (name, value) = match option.split_once('=') {
            Some((name, value)) => (name, Some(unescape(value))),
            None => (option, None),
        };
        let kept = match (name, value.as_deref()) {
            ("rw", _) => false,
            // A program in a VE cannot have asked for these: they are the host's defaults.
            ("redirect_dir", Some("on" | "follow")) | ("metacopy", Some("on")) => false,
            ("datadir+", _) => return Err("an overlay with layers of data alone"),
            ("lowerdir", Some(value)) if value.contains("::") => {
                return Err("an overlay with layers of data alone");
            }
            ("lowerdir" | "lowerdir+" | "upperdir" | "workdir", Some(value)) => {
                if value.contains('\\') {
                    return Err("an overlay whose layers have backslashes in their paths");
                }
                true
            }
            _ => true,
        };
        if kept {
            found.push(MountOption { name: name.to_owned(), value });
        }
    }
    let has = |name: &str| found.iter().any(|option: &MountOption| option.name == name);
    let is_on = |name: &str| {
        let on = |option: &&MountOption| option.name == name;
        found.iter().find(on).is_some_and(|it| it.value.as_deref() == Some("on"))
    };
    if has("upperdir") && (is_on("index") || is_on("nfs_export")) {
        return Err("an overlay that notes file handles (index=on, nfs_export=on)");
    }
    Ok(found)
}

/// The paths of the layers.
#[derive(Debug)]
struct Paths<'a> {
    /// The highest first; with an upper one that is it.
    layers: Vec<&'a str>,
    work: Option<&'a str>,
    has_upper: bool,
}

impl<'a> Paths<'a> {
    fn of(options: &'a [MountOption]) -> Self {
        let named = move |name: &'static str| {
            let its = move |option: &&MountOption| option.name == name;
            options.iter().filter(its).filter_map(|option| option.value.as_deref())
        };
        let upper = named("upperdir").next();
        let lower = named("lowerdir").flat_map(|all| all.split(':')).chain(named("lowerdir+"));
        let layers = upper.into_iter().chain(lower).collect();
        Self { layers, work: named("workdir").next(), has_upper: upper.is_some() }
    }
}

/// The mount namespaces of a container, as they were read.
#[derive(Debug)]
pub(super) struct Site<'a> {
    pub(super) namespaces: &'a [OwnedFd],
    pub(super) tables: Vec<&'a [Mount]>,
    /// The user namespaces that those of programs belong to.
    pub(super) owners: &'a [u32],
    /// Places in the list of file systems by device number.
    pub(super) known: &'a HashMap<String, u32>,
}

/// What stands in the way: what it is, and where.
pub(super) type Unfound = (String, String);

impl Site<'_> {
    /// Finds the layers of all overlays in a list of file systems.
    pub(super) fn find(&self, filesystems: &mut [Filesystem]) -> Vec<Unfound> {
        let kinds: Vec<FilesystemKind> = filesystems.iter().map(|it| it.kind.clone()).collect();
        let mut unfound = Vec::new();
        for (number, filesystem) in (0..).zip(filesystems) {
            let FilesystemKind::Overlay(overlay) = &mut filesystem.kind else { continue };
            let looked = Look { site: self, kinds: &kinds, number };
            match looked.everywhere(&Paths::of(&filesystem.options)) {
                Ok(found) => *overlay = found,
                Err(object) => {
                    let mounts = self.tables.iter().copied().flatten();
                    let mut own = mounts.filter(|mount| mount.filesystem == number);
                    let point = own.next().map(|mount| mount.point.clone()).unwrap_or_default();
                    unfound.push((object, point));
                }
            }
        }
        unfound
    }
}

/// The search for the layers of one overlay.
struct Look<'a> {
    site: &'a Site<'a>,
    kinds: &'a [FilesystemKind],
    number: u32,
}

impl Look<'_> {
    fn everywhere(&self, paths: &Paths<'_>) -> Result<Overlay, String> {
        let shows = |table: &&[Mount]| table.iter().any(|it| it.filesystem == self.number);
        let mut why =
            "an overlay that only the root of a user namespace can have mounted".to_owned();
        for (table, mounts) in self.site.tables.iter().enumerate().filter(|(_, it)| shows(it)) {
            let owner = table.checked_sub(1).and_then(|place| self.site.owners.get(place));
            if owner.is_some_and(|&owner| owner != 0) {
                continue;
            }
            let Some(namespace) = self.site.namespaces.get(table) else { continue };
            // First as if there were no other overlay, because there is none yet when one is made.
            for among_others in [false, true] {
                let found = File::open("/proc").and_then(|proc| {
                    let proc = OwnedFd::from(proc);
                    let view = View { look: self, proc: &proc, mounts, among_others };
                    in_copy_of(namespace, || view.search(paths))
                });
                match found {
                    Ok(Ok(found)) => {
                        let table = u32::try_from(table).unwrap_or(u32::MAX);
                        return Ok(Overlay { table, ..found });
                    }
                    Ok(Err(object)) => why = object,
                    Err(error) => why = format!("an overlay that cannot be looked into ({error})"),
                }
            }
        }
        Err(why)
    }
}

/// A copy of a mount namespace, in which things are taken away.
struct View<'a> {
    look: &'a Look<'a>,
    /// The host's.
    proc: &'a OwnedFd,
    mounts: &'a [Mount],
    /// Whether other overlays stay.
    among_others: bool,
}

/// A layer as it was found.
struct Layer {
    directory: OwnedFd,
    /// The number of the mount that it was found through.
    mount: u64,
    filesystem: u32,
}

impl View<'_> {
    fn search(&self, paths: &Paths<'_>) -> io::Result<Result<Overlay, String>> {
        let shown = self.shown()?;
        let mut covers = Vec::new();
        self.take_overlays()?;
        let Some((overlay, root)) = shown else {
            return Ok(Err("an overlay of which no directory can be seen".to_owned()));
        };
        for _ in 0..COVERS_MAX {
            let wrong = match self.layers(paths)? {
                Err((path, mount)) => (path, mount),
                Ok(layers) => match is_made_of(&overlay, &root, &layers, paths.has_upper)? {
                    None => {
                        let on = layers.iter().map(|layer| layer.filesystem);
                        let mut on: Vec<u32> = on.filter(|&it| self.is_overlay(it)).collect();
                        on.sort_unstable();
                        on.dedup();
                        return Ok(Ok(Overlay { table: 0, covers, on }));
                    }
                    Some(place) => (paths.layers[place].to_owned(), Some(layers[place].mount)),
                },
            };
            let (path, mount) = wrong;
            let lines = self.lines()?;
            let in_the_way = lines.iter().find(|line| Some(u64::from(line.id)) == mount);
            let Some(cover) = in_the_way.filter(|line| line.point != "/") else {
                return Ok(Err(format!("an overlay whose layer {path} is not found any more")));
            };
            umount2(cover.point.as_str(), MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW)?;
            if cover.kind != "overlay" {
                covers.push(cover.point.clone());
            }
            self.take_overlays()?;
        }
        Ok(Err("an overlay whose layers many mounts hide".to_owned()))
    }

    fn is_overlay(&self, filesystem: u32) -> bool {
        let kind = usize::try_from(filesystem).ok().and_then(|it| self.look.kinds.get(it));
        matches!(kind, Some(FilesystemKind::Overlay(_)))
    }

    fn lines(&self) -> io::Result<Vec<Line>> {
        let file = openat(self.proc, "thread-self/mountinfo", OFlag::O_CLOEXEC, Mode::empty())?;
        let mut text = String::new();
        File::from(file).read_to_string(&mut text)?;
        Ok(text.lines().filter_map(Line::parse).collect())
    }

    fn number(&self, line: &Line) -> Option<u32> {
        self.look.site.known.get(&line.device).copied()
    }

    /// A directory that the overlay shows, and which one of it.
    fn shown(&self) -> io::Result<Option<(OwnedFd, String)>> {
        let mut lines = self.lines()?;
        lines.retain(|line| self.number(line) == Some(self.look.number));
        lines.sort_by_key(|line| line.root.len());
        for line in lines {
            let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
            let opened = nix::fcntl::open(line.point.as_str(), flags, Mode::empty());
            let Ok(opened) = opened else { continue };
            if descriptor::status(opened.as_fd())?.mount == u64::from(line.id) {
                return Ok(Some((opened, line.root)));
            }
        }
        Ok(None)
    }

    /// Takes away the overlays that can be seen: this one, and the others unless they stay.
    fn take_overlays(&self) -> io::Result<()> {
        // Each turn takes at least one of them.
        for _ in 0..=self.mounts.len() {
            let lines = self.lines()?;
            let is_in_sight = |line: &&Line| {
                let number = self.number(line);
                let goes = match self.among_others {
                    true => number == Some(self.look.number),
                    false => number.is_some_and(|number| self.is_overlay(number)),
                };
                let flags = OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
                goes && nix::fcntl::open(line.point.as_str(), flags, Mode::empty())
                    .ok()
                    .and_then(|place| descriptor::status(place.as_fd()).ok())
                    .is_some_and(|status| status.mount == u64::from(line.id))
            };
            let Some(line) = lines.iter().rev().find(is_in_sight) else { return Ok(()) };
            umount2(line.point.as_str(), MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW)?;
        }
        Ok(())
    }

    /// What the paths lead to now. An error is the path that leads to nothing of use, and the
    /// mount in which it does, if that can be told.
    #[expect(clippy::type_complexity, reason = "a path and a number, used in one place")]
    fn layers(&self, paths: &Paths<'_>) -> io::Result<Result<Vec<Layer>, (String, Option<u64>)>> {
        let lines = self.lines()?;
        let mut layers = Vec::new();
        for (place, &path) in paths.layers.iter().chain(&paths.work).enumerate() {
            let Ok(directory) = open(path, OFlag::O_RDONLY | OFlag::O_DIRECTORY) else {
                return Ok(Err((path.to_owned(), self.deepest(path)?)));
            };
            let mount = descriptor::status(directory.as_fd())?.mount;
            let line = lines.iter().find(|line| u64::from(line.id) == mount);
            let filesystem = line.and_then(|line| self.number(line)).filter(|&number| {
                let kind = usize::try_from(number).ok().and_then(|it| self.look.kinds.get(it));
                use FilesystemKind::{Overlay, Ramfs, Root, Tmpfs};
                matches!(kind, Some(Root | Tmpfs | Ramfs | Overlay(_)))
            });
            let Some(filesystem) = filesystem else {
                return Ok(Err((path.to_owned(), Some(mount))));
            };
            if place == paths.layers.len() {
                // Upper and work directory are of one mount.
                if layers.first().is_none_or(|upper: &Layer| upper.mount != mount) {
                    return Ok(Err((path.to_owned(), Some(mount))));
                }
            } else {
                layers.push(Layer { directory, mount, filesystem });
            }
        }
        Ok(Ok(layers))
    }

    /// The mount that the part of a path that exists leads into.
    fn deepest(&self, path: &str) -> io::Result<Option<u64>> {
        for above in Path::new(path).ancestors() {
            if let Ok(found) = open(above, OFlag::O_PATH) {
                return Ok(Some(descriptor::status(found.as_fd())?.mount));
            }
        }
        Ok(None)
    }
}

/// Opens what a path leads to from `/`, where mount(2) has taken it from.
fn open(path: impl AsRef<Path>, flags: OFlag) -> nix::Result<OwnedFd> {
    let how = OpenHow::new().flags(flags | OFlag::O_CLOEXEC);
    let path = Path::new("/").join(path);
    openat2(AT_FDCWD, path.as_path(), how.resolve(ResolveFlag::RESOLVE_NO_MAGICLINKS))
}

/// What a directory of an overlay should show: by name, the layers that have it from the first on
/// that shows.
type Merged = BTreeMap<CString, Vec<(usize, FileStat)>>;

/// Compares a directory of an overlay with those that it is said to be made of. `None` if they
/// fit; else the place of a layer that does not.
fn is_made_of(
    overlay: &OwnedFd,
    root: &str,
    layers: &[Layer],
    has_upper: bool,
) -> io::Result<Option<usize>> {
    if root == "/"
        && let Some(upper) = layers.first()
        && let (Some(told), Some(own)) =
            (handle::real(overlay.as_fd())?, handle::handle(upper.directory.as_fd(), c"")?)
        && told != own
    {
        return Ok(Some(0));
    }
    let mut wrong = None;
    for _ in 0..TRIES {
        wrong = match layers.first() {
            Some(top) if root == "/" && !shows_itself(overlay, &top.directory)? => Some(0),
            _ => difference(overlay, &merge(layers, root)?, layers.len(), has_upper)?,
        };
        if wrong.is_none() {
            break;
        }
    }
    Ok(wrong)
}

/// Whether an overlay tells of its top what the directory itself tells: owner, permissions and the
/// times of the last changes, which no other directory has.
fn shows_itself(overlay: &OwnedFd, top: &OwnedFd) -> io::Result<bool> {
    let (shown, own) = (fstat(overlay)?, fstat(top)?);
    let owner = |status: &FileStat| (status.st_mode, status.st_uid, status.st_gid);
    let modified = |status: &FileStat| (status.st_mtime, status.st_mtime_nsec);
    let changed = |status: &FileStat| (status.st_ctime, status.st_ctime_nsec);
    Ok(owner(&shown) == owner(&own)
        && modified(&shown) == modified(&own)
        && changed(&shown) == changed(&own))
}

fn names(directory: &OwnedFd) -> io::Result<Vec<CString>> {
    let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    let mut opened = Dir::openat(directory, ".", flags, Mode::empty())?;
    let mut names = Vec::new();
    for entry in opened.iter() {
        let name = entry?.file_name().to_owned();
        if !matches!(name.to_bytes(), b"." | b"..") {
            names.push(name);
        }
    }
    Ok(names)
}

fn merge(layers: &[Layer], root: &str) -> io::Result<Merged> {
    let mut merged = Merged::new();
    let mut gone: Vec<CString> = Vec::new();
    for (place, layer) in layers.iter().enumerate() {
        let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        let part = match relative(root) {
            root if root.as_os_str().is_empty() => layer.directory.try_clone(),
            root => openat(&layer.directory, root, flags, Mode::empty()).map_err(io::Error::from),
        };
        let Ok(part) = part else { continue };
        let mut hidden = Vec::new();
        for name in names(&part)? {
            let Ok(status) = fstatat(&part, name.as_c_str(), AtFlags::AT_SYMLINK_NOFOLLOW) else {
                continue;
            };
            if is_whiteout(&part, &name, &status) {
                hidden.push(name);
            } else if !gone.contains(&name) {
                merged.entry(name).or_default().push((place, status));
            }
        }
        gone.extend(hidden);
        let opaque = xattr::get(part.as_fd(), c"user.overlay.opaque").ok().flatten();
        if root != "/" && opaque.is_some_and(|value| value == b"y") {
            break;
        }
    }
    Ok(merged)
}

fn is_whiteout(directory: &OwnedFd, name: &CStr, status: &FileStat) -> bool {
    match status.st_mode & libc::S_IFMT {
        libc::S_IFCHR => status.st_rdev == 0,
        libc::S_IFREG if status.st_size == 0 => {
            let flags = OFlag::O_RDONLY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
            let opened = openat(directory, name, flags, Mode::empty());
            let note = opened.map(|file| xattr::get(file.as_fd(), c"user.overlay.whiteout"));
            matches!(note, Ok(Ok(Some(_))))
        }
        _ => false,
    }
}

fn difference(
    overlay: &OwnedFd,
    merged: &Merged,
    count: usize,
    has_upper: bool,
) -> io::Result<Option<usize>> {
    let last = count.saturating_sub(1);
    let shown = names(overlay)?;
    let too_much = merged.iter().find(|(name, _)| !shown.contains(name));
    if let Some((_, found)) = too_much {
        return Ok(Some(found[0].0));
    }
    for name in shown {
        let Ok(status) = fstatat(overlay, name.as_c_str(), AtFlags::AT_SYMLINK_NOFOLLOW) else {
            return Ok(Some(last));
        };
        // What none of them has, the lowest should have had.
        let Some(found) = merged.get(&name) else { return Ok(Some(last)) };
        let (place, first) = &found[0];
        let same_type = status.st_mode & libc::S_IFMT == first.st_mode & libc::S_IFMT;
        // Numbers of directories are the overlay's own, and what was copied up keeps the number
        // that it had below.
        let numbered = status.st_mode & libc::S_IFMT == libc::S_IFDIR
            || has_upper && *place == 0
            || same_number(status.st_ino, first.st_ino);
        if !same_type || !numbered {
            return Ok(Some(*place));
        }
    }
    Ok(None)
}

/// Above these bits an overlay may note the layer (`xino`).
fn same_number(shown: u64, real: u64) -> bool {
    shown & u64::from(u32::MAX) == real & u64::from(u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_are_taken_as_the_kernel_shows_them() {
        let shown =
            "rw,lowerdir=/a\\040b:/c,upperdir=/u,workdir=/w,redirect_dir=nofollow,userxattr";
        let options = options(shown).unwrap();
        let paths = Paths::of(&options);
        assert_eq!(paths.layers, ["/u", "/a b", "/c"]);
        assert_eq!(paths.work, Some("/w"));
        assert!(paths.has_upper);
        assert!(options.iter().any(|it| it.name == "userxattr" && it.value.is_none()));
        assert!(options.iter().all(|it| it.name != "rw"));
    }

    #[test]
    fn what_cannot_be_made_again_is_refused() {
        for shown in [
            "rw,lowerdir=/a::/b",
            "rw,lowerdir=/a,datadir+=/b",
            "rw,lowerdir=/a,upperdir=/u,workdir=/w,index=on",
            "rw,lowerdir=/a\\134:b",
        ] {
            assert!(options(shown).is_err(), "{shown}");
        }
        let defaults = options("ro,lowerdir=/a:/b,redirect_dir=on,metacopy=on,index=on").unwrap();
        let names: Vec<&str> = defaults.iter().map(|option| option.name.as_str()).collect();
        assert_eq!(names, ["ro", "lowerdir", "index"]);
    }
}
