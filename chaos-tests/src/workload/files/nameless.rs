//! FIFOs, symbolic links and nodes of sockets and devices that have no name any more, and what has
//! their names now.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt, symlink};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::fcntl::{OFlag, open, readlinkat};
use nix::sys::stat::{Mode, SFlag, fstat, mknod};
use nix::unistd::{getpid, mkfifo};

use crate::workload::context::Context;
use crate::workload::keep::keep;
use crate::workload::outcome::{Failure, same};

fn link(fd: &impl AsRawFd) -> Result<PathBuf, Failure> {
    Ok(fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd()))?)
}

/// Names what is there, and takes the name away.
fn named(path: &Path) -> Result<OwnedFd, Failure> {
    let flags = OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    let named = open(path, flags, Mode::empty())?;
    fs::remove_file(path)?;
    Ok(named)
}

fn fifo(path: &Path, mode: u32) -> Result<(), Failure> {
    mkfifo(path, Mode::empty())?;
    Ok(fs::set_permissions(path, fs::Permissions::from_mode(mode))?)
}

/// Descriptors that only name things without a name; new things have the names of some of them.
pub(super) fn by_path(context: &mut Context) -> Result<(), Failure> {
    let folder = context.path("left");
    fs::create_dir(&folder)?;
    symlink("where it led", folder.join("link"))?;
    fifo(&folder.join("fifo"), 0o620)?;
    fs::write(folder.join("file"), "what it held")?;
    let listener = UnixListener::bind(folder.join("socket"))?;
    fs::set_permissions(folder.join("socket"), fs::Permissions::from_mode(0o640))?;
    // The only device that whoever likes may make: what hides a file in an overlay, but not in one.
    let hidden = PathBuf::from(format!("/dev/shm/hidden-{}", getpid()));
    mknod(&hidden, SFlag::S_IFCHR, Mode::S_IRUSR, 0)?;
    let names = ["link", "fifo", "file", "socket"].map(|name| folder.join(name));
    let all = names.iter().chain([&hidden]).map(|path| named(path));
    let all = all.collect::<Result<Vec<_>, _>>()?;
    drop(listener);
    let twin = open(
        format!("/proc/self/fd/{}", all[0].as_raw_fd()).as_str(),
        OFlag::O_PATH,
        Mode::empty(),
    )?;
    symlink("where the new one leads", folder.join("link"))?;
    fs::write(folder.join("fifo"), "a file by now")?;
    let look = || {
        let mut seen = Vec::new();
        for held in &all {
            let status = fstat(held)?;
            seen.push((link(held)?, status.st_mode, status.st_nlink, status.st_rdev));
        }
        let target = readlinkat(&all[0], "")?;
        same("a second descriptor", fstat(&twin)?.st_ino, fstat(&all[0])?.st_ino)?;
        let text = fs::read_to_string(format!("/proc/self/fd/{}", all[2].as_raw_fd()))?;
        let new = (fs::read_link(folder.join("link"))?, fs::read_to_string(folder.join("fifo"))?);
        Ok((seen, target, text, new, fs::read_dir(&folder)?.count()))
    };
    keep(context, "what is only named", look, || {
        Ok(fs::write(folder.join("fifo"), "another text")?)
    })
}

/// A FIFO that has lost its name with data in it, to a new one that has data as well.
pub(super) fn fifos(context: &mut Context) -> Result<(), Failure> {
    let path = context.path("fifo");
    let both = |path: &Path| File::options().read(true).write(true).open(path);
    fifo(&path, 0o600)?;
    let mut old = both(&path)?;
    let late = File::options().read(true).custom_flags(libc::O_NONBLOCK).open(&path)?;
    fs::remove_file(&path)?;
    fifo(&path, 0o640)?;
    let mut new = both(&path)?;
    let empty = context.path("gone/empty");
    fs::create_dir(context.path("gone"))?;
    fifo(&empty, 0o600)?;
    let unused = both(&empty)?;
    fs::remove_file(&empty)?;
    fs::remove_dir(context.path("gone"))?;
    let links = [link(&old)?, link(&new)?, link(&unused)?];
    old.write_all(b"old")?;
    new.write_all(b"new")?;
    while context.step(Duration::from_millis(8))? {
        let mut text = [0; 3];
        (&late).read_exact(&mut text)?;
        same("what is in a FIFO without a name", &text, b"old")?;
        old.write_all(&text)?;
        new.read_exact(&mut text)?;
        same("what is in the one that has its name", &text, b"new")?;
        both(&path)?.write_all(&text)?;
        same("its mode", fs::metadata(&path)?.mode() & 0o777, 0o640)?;
        same("what they are shown as", [link(&old)?, link(&new)?, link(&unused)?], links.clone())?;
        if context.progress.plant() {
            new.write_all(b"?")?;
        }
    }
    Ok(())
}
