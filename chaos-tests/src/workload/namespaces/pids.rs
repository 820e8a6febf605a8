//! Pid namespaces: processes with numbers of their own, which a process that is 1 there rules.

use std::fs::{self, File};
use std::io::Read;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use ckpt_engine::sys::program::descriptor::{open_process, signal_process};
use ckpt_engine::sys::program::fork::fork;
use ckpt_engine::sys::program::signal::{block, queue, take};
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::{
    Pid, getegid, geteuid, getpgid, getpid, getppid, getsid, gettid, setpgid, setsid,
};

use super::users::{ALL, Map, become_user, leave, leave_alone};
use crate::workload::context::Context;
use crate::workload::mounts::table::{bind, flags as set_flags, new, set};
use crate::workload::outcome::{Failure, ensure, same};
use crate::workload::process::{Child, Stop, proc_text};

const PAUSE: Duration = Duration::from_millis(15);

/// What is told to a process far below: that it is to damage what it holds.
struct Word(File);

impl Word {
    fn new(path: PathBuf) -> Result<Self, Failure> {
        Ok(Self(File::options().create(true).truncate(true).read(true).write(true).open(path)?))
    }

    fn say(&self) -> Result<(), Failure> {
        Ok(self.0.write_all_at(b"x", 0)?)
    }

    fn is_said(&self) -> Result<bool, Failure> {
        Ok(self.0.read_at(&mut [0], 0)? == 1)
    }
}

/// A child of a child, which says why it has failed.
struct Grandchild {
    pid: Pid,
    report: PathBuf,
}

impl Grandchild {
    /// Forks. The body runs until it fails, or the child is killed.
    fn start(
        report: &Path,
        name: &str,
        body: impl FnOnce() -> Result<(), Failure>,
    ) -> Result<Self, Failure> {
        let report = report.with_extension(name);
        let mut body = Some(body);
        let pid = fork(|| {
            let died = nix::sys::prctl::set_pdeathsig(Signal::SIGKILL);
            let done =
                died.map_err(Failure::from).and_then(|()| body.take().map_or(Ok(()), |it| it()));
            if let Err(failure) = &done {
                // Without it the parent still sees the exit status.
                let _ = fs::write(&report, failure.to_string());
            }
            i32::from(done.is_err())
        })?;
        Ok(Self { pid: Pid::from_raw(pid), report })
    }

    fn check(&self) -> Result<(), Failure> {
        match waitpid(self.pid, Some(WaitPidFlag::WNOHANG))? {
            WaitStatus::StillAlive => Ok(()),
            status => {
                let said = fs::read_to_string(&self.report).unwrap_or_default();
                Err(Failure::new(format!("{said} ({status:?})")))
            }
        }
    }

    fn end(self) -> Result<(), Failure> {
        self.check()?;
        kill(self.pid, Signal::SIGKILL)?;
        waitpid(self.pid, None)?;
        Ok(())
    }
}

/// The first process of a new pid namespace, with a `/proc` of it.
fn found(
    report: &Path,
    name: &str,
    body: impl FnOnce() -> Result<(), Failure>,
) -> Result<Grandchild, Failure> {
    unshare(CloneFlags::CLONE_NEWPID)?;
    Grandchild::start(report, name, || {
        own_proc()?;
        body()
    })
}

/// Goes into a mount namespace whose `/proc` is that of its pid namespace.
fn own_proc() -> Result<(), Failure> {
    unshare(CloneFlags::CLONE_NEWNS)?;
    set(Path::new("/"), MsFlags::MS_PRIVATE | MsFlags::MS_REC)?;
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    Ok(mount(Some("proc"), "/proc", Some("proc"), flags, None::<&str>)?)
}

/// Runs a child until the end, which is told when to damage what it holds.
fn watch(
    context: &mut Context,
    body: impl FnOnce(&Stop, &Word, &Path) -> Result<(), Failure>,
) -> Result<(), Failure> {
    let (word, report) = (Word::new(context.path("word"))?, context.path("report"));
    // Whoever it is that has something to say there.
    fs::set_permissions(&context.folder, fs::Permissions::from_mode(0o777))?;
    let child = Child::start(context, "maker", |stop| body(stop, &word, &report))?;
    while context.step(PAUSE)? {
        if context.progress.plant() {
            word.say()?;
        }
        child.check()?;
    }
    child.finish()
}

