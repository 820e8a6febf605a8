//! Tables that processes have in common although they are no threads, and threads that have their
//! own.

use std::env;
use std::fs::{self, File};
use std::os::fd::IntoRawFd;
use std::sync::atomic::Ordering;
use std::sync::mpsc::channel;
use std::time::Duration;

use ckpt_engine::sys::program::fork::fork_sharing;
use ckpt_engine::sys::program::map::{Backing, Map};
use nix::sched::{CloneFlags, unshare};
use nix::sys::prctl::set_pdeathsig;
use nix::sys::signal::{Signal, kill};
use nix::sys::stat::{Mode, umask};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::{Pid, chdir, gettid};

use crate::workload::context::Context;
use crate::workload::keep::keep;
use crate::workload::outcome::{Failure, ensure, same};
use crate::workload::process::proc_text;

/// A child that takes turns with its parent: it acts on each new number in the first word of the
/// map, and puts its answer into the second and the number into the third.
struct Partner {
    pid: Pid,
    map: Map,
}

const FAILED: u64 = u64::MAX;

impl Partner {
    fn start(tables: i32, act: impl Fn(u64) -> Result<u64, Failure>) -> Result<Self, Failure> {
        let map = Map::new(1, Backing::Shared)?;
        let pid = fork_sharing(tables, || {
            if set_pdeathsig(Signal::SIGKILL).is_err() {
                return 2;
            }
            let mut turn = 0;
            loop {
                std::thread::sleep(Duration::from_millis(1));
                let next = map.word(0).load(Ordering::SeqCst);
                if next != turn {
                    turn = next;
                    map.word(1).store(act(turn).unwrap_or(FAILED), Ordering::SeqCst);
                    map.word(2).store(turn, Ordering::SeqCst);
                }
            }
        })?;
        Ok(Self { pid: Pid::from_raw(pid), map })
    }

    /// The answer to the next number; none if it takes longer than a moment.
    fn ask(&self, context: &mut Context, turn: u64) -> Result<Option<u64>, Failure> {
        self.map.word(0).store(turn, Ordering::SeqCst);
        while context.step(Duration::from_millis(1))? {
            let status = waitpid(self.pid, Some(WaitPidFlag::WNOHANG))?;
            same("the other process", status, WaitStatus::StillAlive)?;
            if self.map.word(2).load(Ordering::SeqCst) == turn {
                let answer = self.map.word(1).load(Ordering::SeqCst);
                ensure(answer != FAILED, || "the other process could not".to_owned())?;
                return Ok(Some(answer));
            }
        }
        Ok(None)
    }
}

impl Drop for Partner {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = kill(self.pid, Signal::SIGKILL);
        let _ = waitpid(self.pid, None);
    }
}

fn is_open(fd: u64) -> bool {
    fs::symlink_metadata(format!("/proc/self/fd/{fd}")).is_ok()
}

/// What one process opens the other one has open, and closes.
pub(super) fn descriptors(context: &mut Context) -> Result<(), Failure> {
    let path = context.path("common");
    fs::write(&path, "common")?;
    let partner = Partner::start(libc::CLONE_FILES, |_| {
        let file = File::open(&path)?;
        Ok(file.into_raw_fd().unsigned_abs().into())
    })?;
    let mut turn = 0;
    loop {
        turn += 1;
        let Some(fd) = partner.ask(context, turn)? else { return Ok(()) };
        let wrong = u64::from(context.progress.plant()) * 1000;
        ensure(is_open(fd + wrong), || format!("descriptor {fd} of the other is not ours"))?;
        let there = fs::read_to_string(format!("/proc/{}/fd/{fd}", partner.pid))?;
        same("what the other has open", there, "common".to_owned())?;
        nix::unistd::close(i32::try_from(fd).map_err(|_| Failure::new("a strange number"))?)?;
        let gone = fs::symlink_metadata(format!("/proc/{}/fd/{fd}", partner.pid)).is_err();
        ensure(gone, || format!("descriptor {fd} is closed here only"))?;
    }
}

/// Where one process goes, there goes the other.
pub(super) fn directories(context: &mut Context) -> Result<(), Failure> {
    let places = [context.path("a"), context.path("b")];
    places.iter().try_for_each(fs::create_dir)?;
    let partner = Partner::start(libc::CLONE_FS, |turn| {
        chdir(&places[turn as usize % 2])?;
        Ok(umask(Mode::from_bits_truncate(turn as u32 % 64)).bits().into())
    })?;
    let (mut turn, mut mask) = (0, 0o22);
    umask(Mode::from_bits_truncate(mask));
    loop {
        turn += 1;
        let Some(before) = partner.ask(context, turn)? else { return Ok(()) };
        let planted = u64::from(context.progress.plant());
        same("the mask that the other found", before + planted, mask.into())?;
        mask = turn as u32 % 64;
        let found = umask(Mode::from_bits_truncate(mask)).bits();
        same("the mask that the other left", found, mask)?;
        same(
            "where the other went",
            env::current_dir()?,
            fs::canonicalize(&places[turn as usize % 2])?,
        )?;
    }
}

/// Threads that go where the others do not.
pub(super) fn apart(context: &mut Context) -> Result<(), Failure> {
    let (mut ends, mut paths) = (Vec::new(), Vec::new());
    for number in 0..3u32 {
        let place = context.path(&format!("place-{number}"));
        fs::create_dir(&place)?;
        let (end, ended) = channel::<()>();
        let (told, tid) = channel();
        std::thread::spawn(move || {
            let begin = || -> Result<Pid, Failure> {
                if number > 0 {
                    unshare(CloneFlags::CLONE_FS)?;
                    chdir(&place)?;
                    umask(Mode::from_bits_truncate(number * 9));
                }
                // One of them has gone where nobody can follow.
                if number == 2 {
                    fs::remove_dir(&place)?;
                }
                Ok(gettid())
            };
            // Nobody listens when the workload has failed.
            let _ = told.send(begin());
            let _ = ended.recv();
        });
        let tid = tid.recv().map_err(|_| Failure::new("a thread did not begin"))??;
        paths.push(format!("/proc/self/task/{tid}"));
        ends.push(end);
    }
    let look = || -> Result<Vec<(std::path::PathBuf, String)>, Failure> {
        let one = |path: &String| -> Result<_, Failure> {
            let status = proc_text(format!("{path}/status"))?;
            let mask = status.lines().find(|line| line.starts_with("Umask")).unwrap_or("");
            Ok((fs::read_link(format!("{path}/cwd"))?, mask.to_owned()))
        };
        paths.iter().map(one).collect()
    };
    keep(context, "where threads are", look, || Ok(chdir("/")?))
}
