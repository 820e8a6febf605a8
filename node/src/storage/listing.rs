//! What the VE's own files are at a moment, to find out later whether they are still the same.
//!
//! Nothing is read but names and what stat(2) tells: a change of contents changes the time of the
//! last change, which no program can set. Directories and sockets are told by type, owner and
//! permissions only, because a VE that is restored binds its sockets again; what happens in a
//! directory shows in its names.

use std::{collections::BTreeMap, fs::File, os::fd::AsFd, path::Path};

use ckpt_format::{
    image::{Contents, OwnFile},
    tree::Timestamp,
};

use super::{
    error::{TreeError, at, show},
    path,
    status::Recall,
    walk::{Entry, Found, Scan, Walk},
};

/// All that is below `upper`, in the order of the paths. Nobody may change it meanwhile.
pub fn list_own(upper: &Path) -> Result<Vec<OwnFile>, TreeError> {
    let top = File::open(upper).map_err(at("open", upper.as_os_str().as_encoded_bytes()))?;
    let walk = Walk {
        top: top.as_fd(),
        overlay: true,
        steady: true,
        known: &|_| true,
        recall: Recall::default(),
    };
    let scan = walk.run()?;
    let mut files = Vec::new();
    collect(&scan, &mut files);
    files.sort_by(|left, right| left.path.cmp(&right.path));
    Ok(files)
}

/// Waits until what was written to the files is on the disk.
pub fn settle(upper: &Path) -> Result<(), TreeError> {
    let path = upper.as_os_str().as_encoded_bytes();
    let top = File::open(upper).map_err(at("open", path))?;
    nix::unistd::syncfs(&top).map_err(at("write", path))
}

fn collect(scan: &Scan, files: &mut Vec<OwnFile>) {
    let mut pending = vec![(scan.top, Vec::new())];
    while let Some((identity, here)) = pending.pop() {
        let Some(found) = scan.nodes.get(&identity) else { continue };
        files.push(own_file(here.clone(), found));
        for (name, entry) in &found.children {
            let path = path::join(&here, name);
            match entry {
                Entry::Whiteout => {
                    let mode = libc::S_IFCHR;
                    files.push(OwnFile { path, mode, uid: 0, gid: 0, device: 0, contents: None });
                }
                Entry::Node(child) => pending.push((*child, path)),
            }
        }
    }
}

fn own_file(path: Vec<u8>, found: &Found) -> OwnFile {
    let stamp = &found.status.stamp;
    let kind = stamp.mode & libc::S_IFMT;
    let contents = Contents { size: stamp.size, modified: stamp.modified, changed: stamp.changed };
    OwnFile {
        path,
        mode: stamp.mode,
        uid: stamp.uid,
        gid: stamp.gid,
        device: if matches!(kind, libc::S_IFCHR | libc::S_IFBLK) { found.status.rdev } else { 0 },
        contents: matches!(kind, libc::S_IFREG | libc::S_IFLNK).then_some(contents),
    }
}

/// The first file that is not what it was.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{path} {what}")]
pub struct Change {
    /// Its path.
    pub path: String,
    /// What about it.
    pub what: &'static str,
}

/// Compares what is there with what was listed, file by file.
#[derive(Debug)]
pub struct Comparison {
    present: BTreeMap<Vec<u8>, OwnFile>,
    first: Option<Change>,
    undone: Option<Timestamp>,
}

impl Comparison {
    /// With what is below `upper` now. A restore that was undone has moved files aside and back,
    /// which gives them another time of the last change: up to `undone` that alone is no change.
    /// They were compared when it began.
    pub fn with(upper: &Path, undone: Option<Timestamp>) -> Result<Self, TreeError> {
        let files = list_own(upper)?;
        let present = files.into_iter().map(|file| (file.path.clone(), file)).collect();
        Ok(Self { present, first: None, undone })
    }

    /// The next file that was listed.
    pub fn expect(&mut self, listed: &OwnFile) {
        let what = match self.present.remove(&listed.path) {
            None => Some("is missing"),
            Some(found) => difference(listed, &found, self.undone),
        };
        if let Some(what) = what {
            self.note(&listed.path, what);
        }
    }

    /// Nothing more was listed. An error if not all is what it was.
    pub fn finish(mut self) -> Result<(), Change> {
        if let Some(path) = self.present.keys().next().cloned() {
            self.note(&path, "is new");
        }
        self.first.map_or(Ok(()), Err)
    }

    fn note(&mut self, path: &[u8], what: &'static str) {
        self.first.get_or_insert_with(|| Change { path: show(path), what });
    }
}