/// Watches over the first process of a namespace until told to stop.
fn guard(stop: &Stop, first: Grandchild) -> Result<(), Failure> {
    while !stop.wait(PAUSE)? {
        first.check()?;
    }
    first.end()
}

/// The numbers that `/proc` shows.
fn shown() -> Result<Vec<i32>, Failure> {
    let names =
        fs::read_dir("/proc")?.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
    let mut numbers: Vec<i32> = names.filter_map(|name| name.parse().ok()).collect();
    numbers.sort_unstable();
    Ok(numbers)
}

/// What stands behind a key in the status of a process.
fn status(pid: i32, key: &str) -> Result<String, Failure> {
    let text = proc_text(format!("/proc/{pid}/status"))?;
    let line = text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(':'));
    let words = line.map(|line| line.split_whitespace().collect::<Vec<_>>().join(" "));
    words.ok_or_else(|| Failure::new(format!("no {key} of {pid}")))
}

/// A process and its family: a dead child, an orphan whose session has no leader, a group.
pub(super) fn own(context: &mut Context) -> Result<(), Failure> {
    watch(context, |stop, word, report| {
        guard(stop, found(report, "first", || family(word, report))?)
    })
}

fn family(word: &Word, report: &Path) -> Result<(), Failure> {
    let dead = fork(|| 42)?;
    let leader = fork(|| {
        let orphan = || {
            setsid()?;
            fork(|| i32::from(orphan_life().is_err()))
        };
        i32::from(orphan().is_err())
    })?;
    same(
        "end of a leader",
        waitpid(Pid::from_raw(leader), None)?,
        WaitStatus::Exited(Pid::from_raw(leader), 0),
    )?;
    let member = Grandchild::start(report, "member", || {
        setpgid(Pid::from_raw(0), Pid::from_raw(0))?;
        loop {
            same("parent of a member", getppid().as_raw(), 1)?;
            same("group of a member", getpgid(None)?, getpid())?;
            std::thread::sleep(PAUSE);
        }
    })?;
    let (orphan, all) = (leader + 1, [1, dead, leader + 1, member.pid.as_raw()]);
    same("numbers", [dead, leader, member.pid.as_raw()], [2, 3, 5])?;
    loop {
        same("its number", (getpid().as_raw(), getppid().as_raw()), (1, 0))?;
        same("its own entry", fs::read_link("/proc/self")?, PathBuf::from("1"))?;
        same("who is there", shown()?, all.to_vec())?;
        same("all its numbers", status(1, "NSpid")?, "1".to_owned())?;
        if word.is_said()? {
            waitpid(Pid::from_raw(dead), None)?;
        }
        same("a dead child", status(dead, "State")?, "Z (zombie)".to_owned())?;
        same("parent of an orphan", status(orphan, "PPid")?, "1".to_owned())?;
        same("session of an orphan", getsid(Some(Pid::from_raw(orphan)))?.as_raw(), leader)?;
        member.check()?;
        std::thread::sleep(PAUSE);
    }
}

fn orphan_life() -> Result<(), Failure> {
    loop {
        std::thread::sleep(PAUSE);
        same("session and group", (getsid(None)?.as_raw(), getpgid(None)?.as_raw()), (3, 3))?;
        same("its number", getpid().as_raw(), 4)?;
    }
}

/// The same for a user who is root there, like `unshare -Urpf`.
pub(super) fn users(context: &mut Context) -> Result<(), Failure> {
    const MAP: Map = Map { users: "0 1000 1", groups: "0 1000 1", groups_fixed: true };
    watch(context, |stop, word, report| {
        become_user(1000)?;
        leave_alone(MAP)?;
        guard(stop, found(report, "first", || family(word, report))?)
    })
}

