//! Children of a workload.

use std::fs::{self, File};
use std::io::{ErrorKind, PipeReader, PipeWriter, Write};
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::time::Duration;

use ckpt_engine::sys::program::fork::fork;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::prctl::set_pdeathsig;
use nix::sys::signal::Signal;
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;

use super::context::Context;
use super::outcome::Failure;

/// A small file of `/proc`, read at once: each read(2) of a part may find a text that the kernel
/// has made up anew.
pub fn proc_text(path: impl AsRef<std::path::Path>) -> std::io::Result<String> {
    let mut bytes = vec![0; 64 << 10];
    let count = std::io::Read::read(&mut File::open(path)?, &mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes[..count]).into_owned())
}

/// A child that was forked to check something from another process. It lives until
/// [`finish`](Self::finish), or until its parent does.
#[derive(Debug)]
pub struct Child {
    /// Its pid.
    pub pid: Pid,
    name: &'static str,
    report: PathBuf,
    stop: Option<PipeWriter>,
}

impl Child {
    /// Forks. The body runs until the pipe that it is given says so.
    pub fn start(
        context: &Context,
        name: &'static str,
        body: impl FnOnce(&Stop) -> Result<(), Failure>,
    ) -> Result<Self, Failure> {
        let (read, write) = std::io::pipe()?;
        let report = context.path(&format!("child-{name}"));
        // Opened before the child becomes somebody who may not.
        let mut output = File::create(&report)?;
        let mut ends = Some((read, write));
        let pid = fork(|| {
            let Some((read, write)) = ends.take() else { return 2 };
            drop(write);
            let result = set_pdeathsig(Signal::SIGKILL).map_err(Failure::from);
            match result.and_then(|()| body(&Stop(read))) {
                Ok(()) => 0,
                Err(failure) => {
                    // Without it the parent still sees the exit status.
                    let _ = write!(output, "{failure}");
                    1
                }
            }
        })?;
        let stop = ends.map(|(_, write)| write);
        Ok(Self { pid: Pid::from_raw(pid), name, report, stop })
    }

    /// Fails when the child has ended by itself.
    #[track_caller]
    pub fn check(&self) -> Result<(), Failure> {
        match waitpid(self.pid, Some(WaitPidFlag::WNOHANG))? {
            WaitStatus::StillAlive => Ok(()),
            status => Err(self.failure(status)),
        }
    }

    /// Fails, with what the child said, when it is not in the state that it should be in.
    #[track_caller]
    pub fn expect(&self, found: WaitStatus, wanted: WaitStatus) -> Result<(), Failure> {
        if found == wanted { Ok(()) } else { Err(self.failure(found)) }
    }

    /// Tells the child to stop and waits for it.
    #[track_caller]
    pub fn finish(mut self) -> Result<(), Failure> {
        // A byte and not the end of the pipe: brothers forked later hold its other end, too.
        if let Some(mut stop) = self.stop.take() {
            // One that has been told in another way may have gone already.
            let told = stop.write_all(b"x");
            if let Err(error) = told
                && error.kind() != ErrorKind::BrokenPipe
            {
                return Err(error.into());
            }
        }
        match waitpid(self.pid, None)? {
            WaitStatus::Exited(_, 0) => Ok(()),
            status => Err(self.failure(status)),
        }
    }

    #[track_caller]
    fn failure(&self, status: WaitStatus) -> Failure {
        match fs::read_to_string(&self.report) {
            Ok(report) if !report.is_empty() => {
                Failure::new(format!("child {}: {report}", self.name))
            }
            _ => Failure::new(format!("child {} ended: {status:?}", self.name)),
        }
    }
}

/// A child's view of the pipe that tells it to stop.
#[derive(Debug)]
pub struct Stop(PipeReader);

impl Stop {
    /// One that never tells to stop.
    pub fn never() -> Result<Self, Failure> {
        let (read, write) = std::io::pipe()?;
        // Open for as long as the process lives.
        std::mem::forget(write);
        Ok(Self(read))
    }

    /// Waits a little. True when the child should stop.
    pub fn wait(&self, pause: Duration) -> Result<bool, Failure> {
        let mut fds = [PollFd::new(self.0.as_fd(), PollFlags::POLLIN)];
        let timeout = PollTimeout::try_from(pause + Duration::from_micros(999))
            .map_err(|_| Failure::new("a pause of weeks"))?;
        Ok(poll(&mut fds, timeout)? > 0)
    }
}
