//! What a thread or a child has for itself alone.

use std::fs;
use std::sync::mpsc::channel;
use std::time::Duration;

use ckpt_engine::sys::program::control::set_thread_user;
use ckpt_engine::sys::program::signal;
use nix::unistd::{chdir, chroot, gettid};

use crate::workload::context::Context;
use crate::workload::keep::keep;
use crate::workload::outcome::{Failure, same};
use crate::workload::process::{Child, proc_text};

/// Lines of what /proc says about a thread.
fn lines(path: &str, keys: &[&str]) -> Result<Vec<String>, Failure> {
    let status = proc_text(path)?;
    let wanted = |line: &&str| keys.iter().any(|key| line.starts_with(key));
    Ok(status.lines().filter(wanted).map(str::to_owned).collect())
}

/// Starts threads that do something to themselves and then wait; gives the paths of their status.
fn threads(
    count: u32,
    begin: impl Fn(u32) -> Result<(), Failure> + Send + Sync + Clone + 'static,
) -> Result<(Vec<std::sync::mpsc::Sender<()>>, Vec<String>), Failure> {
    let (mut ends, mut paths) = (Vec::new(), Vec::new());
    for number in 0..count {
        let (end, ended) = channel::<()>();
        let (told, tid) = channel();
        let begin = begin.clone();
        std::thread::spawn(move || {
            let begun = begin(number).map(|()| gettid());
            // Nobody listens when the workload has failed.
            let _ = told.send(begun);
            let _ = ended.recv();
        });
        let tid = tid.recv().map_err(|_| Failure::new("a thread did not begin"))??;
        paths.push(format!("/proc/self/task/{tid}/status"));
        ends.push(end);
    }
    Ok((ends, paths))
}

/// Threads that each are another user, as servers of files have them.
pub(super) fn users(context: &mut Context) -> Result<(), Failure> {
    let (_ends, paths) = threads(4, |number| {
        Ok(set_thread_user(0, 100 + number, if number % 2 == 0 { 0 } else { 100 })?)
    })?;
    let look = || {
        let all = paths.iter().map(|path| lines(path, &["Uid", "CapEff", "CapPrm"]));
        Ok((all.collect::<Result<Vec<_>, _>>()?, lines("/proc/thread-self/status", &["Uid"])?))
    };
    keep(context, "users of threads", look, || Ok(set_thread_user(0, 55, 0)?))
}

/// Threads that each hold back other signals.
pub(super) fn masks(context: &mut Context) -> Result<(), Failure> {
    let numbers = [10, 12, 34, 50];
    let (_ends, paths) = threads(4, move |number| Ok(signal::block(numbers[number as usize])?))?;
    let look = || {
        let all = paths.iter().map(|path| lines(path, &["SigBlk", "SigPnd"]));
        Ok((all.collect::<Result<Vec<_>, _>>()?, lines("/proc/thread-self/status", &["SigBlk"])?))
    };
    keep(context, "masks of threads", look, || Ok(signal::block(44)?))
}

/// A child in a root of its own.
pub(super) fn jail(context: &mut Context) -> Result<(), Failure> {
    let root = context.path("jail");
    fs::create_dir_all(root.join("inner"))?;
    fs::write(root.join("inner/file"), "in jail")?;
    let progress = context.progress.clone();
    let child = Child::start(context, "prisoner", |stop| {
        chroot(&root)?;
        chdir("/inner")?;
        while !stop.wait(Duration::from_millis(10))? {
            if progress.plant() {
                chdir("/")?;
            }
            same("where a prisoner is", std::env::current_dir()?, "/inner".into())?;
            same("what it reads", fs::read_to_string("/inner/file")?, "in jail".to_owned())?;
            same("its way out", fs::metadata("/usr").is_err(), true)?;
        }
        Ok(())
    })?;
    let (root, outside) = (context.path("jail"), context.path("outside"));
    fs::create_dir(&outside)?;
    fs::write(outside.join("file"), "out of jail")?;
    let visitor = Child::start(context, "visitor", |stop| {
        chdir(&outside)?;
        chroot(&root)?;
        while !stop.wait(Duration::from_millis(10))? {
            same("what a visitor reads", fs::read_to_string("file")?, "out of jail".to_owned())?;
            same("what is in jail", fs::metadata("/inner").is_ok(), true)?;
            same("what is not", fs::metadata("/usr").is_err(), true)?;
        }
        Ok(())
    })?;
    let gone = context.path("gone");
    fs::create_dir(&gone)?;
    let hermit = Child::start(context, "hermit", |stop| {
        chdir(&gone)?;
        fs::remove_dir(&gone)?;
        chroot(".")?;
        while !stop.wait(Duration::from_millis(10))? {
            same("what is in a removed root", fs::read_dir("/")?.count(), 0)?;
            same("what is to be there", fs::create_dir("/new").is_err(), true)?;
        }
        Ok(())
    })?;
    while context.step(Duration::from_millis(20))? {
        child.check()?;
        visitor.check()?;
        hermit.check()?;
    }
    hermit.finish()?;
    visitor.finish()?;
    child.finish()
}