/// A pid namespace whose user namespace has many users, some of which are in it.
pub(super) fn many_users(context: &mut Context) -> Result<(), Failure> {
    watch(context, |stop, word, report| {
        leave(CloneFlags::CLONE_NEWPID, ALL)?;
        let first = Grandchild::start(report, "first", || {
            own_proc()?;
            let other = Grandchild::start(report, "other", || {
                become_user(1234)?;
                loop {
                    same("the user", (geteuid().as_raw(), getegid().as_raw()), (1234, 1234))?;
                    same("its number", (getpid().as_raw(), getppid().as_raw()), (2, 1))?;
                    ensure(!word.is_said()?, || "the word".to_owned())?;
                    std::thread::sleep(PAUSE);
                }
            })?;
            while status(2, "Uid")? != "1234 1234 1234 1234" {
                other.check()?;
            }
            let end = std::sync::atomic::AtomicBool::new(false);
            std::thread::scope(|scope| {
                let thread = scope.spawn(|| -> Result<(), Failure> {
                    while !end.load(std::sync::atomic::Ordering::Relaxed) {
                        same("number of a thread", gettid().as_raw(), 3)?;
                        std::thread::sleep(PAUSE);
                    }
                    Ok(())
                });
                loop {
                    let seen = other.check().and_then(|()| {
                        same("its number", getpid().as_raw(), 1)?;
                        same(
                            "users of the other",
                            status(2, "Uid")?,
                            "1234 1234 1234 1234".to_owned(),
                        )?;
                        ensure(!thread.is_finished(), || "a thread has ended".to_owned())
                    });
                    if seen.is_err() {
                        end.store(true, std::sync::atomic::Ordering::Relaxed);
                        return seen;
                    }
                    std::thread::sleep(PAUSE);
                }
            })
        })?;
        guard(stop, first)
    })
}

/// One in another, each with its own `/proc`.
pub(super) fn deep(context: &mut Context) -> Result<(), Failure> {
    watch(context, |stop, word, report| {
        let outer = || {
            let maker = Grandchild::start(report, "maker", || {
                let inner = found(report, "inner", || {
                    loop {
                        same("its number", (getpid().as_raw(), getppid().as_raw()), (1, 0))?;
                        same("who is there", shown()?, vec![1])?;
                        std::thread::sleep(PAUSE);
                        ensure(!word.is_said()?, || "the word".to_owned())?;
                    }
                })?;
                loop {
                    inner.check()?;
                    same("number of the inner one", inner.pid.as_raw(), 3)?;
                    std::thread::sleep(PAUSE);
                }
            })?;
            while !Path::new("/proc/3").exists() {
                maker.check()?;
            }
            loop {
                same("who is there", shown()?, vec![1, 2, 3])?;
                same("numbers of the inner one", status(3, "NSpid")?, "3 1".to_owned())?;
                maker.check()?;
                std::thread::sleep(PAUSE);
            }
        };
        guard(stop, found(report, "outer", outer)?)
    })
}

/// Whoever has left for a new one is not in it; the next child will be.
pub(super) fn waiting(context: &mut Context) -> Result<(), Failure> {
    watch(context, |stop, word, _| {
        unshare(CloneFlags::CLONE_NEWPID)?;
        let own = getpid();
        while !stop.wait(PAUSE)? {
            same("its number", getpid(), own)?;
            let children = fs::read_link("/proc/self/ns/pid_for_children").err();
            let gone = children.and_then(|error| error.raw_os_error());
            same("a namespace that nobody is in", gone, Some(libc::ENOENT))?;
            if word.is_said()? {
                bear_first()?;
            }
        }
        bear_first()
    })
}

/// A child is the first in its namespace.
fn bear_first() -> Result<(), Failure> {
    let child = Pid::from_raw(fork(|| i32::from(getpid().as_raw() != 1))?);
    same("the first child", waitpid(child, None)?, WaitStatus::Exited(child, 0))
}

