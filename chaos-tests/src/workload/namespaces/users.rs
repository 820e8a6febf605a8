//! User namespaces.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::time::Duration;

use ckpt_engine::sys::program::fork::fork;
use nix::mount::{MntFlags, MsFlags, umount2};
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::utsname::uname;
use nix::sys::wait::waitpid;
use nix::unistd::{Gid, Pid, Uid, getegid, geteuid, setgroups, sethostname, setresgid, setresuid};

use crate::workload::context::Context;
use crate::workload::mounts::table::{Ground, flags, new, set};
use crate::workload::outcome::{Failure, ensure, same};
use crate::workload::process::{Child, Stop, proc_text};

const PAUSE: Duration = Duration::from_millis(15);

/// Who is who in a user namespace: the texts of `uid_map` and `gid_map`; empty for nobody.
#[derive(Clone, Copy)]
pub(super) struct Map {
    pub(super) users: &'static str,
    pub(super) groups: &'static str,
    pub(super) groups_fixed: bool,
}

const TTL: &str = "/proc/sys/net/ipv4/ip_default_ttl";

const ROOT_ALONE: Map = Map { users: "0 0 1", groups: "0 0 1", groups_fixed: true };
pub(super) const ALL: Map = Map { users: "0 0 65536", groups: "0 0 65536", groups_fixed: false };

/// Leaves for a new user namespace, and others of `kinds`. Somebody who stays behind says who is
/// who there.
pub(super) fn leave(kinds: CloneFlags, map: Map) -> Result<(), Failure> {
    let own = nix::unistd::getpid();
    let ((mut left, mut leave), (mut done, mut told)) = (std::io::pipe()?, std::io::pipe()?);
    let helper = fork(|| {
        let mut write = || {
            left.read_exact(&mut [0])?;
            if map.groups_fixed {
                fs::write(format!("/proc/{own}/setgroups"), "deny")?;
            }
            for (name, text) in [("uid_map", map.users), ("gid_map", map.groups)] {
                if !text.is_empty() {
                    fs::write(format!("/proc/{own}/{name}"), text)?;
                }
            }
            told.write_all(b"x")
        };
        i32::from(write().is_err())
    })?;
    unshare(CloneFlags::CLONE_NEWUSER | kinds)?;
    leave.write_all(b"x")?;
    drop(leave);
    let status = waitpid(Pid::from_raw(helper), None)?;
    done.read_exact(&mut [0]).map_err(|_| Failure::new(format!("no map was written: {status:?}")))
}

/// What says who is who, with one blank between words.
fn told() -> Result<[String; 3], Failure> {
    let text = |name: &str| {
        let text = proc_text(format!("/proc/self/{name}"))?;
        Ok::<_, Failure>(text.split_whitespace().collect::<Vec<_>>().join(" "))
    };
    Ok([text("uid_map")?, text("gid_map")?, text("setgroups")?])
}

/// All that can be seen of the process's credentials.
fn credentials() -> Result<Vec<String>, Failure> {
    let keys = ["Uid", "Gid", "Groups", "NoNewPrivs"];
    let wanted = |line: &&str| keys.iter().any(|key| line.starts_with(key)) || line.contains("Cap");
    let text = proc_text("/proc/thread-self/status")?;
    Ok(text.lines().filter(wanted).map(str::to_owned).collect())
}

/// Looks at it again and again until told to stop.
fn stay(stop: &Stop, word: &File, also: impl Fn() -> Result<(), Failure>) -> Result<(), Failure> {
    let (before, seen) = (told()?, credentials()?);
    while !stop.wait(PAUSE)? {
        let damaged = word.read_at(&mut [0], 0)? == 1;
        if damaged {
            unshare(CloneFlags::CLONE_NEWUSER)?;
        }
        same("who is who", told()?, before.clone())?;
        same("credentials", credentials()?, seen.clone())?;
        also()?;
    }
    Ok(())
}

/// Runs a child until the end; where a fault is planted it leaves for another user namespace.
fn watch(
    context: &mut Context,
    name: &'static str,
    body: impl FnOnce(&Stop, &File) -> Result<(), Failure>,
) -> Result<(), Failure> {
    let path = context.path("word");
    let word = File::options().create(true).truncate(true).read(true).write(true).open(&path)?;
    let child = Child::start(context, name, |stop| body(stop, &word))?;
    while context.step(PAUSE)? {
        if context.progress.plant() {
            word.write_all_at(b"x", 0)?;
        }
        child.check()?;
    }
    child.finish()
}

