//! Cgroups without anybody in them.

use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::time::Duration;

use ckpt_engine::sys::xattr;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};

use crate::workload::context::Context;
use crate::workload::keep::keep;
use crate::workload::outcome::{Failure, ensure, same};
use crate::workload::process::{Child, proc_text};

/// A cgroup below the one that this program is in. Dropping it removes it with all below it.
#[derive(Debug)]
pub(super) struct Ground(pub(super) PathBuf);

impl Ground {
    pub(super) fn new() -> Result<Self, Failure> {
        let mounts = proc_text("/proc/self/mountinfo")?;
        let line = mounts.lines().find(|line| line.contains(" - cgroup2 "));
        let mount = line.and_then(|line| line.split(' ').nth(4));
        let mount = mount.ok_or_else(|| Failure::new("there is no cgroup v2 hierarchy"))?;
        let own = proc_text("/proc/self/cgroup")?;
        let own = own.lines().find_map(|line| line.strip_prefix("0::/")).unwrap_or_default();
        let name = format!("selfcheck-{}", std::process::id());
        let ground = Self(Path::new(mount).join(own).join(name));
        fs::create_dir(&ground.0)?;
        Ok(ground)
    }

    pub(super) fn make(&self, name: &str) -> Result<PathBuf, Failure> {
        let path = self.0.join(name);
        fs::create_dir_all(&path)?;
        Ok(path)
    }
}

impl Drop for Ground {
    fn drop(&mut self) {
        // What is still in use goes with the machine.
        remove(&self.0);
    }
}

fn remove(directory: &Path) {
    for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            remove(&entry.path());
        }
    }
    let _ = fs::remove_dir(directory);
}

fn owner(path: &Path) -> Result<(u32, u32, u32), Failure> {
    let status = fs::metadata(path)?;
    Ok((status.uid(), status.gid(), status.mode() & 0o7777))
}

pub(super) fn directories(context: &mut Context) -> Result<(), Failure> {
    let ground = Ground::new()?;
    let paths = ["a", "a/b", "a/b/c", "d.slice/e.service"];
    let paths: Vec<PathBuf> = paths.iter().map(|it| ground.make(it)).collect::<Result<_, _>>()?;
    chown(&paths[1], Some(12), Some(34))?;
    for name in ["cgroup.procs", "cgroup.subtree_control"] {
        chown(paths[1].join(name), Some(12), Some(34))?;
    }
    fs::set_permissions(&paths[2], fs::Permissions::from_mode(0o750))?;
    fs::set_permissions(paths[2].join("cgroup.procs"), fs::Permissions::from_mode(0o660))?;
    let look = || {
        let mut found = Vec::new();
        for path in &paths {
            found.push(owner(path)?);
            found.push(owner(&path.join("cgroup.procs"))?);
            found.push(owner(&path.join("cgroup.threads"))?);
        }
        let mut names: Vec<_> =
            fs::read_dir(&ground.0)?.flatten().map(|it| it.file_name()).collect();
        names.retain(|name| {
            !name.to_string_lossy().contains('.') || name.to_string_lossy() == "d.slice"
        });
        names.sort();
        Ok((found, names))
    };
    keep(context, "cgroups", look, || Ok(fs::remove_dir(&paths[3])?))
}

pub(super) fn notes(context: &mut Context) -> Result<(), Failure> {
    let ground = Ground::new()?;
    let path = ground.make("noted")?;
    let opened = File::open(&path)?;
    xattr::set(opened.as_fd(), c"user.invocation_id", b"0123456789abcdef")?;
    xattr::set(opened.as_fd(), c"user.delegate", b"1")?;
    drop(opened);
    let look = || {
        let opened = File::open(&path)?;
        let get = |name| xattr::get(opened.as_fd(), name);
        Ok((get(c"user.invocation_id")?, get(c"user.delegate")?))
    };
    keep(context, "attributes", look, || {
        Ok(xattr::set(File::open(&path)?.as_fd(), c"user.delegate", b"0")?)
    })
}