/// A process that bears children in the namespace of another, and stays out of it.
pub(super) fn joined(context: &mut Context) -> Result<(), Failure> {
    watch(context, |stop, word, report| {
        let first = Grandchild::start(report, "maker", || {
            let first = found(report, "first", || {
                loop {
                    std::thread::sleep(PAUSE);
                }
            })?;
            loop {
                first.check()?;
                std::thread::sleep(PAUSE);
            }
        })?;
        let maker = first.pid;
        let children = PathBuf::from(format!("/proc/{maker}/ns/pid_for_children"));
        let own = fs::metadata("/proc/self/ns/pid")?.ino();
        // Until it has made the new one, and that has a process.
        let namespace = loop {
            first.check()?;
            match File::open(&children) {
                Ok(opened) if opened.metadata()?.ino() != own => break opened,
                _ => std::thread::sleep(Duration::from_millis(1)),
            }
        };
        let before = Grandchild::start(report, "outside", || {
            loop {
                std::thread::sleep(PAUSE);
            }
        })?;
        setns(namespace.as_fd(), CloneFlags::CLONE_NEWPID)?;
        let child = Grandchild::start(report, "child", || {
            let own = getpid();
            loop {
                same("its number", (getpid(), getppid().as_raw()), (own, 0))?;
                ensure(!word.is_said()?, || "the word".to_owned())?;
                std::thread::sleep(PAUSE);
            }
        })?;
        let seen = status(child.pid.as_raw(), "NSpid")?;
        let mut last: i32 = seen.rsplit(' ').next().and_then(|it| it.parse().ok()).unwrap_or(0);
        while !stop.wait(PAUSE)? {
            first.check()?;
            child.check()?;
            before.check()?;
            same("its child's numbers", status(child.pid.as_raw(), "NSpid")?, seen.clone())?;
            let here = fs::read_link("/proc/self/ns/pid")?;
            let there = fs::read_link("/proc/self/ns/pid_for_children")?;
            ensure(here != there, || format!("children are born into {there:?}"))?;
            same(
                "that of the child",
                fs::read_link(format!("/proc/{}/ns/pid", child.pid))?,
                there,
            )?;
            // Numbers go on where they were.
            let (mut read, write) = std::io::pipe()?;
            let next = Pid::from_raw(fork(|| {
                let told = std::io::Write::write_all(&mut &write, &getpid().as_raw().to_ne_bytes());
                i32::from(told.is_err())
            })?);
            drop(write);
            let mut number = [0; 4];
            read.read_exact(&mut number)?;
            waitpid(next, None)?;
            let number = i32::from_ne_bytes(number);
            same("the next number there", number, last + 1)?;
            last = number;
        }
        child.end()?;
        before.end()?;
        first.end()
    })
}

/// A `/proc` as containers have it: parts of it are read-only, others are hidden. What is mounted
/// there is passed on within the mount namespace.
pub(super) fn masked(context: &mut Context) -> Result<(), Failure> {
    watch(context, |stop, word, report| {
        unshare(CloneFlags::CLONE_NEWPID)?;
        let first = Grandchild::start(report, "first", || {
            unshare(CloneFlags::CLONE_NEWNS)?;
            set(Path::new("/"), MsFlags::MS_SLAVE | MsFlags::MS_REC)?;
            set(Path::new("/"), MsFlags::MS_SHARED | MsFlags::MS_REC)?;
            let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
            mount(Some("proc"), "/proc", Some("proc"), flags, Some("hidepid=invisible"))?;
            let (sys, hidden) = (Path::new("/proc/sys"), Path::new("/proc/tty"));
            bind(sys, sys)?;
            set_flags(sys, flags | MsFlags::MS_RDONLY)?;
            new(hidden, "tmpfs", "mode=700")?;
            bind(Path::new("/dev/null"), Path::new("/proc/version"))?;
            set(hidden, MsFlags::MS_PRIVATE)?;
            let before = mounts_of_proc()?;
            ensure(before.len() >= 5, || format!("mounts: {before:?}"))?;
            loop {
                same("mounts", mounts_of_proc()?, before.clone())?;
                same("who is there", shown()?, vec![1])?;
                same("a hidden text", fs::read("/proc/version")?.len(), 0)?;
                same("a hidden directory", fs::read_dir(hidden)?.count(), 0)?;
                let refused = fs::write("/proc/sys/kernel/ns_last_pid", "5").err();
                let refused = refused.and_then(|error| error.raw_os_error());
                same("a write to a setting", refused, Some(libc::EROFS))?;
                ensure(!word.is_said()?, || "the word".to_owned())?;
                std::thread::sleep(PAUSE);
            }
        })?;
        guard(stop, first)
    })
}