pub(super) fn become_user(id: u32) -> Result<(), Failure> {
    setgroups(&[])?;
    let (user, group) = (Uid::from_raw(id), Gid::from_raw(id));
    setresgid(group, group, group)?;
    setresuid(user, user, user)?;
    Ok(nix::sys::prctl::set_dumpable(true)?)
}

/// Like a service with `PrivateUsers`.
pub(super) fn service(context: &mut Context) -> Result<(), Failure> {
    const MAP: Map =
        Map { users: "0 0 1\n1000 1000 1", groups: "0 0 1\n1000 1000 1", groups_fixed: true };
    watch(context, "service", |stop, word| {
        setgroups(&[])?;
        leave(CloneFlags::empty(), MAP)?;
        become_user_within(1000)?;
        stay(stop, word, || same("the user", geteuid().as_raw(), 1000))
    })
}

/// Where groups may not be changed.
fn become_user_within(id: u32) -> Result<(), Failure> {
    let (user, group) = (Uid::from_raw(id), Gid::from_raw(id));
    setresgid(group, group, group)?;
    setresuid(user, user, user)?;
    Ok(nix::sys::prctl::set_dumpable(true)?)
}

/// Root without being it, like `unshare -Ur` of a user.
pub(super) fn root(context: &mut Context) -> Result<(), Failure> {
    const MAP: Map = Map { users: "0 1000 1", groups: "0 1000 1", groups_fixed: true };
    let path = context.path("its-file");
    let file = File::create(&path)?;
    std::os::unix::fs::fchown(&file, Some(1000), Some(1000))?;
    watch(context, "root", |stop, word| {
        become_user(1000)?;
        // A root has to say who a user is who wants to be nobody else.
        leave_alone(MAP)?;
        stay(stop, word, || {
            same("the user", (geteuid().as_raw(), getegid().as_raw()), (0, 0))?;
            let owner = file.metadata()?;
            same("the owner of a file", (owner.uid(), owner.gid()), (0, 0))
        })
    })
}

/// As [`leave`], without anybody's help.
pub(super) fn leave_alone(map: Map) -> Result<(), Failure> {
    unshare(CloneFlags::CLONE_NEWUSER)?;
    fs::write("/proc/self/setgroups", "deny")?;
    fs::write("/proc/self/uid_map", map.users)?;
    Ok(fs::write("/proc/self/gid_map", map.groups)?)
}

/// A namespace in which nobody has a number.
pub(super) fn nobody(context: &mut Context) -> Result<(), Failure> {
    watch(context, "nobody", |stop, word| {
        unshare(CloneFlags::CLONE_NEWUSER)?;
        stay(stop, word, || same("the user", geteuid().as_raw(), 65534))
    })
}

/// Those in between have no process.
pub(super) fn deep(context: &mut Context) -> Result<(), Failure> {
    const SECOND: Map = Map { users: "40 0 1", groups: "50 0 1", groups_fixed: true };
    const THIRD: Map = Map { users: "7 40 1", groups: "9 50 1", groups_fixed: true };
    watch(context, "deep", |stop, word| {
        leave(CloneFlags::empty(), ALL)?;
        leave_alone(SECOND)?;
        leave_alone(THIRD)?;
        stay(stop, word, || same("the user", (geteuid().as_raw(), getegid().as_raw()), (7, 9)))
    })
}

/// A program with threads.
pub(super) fn threads(context: &mut Context) -> Result<(), Failure> {
    watch(context, "threads", |stop, word| {
        leave(CloneFlags::CLONE_NEWUTS, ROOT_ALONE)?;
        let names = File::open("/proc/self/ns/uts")?;
        let end = std::sync::atomic::AtomicBool::new(false);
        let work = || -> Result<(), Failure> {
            let seen =
                || (nix::unistd::gettid(), nix::unistd::getresuid(), nix::unistd::getgroups());
            let before = seen();
            while !end.load(std::sync::atomic::Ordering::Relaxed) {
                ensure(seen() == before, || format!("a thread is now {:?}", seen()))?;
                // A power of the namespace, taken up again and again.
                setns(names.as_fd(), CloneFlags::CLONE_NEWUTS)?;
                std::thread::sleep(Duration::from_millis(5));
            }
            Ok(())
        };
        std::thread::scope(|scope| {
            let all: Vec<_> = (0..3).map(|_| scope.spawn(work)).collect();
            let stayed = stay_with_threads(stop, word);
            end.store(true, std::sync::atomic::Ordering::Relaxed);
            let joined = all.into_iter().map(|thread| thread.join());
            let ended =
                joined.map(|it| it.unwrap_or_else(|_| Err(Failure::new("a thread panicked"))));
            stayed.and(ended.collect())
        })
    })
}

