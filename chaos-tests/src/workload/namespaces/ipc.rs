//! What an IPC namespace of a program's own holds. The VE's own has objects with the same numbers,
//! keys and names meanwhile, and others in them.

use std::ffi::CString;
use std::fs::{self, File};
use std::os::fd::AsFd;
use std::sync::atomic::Ordering::SeqCst;
use std::time::Duration;

use ckpt_engine::sys::mailbox;
use ckpt_engine::sys::program::map::PAGE_BYTES;
use ckpt_engine::sys::program::sysv::{self, Ask, Attached};
use nix::mount::MsFlags;
use nix::sched::{CloneFlags, setns, unshare};

use crate::workload::context::Context;
use crate::workload::ipc::{self, key};
use crate::workload::mounts::table::{Ground, new, set};
use crate::workload::outcome::{Failure, ensure, same};
use crate::workload::process::{Child, proc_text};

const PAUSE: Duration = Duration::from_millis(10);
const BYTES: usize = 4 * PAGE_BYTES;

/// One object of each kind, with a mark in it.
struct Objects {
    /// Of the process that has made them.
    key: i32,
    segment: i32,
    set: i32,
    queue: i32,
    name: CString,
    mark: u64,
}

impl Objects {
    fn new(mark: u64) -> Result<Self, Failure> {
        let key = key(1);
        let name = CString::new(format!("selfcheck-{key}"))
            .map_err(|_| Failure::new("a name with a zero in it"))?;
        let this = Self {
            key,
            segment: sysv::segment(key, BYTES, Some(0o600))?,
            set: sysv::semaphores(key, 2, Some(0o600))?,
            queue: sysv::messages(key, Some(0o600))?,
            name,
            mark,
        };
        Attached::new(this.segment, BYTES, false)?.word(700).store(mark, SeqCst);
        sysv::set_semaphore(this.set, 1, mark as i32)?;
        sysv::send(this.queue, 3, &mark.to_le_bytes())?;
        let made = mailbox::make(&this.name, 3, 64)?;
        mailbox::send(made.as_fd(), 5, &mark.to_le_bytes())?;
        Ok(this)
    }

    /// Looks at all of them, and leaves them as they were.
    fn check(&self) -> Result<(), Failure> {
        same("a segment by its key", sysv::segment(self.key, BYTES, None)?, self.segment)?;
        let attached = Attached::new(self.segment, BYTES, true)?;
        same("a word of a segment", attached.word(700).load(SeqCst), self.mark)?;
        same("a semaphore", sysv::semaphore(self.set, 1, Ask::Value)?, self.mark as i32)?;
        same("messages in a queue", sysv::queue_state(self.queue)?.0, 1)?;
        let message = sysv::receive(self.queue, 0, false)?;
        same("a message", message, (3, self.mark.to_le_bytes().to_vec()))?;
        sysv::send(self.queue, 3, &self.mark.to_le_bytes())?;
        let mailbox = mailbox::open(&self.name)?;
        let letter = Some((5, self.mark.to_le_bytes().to_vec()));
        same("a letter", mailbox::receive(mailbox.as_fd(), 64)?, letter)?;
        Ok(mailbox::send(mailbox.as_fd(), 5, &self.mark.to_le_bytes())?)
    }

    fn remove(&self) -> Result<(), Failure> {
        sysv::remove_segment(self.segment)?;
        sysv::remove_semaphores(self.set)?;
        sysv::remove_messages(self.queue)?;
        Ok(mailbox::unlink(&self.name)?)
    }

    /// Damages one of them.
    fn damage(&self) -> Result<(), Failure> {
        Ok(sysv::set_semaphore(self.set, 1, 9)?)
    }
}

/// Runs a workload in an IPC namespace of its own, while others with the same numbers and keys are
/// where it comes from.
fn apart(
    context: &mut Context,
    work: fn(&mut Context) -> Result<(), Failure>,
) -> Result<(), Failure> {
    // Theirs have the numbers that those of the workload will have.
    let outside = Objects::new(77)?;
    let watcher = Child::start(context, "outside", |stop| {
        while !stop.wait(PAUSE)? {
            outside.check()?;
        }
        outside.remove()
    })?;
    unshare(CloneFlags::CLONE_NEWIPC)?;
    work(context)?;
    watcher.check()?;
    watcher.finish()
}

pub(super) fn segments(context: &mut Context) -> Result<(), Failure> {
    apart(context, ipc::segments::shared)
}

pub(super) fn detached(context: &mut Context) -> Result<(), Failure> {
    apart(context, ipc::segments::detached)
}