/// What is mounted at and below `/proc`, without numbers.
fn mounts_of_proc() -> Result<Vec<String>, Failure> {
    let text = fs::read_to_string("/proc/self/mountinfo")?;
    let told = |line: &str| {
        let words = line.split(' ').skip(3);
        let kinds = words.map(|word| match word.split_once(':') {
            Some((kind, _)) => kind.to_owned(),
            None => word.to_owned(),
        });
        kinds.collect::<Vec<_>>().join(" ")
    };
    let at_proc = |line: &&str| line.split(' ').nth(4).is_some_and(|it| it.starts_with("/proc"));
    let mut told: Vec<String> = text.lines().filter(at_proc).map(told).collect();
    told.sort();
    Ok(told)
}

/// Descriptors and signals about processes in a namespace: who they are of is told by its numbers.
pub(super) fn signals(context: &mut Context) -> Result<(), Failure> {
    watch(context, |stop, word, report| {
        guard(stop, found(report, "first", || exchange(word, report))?)
    })
}

fn exchange(word: &Word, report: &Path) -> Result<(), Failure> {
    let told = libc::SIGRTMIN();
    block(told)?;
    block(Signal::SIGUSR1 as i32)?;
    let sender = Grandchild::start(report, "sender", || {
        loop {
            let asked = take(&[Signal::SIGUSR1 as i32], Duration::from_secs(60))?;
            same("who asks", asked.pid, 1)?;
            queue(1, told, 77)?;
        }
    })?;
    let pid = sender.pid.as_raw();
    let process: OwnedFd = open_process(pid, 0)?;
    let comm = File::open(format!("/proc/{pid}/stat"))?;
    let mine = File::open("/proc/self/stat")?;
    let (one, other) = std::os::unix::net::UnixDatagram::pair()?;
    nix::sys::socket::setsockopt(&other, nix::sys::socket::sockopt::PassCred, &true)?;
    let number = |file: &File| -> Result<String, Failure> {
        let mut bytes = [0; 64];
        let count = file.read_at(&mut bytes, 0)?;
        let text = String::from_utf8_lossy(&bytes[..count]).into_owned();
        Ok(text.split(' ').next().unwrap_or_default().to_owned())
    };
    loop {
        kill(sender.pid, Signal::SIGUSR1)?;
        one.send(b"who")?;
        std::thread::sleep(PAUSE);
        sender.check()?;
        let answer = take(&[told], Duration::from_secs(60))?;
        same("who answers", (answer.pid, answer.value), (pid, 77))?;
        same("who has sent", credentials(&other)?, 1)?;
        same("the process held", number(&comm)?, pid.to_string())?;
        same("the own entry held", number(&mine)?, "1".to_owned())?;
        signal_process(process.as_fd(), 0)?;
        if word.is_said()? {
            kill(sender.pid, Signal::SIGKILL)?;
        }
    }
}

/// The sender of the next datagram.
fn credentials(socket: &std::os::unix::net::UnixDatagram) -> Result<i32, Failure> {
    use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};
    use std::os::fd::AsRawFd;
    let mut bytes = [0; 16];
    let mut parts = [std::io::IoSliceMut::new(&mut bytes)];
    let mut space = nix::cmsg_space!(nix::sys::socket::UnixCredentials);
    let message =
        recvmsg::<()>(socket.as_raw_fd(), &mut parts, Some(&mut space), MsgFlags::empty())?;
    let sender = message.cmsgs()?.find_map(|part| match part {
        ControlMessageOwned::ScmCredentials(sender) => Some(sender.pid()),
        _ => None,
    });
    sender.ok_or_else(|| Failure::new("a datagram that does not say who has sent it"))
}
