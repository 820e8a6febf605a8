//! Directories that are read bit by bit, held by their path alone, or gone.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{Read, Seek, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

use ckpt_engine::sys::program::descriptor;
use nix::errno::Errno;
use nix::fcntl::{OFlag, openat};
use nix::sys::stat::Mode;

use crate::workload::context::Context;
use crate::workload::outcome::{Failure, ensure, same};
use crate::workload::process::Child;

const ENTRIES: usize = 120;

fn fill(path: &Path) -> Result<BTreeSet<String>, Failure> {
    fs::create_dir(path)?;
    let names: BTreeSet<String> = (0..ENTRIES).map(|number| format!("entry-{number:03}")).collect();
    for name in &names {
        File::create(path.join(name))?;
    }
    Ok(names)
}

/// Lists a directory some entries at a time, again and again.
fn list(context: &mut Context, path: &Path) -> Result<(), Failure> {
    let names = fill(path)?;
    let mut directory = File::open(path)?;
    let mut seen = BTreeSet::new();
    while context.step(Duration::from_millis(8))? {
        let entries = descriptor::some_entries(directory.as_fd(), 160)?;
        for (name, _) in &entries {
            if name != "." && name != ".." {
                let new = seen.insert(name.clone());
                ensure(new, || format!("{name} was listed twice"))?;
            }
        }
        if context.progress.plant() {
            seen.insert("entry-none".to_owned());
        }
        if entries.is_empty() {
            ensure(seen == names, || format!("{} of {ENTRIES} were listed", seen.len()))?;
            seen.clear();
            directory.rewind()?;
        }
    }
    Ok(())
}

pub(super) fn on_disk(context: &mut Context) -> Result<(), Failure> {
    let path = context.path("list");
    list(context, &path)
}

/// A folder that goes with the workload.
struct Folder(PathBuf);

impl Drop for Folder {
    fn drop(&mut self) {
        // It may be gone already.
        let _ = fs::remove_dir_all(&self.0);
    }
}

pub(super) fn in_memory(context: &mut Context) -> Result<(), Failure> {
    let path = format!("/dev/shm/selfcheck-list-{}", nix::unistd::getpid());
    let folder = Folder(PathBuf::from(path));
    list(context, &folder.0)
}

pub(super) fn by_path(context: &mut Context) -> Result<(), Failure> {
    let file = context.path("file");
    fs::write(&file, b"content")?;
    let flags = OFlag::O_PATH | OFlag::O_CLOEXEC;
    let folder = nix::fcntl::open(&context.folder, flags | OFlag::O_DIRECTORY, Mode::empty())?;
    let named = nix::fcntl::open(&file, flags, Mode::empty())?;
    std::os::unix::fs::symlink("nowhere", context.path("link"))?;
    let link = context.path("link");
    let link = nix::fcntl::open(&link, flags | OFlag::O_NOFOLLOW, Mode::empty())?;
    while context.step(Duration::from_millis(8))? {
        let refused = nix::unistd::read(&named, &mut [0]);
        same("reading what is only named", refused, Err(Errno::EBADF))?;
        let opened = openat(&folder, "file", OFlag::O_RDONLY, Mode::empty())?;
        let mut text = String::new();
        File::from(opened).read_to_string(&mut text)?;
        same("a file below a folder", text.as_str(), "content")?;
        let path = format!("/proc/self/fd/{}", named.as_raw_fd());
        same("the file itself", fs::read(path)?, b"content".to_vec())?;
        let target = nix::fcntl::readlinkat(&link, "")?;
        same("a link that is held", target, "nowhere".into())?;
        if context.progress.plant() {
            fs::write(&file, b"other")?;
        }
    }
    Ok(())
}

pub(super) fn gone(context: &mut Context) -> Result<(), Failure> {
    let path = context.path("gone");
    fs::create_dir(&path)?;
    let directory: OwnedFd = File::open(&path)?.into();
    fs::remove_dir(&path)?;
    let link = format!("/proc/self/fd/{}", directory.as_raw_fd());
    let shown = fs::read_link(&link)?;
    while context.step(Duration::from_millis(8))? {
        same("what is in a removed folder", fs::read_dir(&link)?.count(), 0)?;
        let flags = OFlag::O_CREAT | OFlag::O_WRONLY;
        let made = openat(&directory, "new", flags, Mode::S_IRUSR).map(drop);
        same("making a file in it", made, Err(Errno::ENOENT))?;
        same("its link", fs::read_link(&link)?, shown.clone())?;
        if context.progress.plant() {
            fs::create_dir(&path)?;
        }
        ensure(!path.exists(), || "a removed folder is back".to_owned())?;
    }
    Ok(())
}

pub(super) fn working(context: &mut Context) -> Result<(), Failure> {
    let path = context.path("working");
    let inner = path.join("in/it");
    fs::create_dir_all(&inner)?;
    let child = Child::start(context, "worker", |stop| {
        std::env::set_current_dir(&inner)?;
        File::create("inside")?.write_all(b"x")?;
        fs::remove_file("inside")?;
        for gone in inner.ancestors().take(3) {
            fs::remove_dir(gone)?;
        }
        let shown = fs::read_link("/proc/self/cwd")?;
        while !stop.wait(Duration::from_millis(5))? {
            let here = std::env::current_dir().map_err(|error| error.kind());
            same("the name of a removed folder", here, Err(std::io::ErrorKind::NotFound))?;
            let made = File::create("new").map(drop).map_err(|error| error.kind());
            same("making a file in it", made, Err(std::io::ErrorKind::NotFound))?;
            same("its link", fs::read_link("/proc/self/cwd")?, shown.clone())?;
            ensure(Path::new(".").is_dir(), || "the working folder is no folder".to_owned())?;
        }
        Ok(())
    })?;
    let mut gone = false;
    while context.step(Duration::from_millis(8))? {
        child.check()?;
        if context.progress.plant() {
            fs::create_dir(&path)?;
        }
        ensure(!(gone && path.exists()), || "a removed folder is back".to_owned())?;
        gone = !path.exists();
    }
    child.finish()
}