pub(super) fn removed(context: &mut Context) -> Result<(), Failure> {
    apart(context, ipc::segments::removed)
}

pub(super) fn undo(context: &mut Context) -> Result<(), Failure> {
    apart(context, ipc::semaphores::undo)
}

pub(super) fn messages(context: &mut Context) -> Result<(), Failure> {
    apart(context, ipc::messages::queue)
}

pub(super) fn mailboxes(context: &mut Context) -> Result<(), Failure> {
    apart(context, ipc::mailboxes::unlinked)
}

/// Settings of an IPC namespace that are not those of a new one.
const LIMITS: [(&str, &str); 7] = [
    ("kernel/shmmax", "123456789"),
    ("kernel/shmmni", "77"),
    ("kernel/msgmax", "5000"),
    ("kernel/msgmnb", "9000"),
    ("kernel/sem", "100\t2000\t50\t60"),
    ("fs/mqueue/msg_max", "7"),
    ("fs/mqueue/queues_max", "11"),
];

pub(super) fn limits(context: &mut Context) -> Result<(), Failure> {
    let outside = Objects::new(5)?;
    let others = File::open("/proc/self/ns/ipc")?;
    unshare(CloneFlags::CLONE_NEWIPC | CloneFlags::CLONE_NEWNS)?;
    set(std::path::Path::new("/"), MsFlags::MS_PRIVATE | MsFlags::MS_REC)?;
    let ground = Ground::new(context)?;
    let place = ground.directory("place")?;
    new(&place, "mqueue", "")?;
    let inside = Objects::new(6)?;
    for (name, value) in LIMITS {
        fs::write(format!("/proc/sys/{name}"), value)?;
    }
    let names = || -> Result<Vec<_>, Failure> {
        let entries = fs::read_dir(&place)?.collect::<Result<Vec<_>, _>>()?;
        Ok(entries.into_iter().map(|entry| entry.file_name()).collect())
    };
    let own = vec![std::ffi::OsString::from(outside.name.to_string_lossy().into_owned())];
    while context.step(PAUSE)? {
        if context.progress.plant() {
            fs::write("/proc/sys/kernel/shmmax", "5")?;
        }
        for (name, value) in LIMITS {
            same(name, proc_text(format!("/proc/sys/{name}"))?.trim(), value)?;
        }
        same("message queues that a mount shows", names()?, own.clone())?;
        inside.check()?;
    }
    setns(others.as_fd(), CloneFlags::CLONE_NEWIPC)?;
    outside.check()?;
    outside.remove()
}

/// Messages that only raised limits allow, in a queue under a limit that was lowered again.
pub(super) fn raised(context: &mut Context) -> Result<(), Failure> {
    const TEXT: &[u8] = &[7; 12_000];
    unshare(CloneFlags::CLONE_NEWIPC)?;
    fs::write("/proc/sys/kernel/msgmax", "16000")?;
    fs::write("/proc/sys/kernel/msgmnb", "50000")?;
    let queue = sysv::messages(key(22), Some(0o600))?;
    for _ in 0..3 {
        sysv::send(queue, 1, TEXT)?;
    }
    fs::write("/proc/sys/kernel/msgmnb", "20000")?;
    while context.step(PAUSE)? {
        let bytes = if context.progress.plant() { 20_000 } else { 50_000 };
        same("a queue and its limit", sysv::queue_state(queue)?, (3, bytes))?;
        same("the limit", proc_text("/proc/sys/kernel/msgmnb")?.trim(), "20000")?;
        same("a large message", sysv::receive(queue, 1, false)?, (1, TEXT.to_vec()))?;
        sysv::send(queue, 1, TEXT)?;
    }
    Ok(sysv::remove_messages(queue)?)
}

pub(super) fn kept(context: &mut Context) -> Result<(), Failure> {
    let outside = Objects::new(21)?;
    let own = File::open("/proc/self/ns/ipc")?;
    unshare(CloneFlags::CLONE_NEWIPC)?;
    let inside = Objects::new(22)?;
    let other = File::open("/proc/self/ns/ipc")?;
    setns(own.as_fd(), CloneFlags::CLONE_NEWIPC)?;
    while context.step(PAUSE)? {
        outside.check()?;
        setns(other.as_fd(), CloneFlags::CLONE_NEWIPC)?;
        if context.progress.plant() {
            inside.damage()?;
        }
        let checked = inside.check();
        setns(own.as_fd(), CloneFlags::CLONE_NEWIPC)?;
        checked?;
    }
    ensure(outside.mark != inside.mark, || "one namespace".to_owned())?;
    outside.remove()
}
