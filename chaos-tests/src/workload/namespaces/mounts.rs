//! Mount namespaces.

use std::fs::{self, File};
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::mount::{MsFlags, umount};
use nix::sched::{CloneFlags, setns, unshare};
use nix::unistd::{chdir, chroot};

use crate::workload::context::Context;
use crate::workload::mounts::table::{Ground, bind, flags, new, set};
use crate::workload::outcome::{Failure, ensure, same};
use crate::workload::process::{Child, Stop};

const PAUSE: Duration = Duration::from_millis(15);

/// Goes into a new mount namespace, which passes nothing on to the one before.
fn leave(how: MsFlags) -> Result<(), Failure> {
    unshare(CloneFlags::CLONE_NEWNS)?;
    set(Path::new("/"), how | MsFlags::MS_REC)
}

/// A file that counts up in steps, and is read back each time.
fn count(stop: &Stop, path: &Path, also: impl Fn() -> Result<(), Failure>) -> Result<(), Failure> {
    let mut turn = 0u64;
    fs::write(path, "0")?;
    while !stop.wait(PAUSE)? {
        same("what was written", fs::read_to_string(path)?, turn.to_string())?;
        turn += 1;
        fs::write(path, turn.to_string())?;
        also()?;
    }
    Ok(())
}

/// Watches children until the end; the damage is done in the first one's own files.
fn watch(
    context: &mut Context,
    children: Vec<Child>,
    damage: &Path,
    also: impl Fn() -> Result<(), Failure>,
) -> Result<(), Failure> {
    while context.step(PAUSE)? {
        if context.progress.plant() {
            let inside = format!("/proc/{}/root{}", children[0].pid, damage.display());
            fs::write(inside, "damage")?;
        }
        children.iter().try_for_each(Child::check)?;
        also()?;
    }
    children.into_iter().try_for_each(Child::finish)
}