fn difference(
    listed: &OwnFile,
    found: &OwnFile,
    undone: Option<Timestamp>,
) -> Option<&'static str> {
    if listed == found {
        return None;
    }
    let moment = |time: Timestamp| (time.seconds, time.nanoseconds);
    let by_a_restore = |contents: &Contents| {
        undone.is_some_and(|undone| moment(contents.changed) <= moment(undone))
    };
    Some(match (listed, found) {
        _ if listed.mode & libc::S_IFMT != found.mode & libc::S_IFMT => "is something else now",
        _ if listed.contents.map(|it| it.size) != found.contents.map(|it| it.size) => {
            "has another size"
        }
        _ if listed.contents.map(|it| it.modified) != found.contents.map(|it| it.modified) => {
            "was written to"
        }
        _ if (listed.mode, listed.uid, listed.gid) != (found.mode, found.uid, found.gid) => {
            "has another owner or other permissions"
        }
        _ if found.contents.as_ref().is_some_and(by_a_restore) && listed.device == found.device => {
            return None;
        }
        _ => "was changed",
    })
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::net::UnixListener};

    use super::*;

    fn compare(listed: &[OwnFile], place: &Path) -> Result<(), Change> {
        let mut comparison = Comparison::with(place, None).unwrap();
        listed.iter().for_each(|file| comparison.expect(file));
        comparison.finish()
    }

    /// Lists a tree, changes it, and tells what is found.
    fn check(change: impl FnOnce(&Path)) -> Option<(String, &'static str)> {
        let place = tempfile::tempdir().unwrap();
        fs::create_dir(place.path().join("etc")).unwrap();
        fs::write(place.path().join("etc/hosts"), "127.0.0.1").unwrap();
        std::os::unix::fs::symlink("hosts", place.path().join("etc/link")).unwrap();
        drop(UnixListener::bind(place.path().join("socket")).unwrap());
        let listed = list_own(place.path()).unwrap();
        assert_eq!(listed.len(), 5);
        assert!(listed.is_sorted_by(|left, right| left.path < right.path));
        assert_eq!(compare(&listed, place.path()), Ok(()));
        change(place.path());
        compare(&listed, place.path()).err().map(|change| (change.path, change.what))
    }

    #[test]
    fn changes_are_found_and_named() {
        let told = |path: &str, what| Some((path.to_owned(), what));
        let hosts = |place: &Path| place.join("etc/hosts");
        assert_eq!(
            check(|it| fs::write(hosts(it), "x").unwrap()),
            told("/etc/hosts", "has another size")
        );
        assert_eq!(
            check(|it| fs::remove_file(hosts(it)).unwrap()),
            told("/etc/hosts", "is missing")
        );
        assert_eq!(check(|it| fs::write(it.join("new"), "").unwrap()), told("/new", "is new"));
        // The same size and time of writing, as a careful intruder would leave it.
        let careful = |it: &Path| {
            let time = fs::metadata(hosts(it)).unwrap().modified().unwrap();
            fs::write(hosts(it), "127.0.0.2").unwrap();
            File::options().write(true).open(hosts(it)).unwrap().set_modified(time).unwrap();
        };
        assert_eq!(check(careful), told("/etc/hosts", "was changed"));
        let replaced = |it: &Path| {
            fs::remove_file(it.join("etc/link")).unwrap();
            fs::create_dir(it.join("etc/link")).unwrap();
        };
        assert_eq!(check(replaced), told("/etc/link", "is something else now"));
    }

    #[test]
    fn what_an_undone_restore_has_moved_aside_and_back_is_no_change() {
        let place = tempfile::tempdir().unwrap();
        let (file, aside) = (place.path().join("file"), place.path().join("aside"));
        fs::write(&file, "text").unwrap();
        let listed = list_own(place.path()).unwrap();
        fs::rename(&file, &aside).unwrap();
        fs::rename(&aside, &file).unwrap();
        let changed = list_own(place.path()).unwrap()[1].contents.unwrap().changed;
        let compare = |undone| {
            let mut comparison = Comparison::with(place.path(), undone).unwrap();
            listed.iter().for_each(|file| comparison.expect(file));
            comparison.finish().is_ok()
        };
        let earlier = Timestamp { seconds: changed.seconds - 1, ..changed };
        assert!(compare(Some(changed)) && !compare(Some(earlier)) && !compare(None));
    }

    #[test]
    fn a_socket_that_is_bound_again_is_no_change() {
        let again = |it: &Path| {
            fs::remove_file(it.join("socket")).unwrap();
            drop(UnixListener::bind(it.join("socket")).unwrap());
        };
        assert_eq!(check(again), None);
    }
}
