//! Filters on system calls that a program has installed itself.

use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;
use std::time::Duration;

use ckpt_engine::sys::program::control::Switch;
use ckpt_engine::sys::program::filter::{Answer, PlainCall, Scope, plain_call, refuse};
use ckpt_engine::sys::program::signal;
use nix::sys::signal::Signal;
use nix::unistd::{Gid, Uid, setresgid, setresuid};

use crate::workload::context::Context;
use crate::workload::keep::keep;
use crate::workload::outcome::{Failure, ensure, same};
use crate::workload::process::{Child, proc_text};

const SHORT: usize = 4;

fn refuse_with(call: PlainCall, errno: i32) -> Result<(), Failure> {
    let errno = u16::try_from(errno).map_err(|_| Failure::new("no error number"))?;
    Ok(refuse(call.number(), Answer::Error(errno), Scope::Thread, SHORT)?)
}

/// What each of the calls that do nothing gives, and how many filters there are.
fn portrait() -> Result<(Vec<Result<i64, i32>>, String), Failure> {
    let count = status_line("Seccomp_filters")?;
    Ok((PlainCall::ALL.map(plain_call).to_vec(), count))
}

fn status_line(key: &str) -> Result<String, Failure> {
    let status = proc_text("/proc/thread-self/status")?;
    let line = status.lines().find(|line| line.starts_with(key));
    Ok(line.unwrap_or_default().to_owned())
}

/// One filter with an error of its own.
pub(super) fn one(context: &mut Context) -> Result<(), Failure> {
    refuse_with(PlainCall::Getpgrp, libc::EXDEV)?;
    keep(context, "answers of a filter", portrait, || refuse_with(PlainCall::Getpgrp, libc::ENODEV))
}

/// Several filters, one on top of the other: of two answers the newer counts.
pub(super) fn several(context: &mut Context) -> Result<(), Failure> {
    for (call, errno) in PlainCall::ALL.into_iter().zip(20..) {
        refuse_with(call, errno)?;
    }
    refuse_with(PlainCall::Getuid, 33)?;
    same("answer of the newer filter", plain_call(PlainCall::Getuid), Err(33))?;
    keep(context, "answers of filters", portrait, || refuse_with(PlainCall::Getuid, 34))
}

/// A filter as long as the kernel takes them, and one that logs.
pub(super) fn long(context: &mut Context) -> Result<(), Failure> {
    refuse(PlainCall::Getgid.number(), Answer::Error(40), Scope::Thread, 4096)?;
    refuse(PlainCall::Getegid.number(), Answer::Error(41), Scope::Logged, 100)?;
    keep(context, "answers of long filters", portrait, || refuse_with(PlainCall::Getgid, 42))
}

/// A service: a user without privileges who has installed its filter by "no new privileges".
pub(super) fn unprivileged(context: &mut Context) -> Result<(), Failure> {
    setresgid(Gid::from_raw(33), Gid::from_raw(33), Gid::from_raw(33))?;
    setresuid(Uid::from_raw(33), Uid::from_raw(33), Uid::from_raw(33))?;
    Switch::Dumpable.set(1)?;
    Switch::NoNewPrivileges.set(1)?;
    refuse_with(PlainCall::Getpgrp, libc::EACCES)?;
    let look = || Ok((portrait()?, status_line("Seccomp:")?, status_line("NoNewPrivs")?));
    keep(context, "a filtered service", look, || refuse_with(PlainCall::Getpgrp, libc::ENODEV))
}

/// Filters inherited over several generations, each with one more.
pub(super) fn inherited(context: &mut Context) -> Result<(), Failure> {
    refuse_with(PlainCall::Getuid, 50)?;
    let progress = context.progress.clone();
    let child = Child::start(context, "heir", |stop| {
        refuse_with(PlainCall::Geteuid, 51)?;
        let before = portrait()?;
        while !stop.wait(Duration::from_millis(10))? {
            if progress.plant() {
                refuse_with(PlainCall::Geteuid, 52)?;
            }
            same("answers in a child", portrait()?, before.clone())?;
        }
        Ok(())
    })?;
    let before = portrait()?;
    while context.step(Duration::from_millis(20))? {
        child.check()?;
        same("answers in the parent", portrait()?, before.clone())?;
        same("the child's filter", plain_call(PlainCall::Geteuid).is_ok(), true)?;
    }
    child.finish()
}

/// A filter that answers with a signal.
pub(super) fn trap(context: &mut Context) -> Result<(), Failure> {
    context.has_handlers = true;
    signal::count(Signal::SIGSYS as i32, 0)?;
    refuse(PlainCall::Getegid.number(), Answer::Trap, Scope::Thread, SHORT)?;
    let mut caught = signal::counted(Signal::SIGSYS as i32);
    while context.step(Duration::from_millis(20))? {
        if context.progress.plant() {
            refuse(PlainCall::Getegid.number(), Answer::Trap, Scope::Thread, SHORT)?;
            signal::count(Signal::SIGSYS as i32, libc::SA_RESETHAND)?;
            caught += 1;
        }
        // What it returns is the kernel's business.
        let _ = plain_call(PlainCall::Getegid);
        caught += 1;
        same("signals of a filter", signal::counted(Signal::SIGSYS as i32), caught)?;
    }
    Ok(())
}

