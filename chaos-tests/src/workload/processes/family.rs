//! Families: sessions, groups, orphans, children that come and go, and one that is dead but not
//! yet mourned.

use std::fs;
use std::process::Command;
use std::time::Duration;

use ckpt_engine::sys::program::fork::fork;
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::{Pid, getpgid, getpid, getppid, getsid, setpgid, setsid};

use crate::workload::context::{Context, stdin_ended};
use crate::workload::outcome::{Failure, ensure, same};
use crate::workload::process::Child;

pub(super) fn run(context: &mut Context) -> Result<(), Failure> {
    let zombie = Pid::from_raw(fork(|| 42)?);
    let orphan = Orphan::start(context)?;
    let leader = Child::start(context, "leader", |stop| {
        setsid()?;
        let member = Pid::from_raw(fork(|| member_of(getppid()))?);
        while !stop.wait(Duration::from_millis(20))? {
            same("session of a leader", getsid(None)?, getpid())?;
            let state = waitpid(member, Some(WaitPidFlag::WNOHANG))?;
            same("a member of the session", state, WaitStatus::StillAlive)?;
        }
        kill(member, Signal::SIGKILL)?;
        waitpid(member, None)?;
        Ok(())
    })?;
    let parent = getppid();
    let mut turn = 0;
    while context.step(Duration::from_millis(10))? {
        turn += 1;
        same("parent", getppid(), parent)?;
        same("state of a dead child", state_of(zombie)?, 'Z')?;
        leader.check()?;
        orphan.check(context)?;
        churn(turn)?;
        if context.progress.plant() {
            waitpid(zombie, None)?;
        }
    }
    same("end of the dead child", waitpid(zombie, None)?, WaitStatus::Exited(zombie, 42))?;
    leader.finish()
}

/// A child that is stopped stays stopped, and goes on when told to.
pub(super) fn stopped(context: &mut Context) -> Result<(), Failure> {
    let child = Child::start(context, "stopped", |stop| {
        while !stop.wait(Duration::from_millis(5))? {}
        Ok(())
    })?;
    while context.step(Duration::from_millis(10))? {
        kill(child.pid, Signal::SIGSTOP)?;
        let status = waitpid(child.pid, Some(WaitPidFlag::WUNTRACED))?;
        child.expect(status, WaitStatus::Stopped(child.pid, Signal::SIGSTOP))?;
        for _ in 0..50 {
            if context.progress.plant() {
                kill(child.pid, Signal::SIGCONT)?;
                waitpid(child.pid, Some(WaitPidFlag::WCONTINUED))?;
            }
            same("state of a stopped child", state_of(child.pid)?, 'T')?;
            if !context.step(Duration::from_millis(10))? {
                break;
            }
        }
        kill(child.pid, Signal::SIGCONT)?;
        let status = waitpid(child.pid, Some(WaitPidFlag::WCONTINUED))?;
        child.expect(status, WaitStatus::Continued(child.pid))?;
    }
    child.finish()
}

/// The state letter of a process.
fn state_of(pid: Pid) -> Result<char, Failure> {
    let stat = crate::workload::process::proc_text(format!("/proc/{pid}/stat"))?;
    let state = stat.rsplit_once(") ").and_then(|(_, rest)| rest.chars().next());
    state.ok_or_else(|| Failure::new(format!("the state of {pid} is {stat:?}")))
}

/// A process in a group of its own within the session of its parent.
fn member_of(leader: Pid) -> i32 {
    let check = || -> Result<(), Failure> {
        setpgid(Pid::from_raw(0), Pid::from_raw(0))?;
        loop {
            same("session of a member", getsid(None)?, leader)?;
            same("group of a member", getpgid(None)?, getpid())?;
            same("parent of a member", getppid(), leader)?;
            std::thread::sleep(Duration::from_millis(20));
        }
    };
    i32::from(check().is_err())
}

/// A daemon in the old style: the leader of its session is dead, its parent is init or another
/// reaper. It tells of itself through a file and ends when the workload's input ends.
struct Orphan {
    pid: Pid,
    session: Pid,
}

impl Orphan {
    fn start(context: &Context) -> Result<Self, Failure> {
        let report = context.path("orphan");
        let leader = Pid::from_raw(fork(|| {
            if setsid().is_err() {
                return 1;
            }
            let session = getpid();
            match fork(|| orphan_life(session, &report)) {
                Ok(pid) => i32::from(fs::write(&report, format!("{pid} 0\n")).is_err()),
                Err(_) => 2,
            }
        })?);
        same("end of a leader", waitpid(leader, None)?, WaitStatus::Exited(leader, 0))?;
        let text = fs::read_to_string(context.path("orphan"))?;
        let pid = text.split(' ').next().and_then(|pid| pid.parse().ok());
        let pid = pid.ok_or_else(|| Failure::new(format!("the orphan wrote {text:?}")))?;
        Ok(Self { pid: Pid::from_raw(pid), session: leader })
    }

    fn check(&self, context: &Context) -> Result<(), Failure> {
        same("session of an orphan", getsid(Some(self.pid))?, self.session)?;
        let failure = fs::read_to_string(context.path("orphan-failure")).ok();
        ensure(failure.is_none(), || failure.clone().unwrap_or_default())
    }
}

fn orphan_life(session: Pid, report: &std::path::Path) -> i32 {
    let live = || -> Result<(), Failure> {
        while !stdin_ended(Duration::from_millis(50))? {
            same("session of an orphan", getsid(None)?, session)?;
            same("group of an orphan", getpgid(None)?, session)?;
            if getppid() != session {
                let state = fs::metadata(format!("/proc/{session}"));
                ensure(state.is_err(), || "its dead leader lives".to_owned())?;
            }
        }
        Ok(())
    };
    match live() {
        Ok(()) => 0,
        Err(failure) => {
            let _ = fs::write(report.with_file_name("orphan-failure"), failure.to_string());
            1
        }
    }
}

/// Children that come and go, by fork alone and with another program.
fn churn(turn: u32) -> Result<(), Failure> {
    let code = i32::try_from(turn % 100).unwrap_or(0);
    let child = Pid::from_raw(fork(|| code)?);
    same("end of a child", waitpid(child, None)?, WaitStatus::Exited(child, code))?;
    if turn.is_multiple_of(10) {
        let status = Command::new("/bin/sh").args(["-c", "sleep 0.05; exit 3"]).status()?;
        same("end of a shell", status.code(), Some(3))?;
    }
    Ok(())
}