/// With threads nobody can leave: the damage is another group.
fn stay_with_threads(stop: &Stop, word: &File) -> Result<(), Failure> {
    while !stop.wait(PAUSE)? {
        if word.read_at(&mut [0], 0)? == 1 {
            nix::sys::prctl::set_no_new_privs()?;
        }
        let freely = nix::sys::prctl::get_no_new_privs()?;
        ensure(!freely, || "it has new privileges no more".to_owned())?;
        same("who is who", told()?[0].clone(), "0 0 1".to_owned())?;
    }
    Ok(())
}

/// One process makes a namespace, another joins it, and holds it open.
pub(super) fn joined(context: &mut Context) -> Result<(), Failure> {
    let path = context.path("ready");
    let first = Child::start(context, "first", |stop| {
        leave(CloneFlags::empty(), ALL)?;
        fs::write(&path, "x")?;
        while !stop.wait(PAUSE)? {}
        Ok(())
    })?;
    while !path.exists() {
        first.check()?;
        std::thread::sleep(Duration::from_millis(1));
    }
    let namespace = File::open(format!("/proc/{}/ns/user", first.pid))?;
    watch(context, "second", |stop, word| {
        setns(namespace.as_fd(), CloneFlags::CLONE_NEWUSER)?;
        stay(stop, word, || {
            let own = fs::metadata("/proc/self/ns/user")?.ino();
            same("the namespace held open", namespace.metadata()?.ino(), own)?;
            let other = fs::metadata(format!("/proc/{}/ns/user", first.pid))?.ino();
            same("that of the other", other, own)
        })
    })?;
    first.finish()
}

/// Names, IPC and network that belong to the user namespace: its root goes on to rule them.
pub(super) fn ruler(context: &mut Context) -> Result<(), Failure> {
    watch(context, "ruler", |stop, word| {
        let kinds = CloneFlags::CLONE_NEWUTS | CloneFlags::CLONE_NEWIPC | CloneFlags::CLONE_NEWNET;
        leave(kinds, ROOT_ALONE)?;
        sethostname("ruled")?;
        fs::write(TTL, "33")?;
        stay(stop, word, || {
            let name = uname()?.nodename().to_string_lossy().into_owned();
            same("host name", name, "ruled".to_owned())?;
            same("a setting of the network", proc_text(TTL)?.trim(), "33")?;
            // Only its ruler may.
            sethostname("ruled")?;
            Ok(fs::write(TTL, "33")?)
        })
    })
}

/// A sandbox: what was mounted when it was made stays, what it mounts itself can go.
pub(super) fn sandbox(context: &mut Context) -> Result<(), Failure> {
    let ground = Ground::new(context)?;
    let (kept, own) = (ground.memory("kept", "mode=755")?, ground.directory("own")?);
    fs::write(kept.join("file"), "x")?;
    flags(&kept, MsFlags::MS_RDONLY | MsFlags::MS_NODEV)?;
    let inner = own.join("inner");
    watch(context, "sandbox", |stop, word| {
        leave(CloneFlags::CLONE_NEWNS, ROOT_ALONE)?;
        set(Path::new("/"), MsFlags::MS_PRIVATE | MsFlags::MS_REC)?;
        new(&own, "tmpfs", "mode=755")?;
        fs::create_dir(&inner)?;
        let before = ground.told()?;
        let turn = std::cell::Cell::new(0u32);
        fs::write(own.join("turn"), "0")?;
        let refused = |result: nix::Result<()>| result.err();
        stay(stop, word, || {
            same("mounts", ground.told()?, before.clone())?;
            let found = fs::read_to_string(own.join("turn"))?;
            same("its file", found, turn.get().to_string())?;
            turn.set(turn.get() + 1);
            fs::write(own.join("turn"), turn.get().to_string())?;
            let gone = refused(umount2(&kept, MntFlags::MNT_DETACH));
            same("taking a mount away that came", gone, Some(nix::Error::EINVAL))?;
            ensure(flags(&kept, MsFlags::MS_NODEV).is_err(), || {
                "a mount that came read-only could be made writable".to_owned()
            })?;
            new(&inner, "tmpfs", "")?;
            Ok(umount2(&inner, MntFlags::empty())?)
        })
    })
}
