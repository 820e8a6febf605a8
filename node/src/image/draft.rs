//! A file that is complete or not there.
//!
//! It has no name while it is written, so that nothing is left of it whoever dies. Where the file
//! system has no files without a name it has one that tells what it is, removed when it is given up.

use std::{
    ffi::OsString,
    fs::{self, File},
    io,
    os::{fd::AsFd, fd::AsRawFd, unix::fs::OpenOptionsExt},
    path::{Path, PathBuf},
};

use nix::fcntl::{AT_FDCWD, AtFlags};

use super::ImageFileError;

/// A file in the making.
#[derive(Debug)]
pub(super) struct Draft {
    /// What is written.
    pub(super) file: File,
    /// Where it will be.
    pub(super) path: PathBuf,
    directory: PathBuf,
    /// Its name meanwhile.
    temporary: PathBuf,
    named: bool,
}

impl Draft {
    /// Begins a file that is to be at `path`, readable for its owner only.
    pub(super) fn begin(path: &Path) -> Result<Self, ImageFileError> {
        let named = || ImageFileError::Path { path: path.to_owned() };
        let name = path.file_name().ok_or_else(named)?;
        if path.is_dir() {
            return Err(named());
        }
        let directory = match path.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent.to_owned(),
            _ => PathBuf::from("."),
        };
        let mut temporary = OsString::from(".");
        temporary.push(name);
        temporary.push(format!(".{:016x}.part", rand::random::<u64>()));
        let temporary = directory.join(temporary);
        let mut options = File::options();
        options.read(true).write(true).mode(0o600);
        let unnamed = options.clone().custom_flags(libc::O_TMPFILE).open(&directory);
        let (file, named) = match unnamed {
            Ok(file) => (file, false),
            Err(source) if has_none_without_name(&source) => {
                let made = options.create_new(true).open(&temporary);
                (made.map_err(failed("make", &temporary))?, true)
            }
            Err(source) => return Err(failed("make a file in", &directory)(source)),
        };
        Ok(Self { file, path: path.to_owned(), directory, temporary, named })
    }

    /// Gives the file its name, in place of what may have had it, once all of it is on the disk.
    pub(super) fn commit(mut self) -> Result<(), ImageFileError> {
        self.file.sync_all().map_err(failed("write", &self.path))?;
        if !self.named {
            let from = format!("/proc/self/fd/{}", self.file.as_fd().as_raw_fd());
            let flags = AtFlags::AT_SYMLINK_FOLLOW;
            nix::unistd::linkat(AT_FDCWD, from.as_str(), AT_FDCWD, &self.temporary, flags)
                .map_err(|errno| failed("make", &self.temporary)(errno.into()))?;
            self.named = true;
        }
        fs::rename(&self.temporary, &self.path).map_err(failed("make", &self.path))?;
        self.named = false;
        let directory = File::open(&self.directory).and_then(|directory| directory.sync_all());
        directory.map_err(failed("write", &self.directory))
    }
}

impl Drop for Draft {
    fn drop(&mut self) {
        if self.named
            && let Err(error) = fs::remove_file(&self.temporary)
        {
            tracing::warn!(path = %self.temporary.display(), %error, "cannot remove a draft");
        }
    }
}

fn has_none_without_name(source: &io::Error) -> bool {
    // Kernels without support for it take the directory for what is to be opened.
    matches!(source.raw_os_error(), Some(libc::EOPNOTSUPP | libc::EISDIR | libc::EINVAL))
}

/// For `map_err`: what was tried on which file.
pub(super) fn failed(
    act: &'static str,
    path: &Path,
) -> impl FnOnce(io::Error) -> ImageFileError + use<> {
    let path = path.to_owned();
    move |source| ImageFileError::File { act, path, source }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn a_draft_is_seen_only_when_it_is_complete() {
        let place = tempfile::tempdir().unwrap();
        let path = place.path().join("image");
        let names = || fs::read_dir(place.path()).unwrap().count();
        let mut draft = Draft::begin(&path).unwrap();
        draft.file.write_all(b"half").unwrap();
        drop(draft);
        assert_eq!(names(), 0);
        for text in ["first", "second"] {
            let mut draft = Draft::begin(&path).unwrap();
            draft.file.write_all(text.as_bytes()).unwrap();
            draft.commit().unwrap();
            assert_eq!(fs::read_to_string(&path).unwrap(), text);
            assert_eq!(names(), 1);
        }
    }

    #[test]
    fn a_place_that_cannot_be_is_told() {
        let place = tempfile::tempdir().unwrap();
        let missing = place.path().join("none/image");
        let told = Draft::begin(&missing).unwrap_err().to_string();
        assert!(told.contains("none"), "{told}");
        assert!(matches!(Draft::begin(place.path()), Err(ImageFileError::Path { .. })));
    }
}