/// Waits for a child to have come so far.
fn ready(path: &Path) -> Result<(), Failure> {
    for _ in 0..2000 {
        if path.exists() {
            return Ok(());
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    Err(Failure::new("a child was not ready in two seconds"))
}

fn empty(path: &Path) -> Result<(), Failure> {
    same("what others see", fs::read_dir(path)?.count(), 0)
}

pub(super) fn own(context: &mut Context) -> Result<(), Failure> {
    let ground = Ground::new(context)?;
    let place = ground.directory("place")?;
    let child = Child::start(context, "own", |stop| {
        leave(MsFlags::MS_PRIVATE)?;
        new(&place, "tmpfs", "mode=700")?;
        let told = ground.told()?;
        count(stop, &place.join("file"), || same("mounts", ground.told()?, told.clone()))
    })?;
    watch(context, vec![child], &place.join("file"), || empty(&place))
}

pub(super) fn temporary(context: &mut Context) -> Result<(), Failure> {
    let ground = Ground::new(context)?;
    let temp = ground.memory("temp", "mode=1777")?;
    set(&temp, MsFlags::MS_SHARED)?;
    let mut children = Vec::new();
    for (name, directory) in [("first", "private-first"), ("second", "private-second")] {
        let own = temp.join(directory).join("tmp");
        fs::create_dir_all(&own)?;
        let place = temp.clone();
        children.push(Child::start(context, name, move |stop| {
            leave(MsFlags::MS_SLAVE)?;
            set(Path::new("/"), MsFlags::MS_SHARED | MsFlags::MS_REC)?;
            bind(&own, &place)?;
            count(stop, &place.join("file"), || {
                same("what it sees", fs::read_dir(&place)?.count(), 1)
            })
        })?);
    }
    let look = || same("what others see", fs::read_dir(&temp)?.count(), 2);
    watch(context, children, &temp.join("file"), look)
}

pub(super) fn view(context: &mut Context) -> Result<(), Failure> {
    let ground = Ground::new(context)?;
    let (all, state) = (ground.directory("all")?, ground.directory("all/state")?);
    fs::write(all.join("outside"), "here")?;
    let child = Child::start(context, "view", |stop| {
        leave(MsFlags::MS_SLAVE)?;
        bind(&all, &all)?;
        bind(&state, &state)?;
        flags(&all, MsFlags::MS_RDONLY | MsFlags::MS_NOSUID)?;
        count(stop, &state.join("file"), || {
            let refused = fs::write(all.join("new"), "x").err().and_then(|it| it.raw_os_error());
            same("a write to the rest", refused, Some(libc::EROFS))
        })
    })?;
    watch(context, vec![child], &state.join("file"), || Ok(fs::write(all.join("written"), "x")?))
}

/// Whether a mount made outside comes up in the namespace is tried at the end.
pub(super) fn follows(context: &mut Context) -> Result<(), Failure> {
    let ground = Ground::new(context)?;
    let place = ground.memory("place", "mode=755")?;
    let inner = ground.directory("place/inner")?;
    set(&place, MsFlags::MS_SHARED)?;
    let child = Child::start(context, "follows", |stop| {
        leave(MsFlags::MS_SLAVE)?;
        let told = ground.told()?;
        count(stop, &place.join("file"), || {
            let now = ground.told()?;
            ensure(now == told || inner.join("mark").exists(), || format!("mounts: {now:?}"))
        })
    })?;
    let inside = PathBuf::from(format!("/proc/{}/root{}", child.pid, inner.join("mark").display()));
    ready(&place.join("file"))?;
    while context.step(PAUSE)? {
        if context.progress.plant() {
            fs::write(place.join("file"), "damage")?;
        }
        child.check()?;
    }
    new(&inner, "tmpfs", "")?;
    fs::write(inner.join("mark"), "x")?;
    ensure(inside.exists(), || "a new mount did not come up in the namespace".to_owned())?;
    umount(&inner)?;
    ensure(!inside.exists(), || "the mount did not go in the namespace".to_owned())?;
    child.finish()
}

pub(super) fn together(context: &mut Context) -> Result<(), Failure> {
    let ground = Ground::new(context)?;
    let place = ground.directory("place")?;
    let file = place.join("file");
    let writer = Child::start(context, "writer", |stop| {
        leave(MsFlags::MS_PRIVATE)?;
        new(&place, "tmpfs", "")?;
        fs::write(&file, "0")?;
        // Its children are in its namespace from their birth.
        let reader = |_: &Stop| {
            let mut seen = 0;
            loop {
                let text = fs::read_to_string(&file)?;
                let now: u64 = text.parse().unwrap_or(seen);
                ensure(now >= seen, || format!("{now} after {seen}"))?;
                seen = now;
                std::thread::sleep(Duration::from_millis(3));
            }
        };
        let child = nix_fork(reader)?;
        let mut turn = 0u64;
        while !stop.wait(PAUSE)? {
            same("what was written", fs::read_to_string(&file)?, turn.to_string())?;
            turn += 1;
            fs::write(place.join("next"), turn.to_string())?;
            fs::rename(place.join("next"), &file)?;
            child.alive()?;
        }
        child.end()
    })?;
    watch(context, vec![writer], &file, || empty(&place))
}

/// A child of a child.
struct Grandchild(nix::unistd::Pid);

fn nix_fork(body: impl FnOnce(&Stop) -> Result<(), Failure>) -> Result<Grandchild, Failure> {
    let mut body = Some(body);
    let stop = Stop::never()?;
    let pid = ckpt_engine::sys::program::fork::fork(|| {
        let died = nix::sys::prctl::set_pdeathsig(nix::sys::signal::Signal::SIGKILL);
        let run = body.take().map(|body| body(&stop));
        i32::from(died.is_err() || !matches!(run, Some(Ok(()))))
    })?;
    Ok(Grandchild(nix::unistd::Pid::from_raw(pid)))
}

impl Grandchild {
    fn alive(&self) -> Result<(), Failure> {
        use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
        let status = waitpid(self.0, Some(WaitPidFlag::WNOHANG))?;
        same("a child of the child", status, WaitStatus::StillAlive)
    }

    fn end(self) -> Result<(), Failure> {
        nix::sys::signal::kill(self.0, nix::sys::signal::Signal::SIGKILL)?;
        nix::sys::wait::waitpid(self.0, None)?;
        Ok(())
    }
}

pub(super) fn within(context: &mut Context) -> Result<(), Failure> {
    let ground = Ground::new(context)?;
    let (outer, inner) = (ground.directory("outer")?, ground.directory("inner")?);
    let child = Child::start(context, "outer", |stop| {
        leave(MsFlags::MS_PRIVATE)?;
        new(&outer, "tmpfs", "")?;
        // Before there is anybody to miss it.
        fs::write(outer.join("file"), "0")?;
        let below = nix_fork(|_| {
            leave(MsFlags::MS_PRIVATE)?;
            new(&inner, "tmpfs", "")?;
            let mut turn = 0u64;
            loop {
                fs::write(inner.join("deep"), turn.to_string())?;
                std::thread::sleep(Duration::from_millis(5));
                same("deep", fs::read_to_string(inner.join("deep"))?, turn.to_string())?;
                ensure(outer.join("file").exists(), || "the outer file is gone".to_owned())?;
                turn += 1;
            }
        })?;
        count(stop, &outer.join("file"), || {
            empty(&inner)?;
            below.alive()
        })?;
        below.end()
    })?;
    watch(context, vec![child], &outer.join("file"), || {
        empty(&inner)?;
        empty(&outer)
    })
}

pub(super) fn jail(context: &mut Context) -> Result<(), Failure> {
    let ground = Ground::new(context)?;
    let place = ground.directory("place")?;
    let child = Child::start(context, "jail", |stop| {
        leave(MsFlags::MS_PRIVATE)?;
        new(&place, "tmpfs", "mode=755")?;
        fs::create_dir_all(place.join("jail/place"))?;
        chroot(&place.join("jail"))?;
        chdir("/place")?;
        count(stop, Path::new("file"), || {
            same("working directory", std::env::current_dir()?, PathBuf::from("/place"))?;
            same("the root", fs::read_dir("/")?.count(), 1)
        })
    })?;
    watch(context, vec![child], Path::new("/place/file"), || empty(&place))
}

pub(super) fn inside(context: &mut Context) -> Result<(), Failure> {
    let ground = Ground::new(context)?;
    let place = ground.directory("place")?;
    let child = Child::start(context, "inside", |stop| {
        leave(MsFlags::MS_PRIVATE)?;
        new(&place, "tmpfs", "mode=755")?;
        let file =
            File::options().create_new(true).read(true).write(true).open(place.join("open"))?;
        let gone =
            File::options().create_new(true).read(true).write(true).open(place.join("gone"))?;
        fs::remove_file(place.join("gone"))?;
        file.set_len(4096)?;
        let directory = File::open(&place)?;
        let mut turn = 0u64;
        count(stop, &place.join("file"), || Ok(()))?;
        while turn < 3 {
            turn += 1;
            for file in [&file, &gone] {
                file.write_all_at(&turn.to_le_bytes(), turn)?;
                let mut bytes = [0; 8];
                file.read_exact_at(&mut bytes, turn)?;
                same("what was written", u64::from_le_bytes(bytes), turn)?;
            }
        }
        let inode =
            |file: &File| Ok::<_, Failure>(std::os::unix::fs::MetadataExt::ino(&file.metadata()?));
        let named = std::os::unix::fs::MetadataExt::ino(&fs::metadata(place.join("open"))?);
        same("the open file", inode(&file)?, named)?;
        let named = std::os::unix::fs::MetadataExt::ino(&fs::metadata(&place)?);
        same("the open directory", inode(&directory)?, named)
    })?;
    watch(context, vec![child], &place.join("file"), || empty(&place))
}

pub(super) fn many(context: &mut Context) -> Result<(), Failure> {
    let ground = Ground::new(context)?;
    let place = ground.directory("place")?;
    let mut children = Vec::new();
    for number in 0..12u32 {
        let place = place.clone();
        children.push(Child::start(context, "one of many", move |stop| {
            leave(MsFlags::MS_SLAVE)?;
            new(&place, "tmpfs", "size=32k")?;
            fs::write(place.join("number"), number.to_string())?;
            count(stop, &place.join("file"), || {
                let found = fs::read_to_string(place.join("number"))?;
                same("its number", found, number.to_string())
            })
        })?);
    }
    watch(context, children, &place.join("file"), || empty(&place))
}

pub(super) fn joined(context: &mut Context) -> Result<(), Failure> {
    let ground = Ground::new(context)?;
    let (place, told) = (ground.directory("place")?, ground.file("told")?);
    let first = Child::start(context, "first", |stop| {
        leave(MsFlags::MS_PRIVATE)?;
        new(&place, "tmpfs", "")?;
        fs::write(place.join("mark"), "x")?;
        fs::write(&told, "ready")?;
        count(stop, &place.join("file"), || Ok(()))
    })?;
    while fs::read_to_string(&told)? != "ready" {
        first.check()?;
        std::thread::sleep(Duration::from_millis(1));
    }
    let namespace = File::open(format!("/proc/{}/ns/mnt", first.pid))?;
    let second = Child::start(context, "second", move |stop| {
        setns(namespace.as_fd(), CloneFlags::CLONE_NEWNS)?;
        drop(namespace);
        count(stop, &place.join("other"), || {
            same("the mark", fs::read_to_string(place.join("mark"))?, "x".to_owned())
        })
    })?;
    let place = context.path("ground/place");
    let place = fs::canonicalize(place)?;
    watch(context, vec![first, second], &place.join("file"), || empty(&place))
}