pub(super) fn limits(context: &mut Context) -> Result<(), Failure> {
    let ground = Ground::new()?;
    let path = ground.make("limited")?;
    fs::write(path.join("cgroup.max.depth"), "1")?;
    fs::write(path.join("cgroup.max.descendants"), "2")?;
    let child = ground.make("limited/one")?;
    while context.step(Duration::from_millis(20))? {
        if context.progress.plant() {
            fs::write(path.join("cgroup.max.depth"), "max")?;
        }
        let refused = fs::create_dir(child.join("deeper")).err().and_then(|it| it.raw_os_error());
        same("a cgroup too deep", refused, Some(libc::EAGAIN))?;
        fs::create_dir(path.join("two"))?;
        let refused = fs::create_dir(path.join("three")).err().and_then(|it| it.raw_os_error());
        same("a cgroup too many", refused, Some(libc::EAGAIN))?;
        fs::remove_dir(path.join("two"))?;
    }
    Ok(())
}

pub(super) fn open(context: &mut Context) -> Result<(), Failure> {
    let ground = Ground::new()?;
    let path = ground.make("open")?;
    let directory = File::open(&path)?;
    let mut depth = File::options().read(true).write(true).open(path.join("cgroup.max.depth"))?;
    let mut turn = 0u64;
    while context.step(Duration::from_millis(20))? {
        turn += 1;
        Write::write_all(&mut depth, (turn % 1000).to_string().as_bytes())?;
        if context.progress.plant() {
            fs::write(path.join("cgroup.max.depth"), "7777")?;
        }
        depth.seek(SeekFrom::Start(0))?;
        let mut text = String::new();
        depth.read_to_string(&mut text)?;
        same("what was set", text.trim(), (turn % 1000).to_string().as_str())?;
        depth.seek(SeekFrom::Start(0))?;
        same("the directory", directory.metadata()?.ino(), fs::metadata(&path)?.ino())?;
    }
    Ok(())
}

/// Whoever waits for stalls sleeps until there are some, and is not told of errors.
pub(super) fn pressure(context: &mut Context) -> Result<(), Failure> {
    let ground = Ground::new()?;
    let path = ground.make("pressed")?.join("memory.pressure");
    let open = || File::options().read(true).write(true).open(&path);
    let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
    let mut file = open()?;
    file.write_all(b"some 200000 2000000\0")?;
    epoll.add(&file, EpollEvent::new(EpollFlags::EPOLLPRI, 7))?;
    while context.step(Duration::from_millis(20))? {
        if context.progress.plant() {
            // Without a trigger.
            file = open()?;
            epoll.add(&file, EpollEvent::new(EpollFlags::EPOLLPRI, 7))?;
        }
        let told = epoll.wait(&mut [EpollEvent::empty(); 2], EpollTimeout::ZERO)?;
        same("events of a cgroup without anybody", told, 0)?;
    }
    Ok(())
}

/// A process that comes into the cgroup and ends is noticed each time.
pub(super) fn watch(context: &mut Context) -> Result<(), Failure> {
    let ground = Ground::new()?;
    let path = ground.make("watched")?;
    let inotify = Inotify::init(InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK)?;
    let watched = inotify.add_watch(&path.join("cgroup.events"), AddWatchFlags::IN_MODIFY)?;
    let mut damaged = false;
    while context.step(Duration::from_millis(30))? {
        damaged |= context.progress.plant();
        if damaged {
            let _ = inotify.rm_watch(watched);
        }
        // What a move itself has changed is told as well.
        while inotify.read_events().is_ok() {}
        let procs = path.join("cgroup.procs");
        Child::start(context, "visitor", |_| Ok(fs::write(procs, "0")?))?.finish()?;
        let mut noticed = false;
        for _ in 0..200 {
            let events = inotify.read_events().unwrap_or_default();
            noticed |=
                events.iter().any(|it| it.wd == watched && it.mask == AddWatchFlags::IN_MODIFY);
            let empty = proc_text(path.join("cgroup.events"))?.contains("populated 0");
            if noticed && empty {
                break;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        ensure(noticed, || "a process came and went unnoticed".to_owned())?;
    }
    Ok(())
}