/// A thread that does what it is told, one thing after the other.
struct Worker {
    orders: Sender<Order>,
    answers: Receiver<Result<(), Failure>>,
    thread: JoinHandle<()>,
}

type Order = Box<dyn FnOnce() -> Result<(), Failure> + Send>;

impl Worker {
    fn start() -> Self {
        let (orders, inbox) = channel::<Order>();
        let (outbox, answers) = channel();
        let thread = std::thread::spawn(move || {
            while let Ok(order) = inbox.recv() {
                if outbox.send(order()).is_err() {
                    return;
                }
            }
        });
        Self { orders, answers, thread }
    }

    fn run(
        &self,
        order: impl FnOnce() -> Result<(), Failure> + Send + 'static,
    ) -> Result<(), Failure> {
        let gone = |_| Failure::new("a thread is gone");
        self.orders.send(Box::new(order)).map_err(|_| Failure::new("a thread is gone"))?;
        self.answers.recv().map_err(gone)?
    }

    fn end(self) -> Result<(), Failure> {
        drop(self.orders);
        self.thread.join().map_err(|_| Failure::new("a thread panicked"))
    }
}

/// Threads that each have filters of their own on top of a common one, and one with none.
pub(super) fn threads(context: &mut Context) -> Result<(), Failure> {
    let plain = Worker::start();
    refuse_with(PlainCall::Getpgrp, 60)?;
    let workers = [Worker::start(), Worker::start(), Worker::start()];
    for (worker, errno) in workers.iter().zip(61..) {
        worker.run(move || refuse_with(PlainCall::Getegid, errno))?;
    }
    while context.step(Duration::from_millis(20))? {
        same("common filter", plain_call(PlainCall::Getpgrp), Err(60))?;
        same("other calls", plain_call(PlainCall::Getegid).is_ok(), true)?;
        plain.run(|| {
            let open = PlainCall::ALL.iter().all(|call| plain_call(*call).is_ok());
            ensure(open, || "a filter is on a thread that has none".to_owned())
        })?;
        let planted = context.progress.plant();
        for (worker, errno) in workers.iter().zip(61..) {
            worker.run(move || {
                if planted {
                    refuse_with(PlainCall::Getegid, 70)?;
                }
                same("common filter in a thread", plain_call(PlainCall::Getpgrp), Err(60))?;
                same("a thread's own filter", plain_call(PlainCall::Getegid), Err(errno))
            })?;
        }
    }
    plain.end()?;
    workers.into_iter().try_for_each(Worker::end)
}

/// Filters put on all threads at once, again and again: the kernel does so only while all have
/// the very same filters so far.
pub(super) fn together(context: &mut Context) -> Result<(), Failure> {
    const MOST: i32 = 300;
    let errno = |turn: i32| u16::try_from(70 + turn % 50).unwrap_or(70);
    let put = move |turn| {
        refuse(PlainCall::Getpgrp.number(), Answer::Error(errno(turn)), Scope::Process, SHORT)
    };
    let worker = Worker::start();
    put(0)?;
    let other = Worker::start();
    let mut turn = 0;
    let mut steps = 0u32;
    while context.step(Duration::from_millis(20))? {
        steps += 1;
        if steps.is_multiple_of(20) && turn < MOST {
            turn += 1;
            put(turn)?;
        }
        if context.progress.plant() {
            worker.run(|| refuse_with(PlainCall::Getpgrp, 9))?;
        }
        let wanted = Err(i32::from(errno(turn)));
        same("the answer to the first thread", plain_call(PlainCall::Getpgrp), wanted)?;
        for worker in [&worker, &other] {
            worker.run(move || {
                same("the answer to another thread", plain_call(PlainCall::Getpgrp), wanted)
            })?;
        }
    }
    worker.end()?;
    other.end()
}

/// Filters that a program has from the one that started it, across execve(2).
pub(super) fn executed(context: &mut Context) -> Result<(), Failure> {
    refuse_with(PlainCall::Getppid, 80)?;
    let mut shell = std::process::Command::new("/bin/cat")
        .stdin(std::process::Stdio::piped())
        .stdout(std::process::Stdio::null())
        .spawn()?;
    let pid = shell.id();
    let look = || {
        let status = proc_text(format!("/proc/{pid}/status"))?;
        let filters = status.lines().find(|line| line.starts_with("Seccomp_filters"));
        // A dead program has no memory.
        Ok((filters.unwrap_or_default().to_owned(), status.contains("VmRSS")))
    };
    let look = &look;
    let kept = keep(context, "filters of a program, and whether it lives", look, || {
        let pid = nix::unistd::Pid::from_raw(i32::try_from(pid).unwrap_or(0));
        nix::sys::signal::kill(pid, Signal::SIGKILL)?;
        // Until it is dead.
        while look()?.1 {
            std::thread::yield_now();
        }
        Ok(())
    });
    drop(shell.stdin.take());
    let status = shell.wait()?;
    kept?;
    same("end of the program", status.code(), Some(0))
}
