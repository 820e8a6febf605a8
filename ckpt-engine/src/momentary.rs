//! Names that are there for a moment only: what has lost its name is made under it once more, so
//! that the kernel shows it as before, and loses it again.
//!
//! Nothing of the VE runs meanwhile.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use nix::{
    fcntl::AT_FDCWD,
    sys::{
        stat::{UtimensatFlags, utimensat},
        time::TimeSpec,
    },
};

/// How many directories above a name are tried.
const DEPTH: usize = 64;

/// Makes something under the name that it once had. `make` is given that name, and does not take
/// the place of anything.
///
/// What has the name now (a new version of a program, mostly) steps aside meanwhile, and directories
/// on the way that have gone come back for as long.
pub(crate) fn under_old_name<T>(
    path: &Path,
    make: impl Fn(&Path) -> io::Result<T>,
) -> io::Result<T> {
    let directory = path.parent().ok_or(io::ErrorKind::InvalidInput)?;
    let surroundings = Surroundings::make(directory)?;
    let made = match made_and_gone(path, &make) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
            beside_its_successor(path, directory, &make)
        }
        made => made,
    };
    surroundings.restore()?;
    made
}

/// The same, but where nothing can be made under that name it is made under another one, as near as
/// can be.
pub(crate) fn near_old_name<T>(
    path: &Path,
    make: impl Fn(&Path) -> io::Result<T>,
) -> io::Result<T> {
    let mut failure = match under_old_name(path, &make) {
        Err(error) => error,
        made => return made,
    };
    for directory in path.ancestors().skip(1).take(DEPTH) {
        let made = Surroundings::of(directory).and_then(|surroundings| {
            let made = made_and_gone(&unused_name(directory)?, &make);
            surroundings.restore()?;
            made
        });
        match made {
            Err(error) => failure = error,
            made => return made,
        }
    }
    Err(failure)
}

fn made_and_gone<T>(path: &Path, make: impl Fn(&Path) -> io::Result<T>) -> io::Result<T> {
    let made = make(path)?;
    match fs::remove_file(path) {
        Err(error) if error.kind() == io::ErrorKind::IsADirectory => fs::remove_dir(path)?,
        other => other?,
    }
    Ok(made)
}

/// Makes it while what has its name now has another one.
fn beside_its_successor<T>(
    path: &Path,
    directory: &Path,
    make: impl Fn(&Path) -> io::Result<T>,
) -> io::Result<T> {
    // To rename a directory can change more than its name, in an overlay for instance.
    if fs::symlink_metadata(path)?.is_dir() {
        return Err(io::ErrorKind::AlreadyExists.into());
    }
    let aside = unused_name(directory)?;
    fs::rename(path, &aside)?;
    let made = made_and_gone(path, make);
    fs::rename(&aside, path)?;
    made
}

fn unused_name(directory: &Path) -> io::Result<PathBuf> {
    let free = |name: &PathBuf| fs::symlink_metadata(name).is_err();
    (0..1000u32)
        .map(|number| directory.join(format!(".moved-aside-{number}")))
        .find(free)
        .ok_or_else(|| io::ErrorKind::AlreadyExists.into())
}

/// A directory in which something is made, to be left as it was.
struct Surroundings {
    /// The directories that were made for it, the outermost first.
    made: Vec<PathBuf>,
    /// The innermost that was there, with its times.
    there: PathBuf,
    times: [TimeSpec; 2],
}

impl Surroundings {
    fn of(directory: &Path) -> io::Result<Self> {
        let before = fs::symlink_metadata(directory)?;
        if !before.is_dir() {
            return Err(io::ErrorKind::NotADirectory.into());
        }
        let times = times(&before);
        Ok(Self { made: Vec::new(), there: directory.to_owned(), times })
    }

    /// Makes what is missing on the way to it.
    fn make(directory: &Path) -> io::Result<Self> {
        let is_there = |it: &&Path| fs::symlink_metadata(it).is_ok();
        let there = directory.ancestors().take(DEPTH).find(is_there);
        let mut surroundings = Self::of(there.ok_or(io::ErrorKind::NotFound)?)?;
        let depth = surroundings.there.components().count();
        let missing: Vec<&Path> = directory.ancestors().collect();
        for path in missing.into_iter().rev().filter(|it| it.components().count() > depth) {
            if let Err(error) = fs::create_dir(path) {
                surroundings.restore()?;
                return Err(error);
            }
            surroundings.made.push(path.to_owned());
        }
        Ok(surroundings)
    }

    fn restore(mut self) -> io::Result<()> {
        while let Some(path) = self.made.pop() {
            fs::remove_dir(path)?;
        }
        let [accessed, changed] = &self.times;
        let own = UtimensatFlags::NoFollowSymlink;
        Ok(utimensat(AT_FDCWD, &self.there, accessed, changed, own)?)
    }
}

fn times(of: &fs::Metadata) -> [TimeSpec; 2] {
    use std::os::unix::fs::MetadataExt;
    [TimeSpec::new(of.atime(), of.atime_nsec()), TimeSpec::new(of.mtime(), of.mtime_nsec())]
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    fn names(directory: &Path) -> Vec<String> {
        let entries = fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().file_name());
        entries.map(|name| name.into_string().unwrap()).collect()
    }

    #[test]
    fn directories_that_have_gone_are_there_for_a_moment() {
        let directory = tempfile::tempdir().unwrap();
        let before = fs::metadata(directory.path()).unwrap().modified().unwrap();
        let path = directory.path().join("a/b/c");
        let seen = under_old_name(&path, |path| {
            fs::create_dir(path)?;
            fs::canonicalize(path)
        });
        assert_eq!(seen.unwrap(), path);
        assert!(names(directory.path()).is_empty());
        assert_eq!(fs::metadata(directory.path()).unwrap().modified().unwrap(), before);
    }

    #[test]
    fn whatever_has_the_name_steps_aside_but_for_a_directory() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("name");
        symlink("new", &path).unwrap();
        let make = |path: &Path| {
            symlink("old", path)?;
            fs::read_link(path)
        };
        assert_eq!(under_old_name(&path, make).unwrap().to_str(), Some("old"));
        assert_eq!(fs::read_link(&path).unwrap().to_str(), Some("new"));
        fs::remove_file(&path).unwrap();
        fs::create_dir(&path).unwrap();
        let refused = under_old_name(&path, make).unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::AlreadyExists);
        assert_eq!(near_old_name(&path, make).unwrap().to_str(), Some("old"));
        assert_eq!(names(directory.path()), ["name"]);
    }

    #[test]
    fn below_what_is_no_directory_any_more_it_is_made_above() {
        let directory = tempfile::tempdir().unwrap();
        fs::write(directory.path().join("file"), "").unwrap();
        let path = directory.path().join("file/deeper/name");
        let parent = near_old_name(&path, |path| {
            fs::write(path, "")?;
            Ok(path.parent().unwrap().to_owned())
        });
        assert_eq!(parent.unwrap(), directory.path());
        assert_eq!(names(directory.path()), ["file"]);
    }
}
