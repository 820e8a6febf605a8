//! Running programs in VEs.

use std::{
    fs::File,
    os::fd::{AsFd, OwnedFd},
    sync::Arc,
};

use ckpt_engine::container::{Entered, Entry, Program, enter, open_terminal, reap};
use nix::{
    sys::{
        signal::{Signal, killpg},
        wait::WaitStatus,
    },
    unistd::Pid,
};
use serde::{Deserialize, Serialize};
use tokio::task::spawn_blocking;

use super::{Running, Runtime, Ve, VeError, runtime::process_end, start::PATH};
use crate::api::Sink;

/// What to run.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Exec {
    /// The program and its arguments.
    pub arguments: Vec<String>,
    /// The kind of the user's terminal, for a program that is to have one.
    pub terminal: Option<String>,
}

/// The standard streams of a program.
#[derive(Debug)]
pub enum Streams {
    /// Given by the caller: input, output, errors.
    Given([OwnedFd; 3]),
    /// A new terminal of the VE, whose master goes to the caller.
    Terminal,
}

impl Runtime {
    /// Runs a program in a VE, to its end. Returns its exit status as a shell counts it. If the
    /// caller goes away, the program and its children get a SIGHUP.
    pub async fn exec(
        self: &Arc<Self>,
        ve: &Arc<Ve>,
        exec: Exec,
        streams: Streams,
        sink: &Sink,
    ) -> Result<i32, VeError> {
        let running = ve.must_run()?;
        let id_base = ve.place().id_base(self.config.ids.base);
        let events = sink.clone();
        let entered = spawn_blocking(move || -> Result<Entered, VeError> {
            let terminal = matches!(streams, Streams::Terminal);
            let streams = match streams {
                Streams::Given(streams) => streams,
                Streams::Terminal => {
                    let (master, peer) = open_terminal(running.init, id_base)?;
                    events.terminal(master);
                    let copy = || peer.try_clone().map_err(VeError::file("copy", "a terminal"));
                    [copy()?, copy()?, copy()?]
                }
            };
            let cgroups = running.cgroups.beside(running.init);
            let entry = Entry { init: running.pidfd.as_fd(), cgroups: &cgroups };
            let kind = exec.terminal.unwrap_or_else(|| "dumb".to_owned());
            let environment =
                [("PATH", PATH), ("HOME", "/root"), ("USER", "root"), ("TERM", &kind)];
            let program = Program {
                arguments: exec.arguments,
                environment: environment.map(|(key, value)| (key.into(), value.into())).into(),
                directory: "/root".into(),
                terminal,
            };
            let streams = [streams[0].as_fd(), streams[1].as_fd(), streams[2].as_fd()];
            match enter(&entry, &program, streams, Self::seed()) {
                // A VE without that directory.
                Err(_) if program.directory != "/" && !running.has("/root") => {
                    let program = Program { directory: "/".into(), ..program };
                    Ok(enter(&entry, &program, streams, Self::seed())?)
                }
                other => Ok(other?),
            }
        })
        .await??;
        let watch = |source| VeError::file("watch", "a process")(source);
        let Entered { pid, pidfd } = entered;
        let pidfd = Arc::new(pidfd);
        tokio::select! {
            ended = process_end(pidfd.clone()) => ended.map_err(watch)?,
            () = sink.closed() => {
                // The leader of its session and process group; not reaped yet, so the number is
                // still its own.
                let _ = killpg(Pid::from_raw(pid), Signal::SIGHUP);
                process_end(pidfd.clone()).await.map_err(watch)?;
            }
        }
        Ok(match reap(pidfd.as_fd()) {
            Some(WaitStatus::Exited(_, code)) => code,
            Some(WaitStatus::Signaled(_, signal, _)) => 128 + signal as i32,
            _ => 255,
        })
    }
}

/// Runs a program of ours in a VE, which sees and says nothing. Returns whether it succeeded.
pub(super) async fn run_quietly(running: Running, words: &[&str]) -> Result<bool, VeError> {
    let arguments: Vec<String> = words.iter().map(|word| (*word).to_owned()).collect();
    spawn_blocking(move || {
        let null = File::options().read(true).write(true).open("/dev/null");
        let null = null.map_err(VeError::file("open", "/dev/null"))?;
        let cgroups = running.cgroups.beside(running.init);
        let entry = Entry { init: running.pidfd.as_fd(), cgroups: &cgroups };
        let environment = vec![("PATH".into(), PATH.into())];
        let directory = "/".into();
        let program = Program { arguments, environment, directory, terminal: false };
        let streams = [null.as_fd(), null.as_fd(), null.as_fd()];
        let entered = enter(&entry, &program, streams, Runtime::seed())?;
        Ok(matches!(reap(entered.pidfd.as_fd()), Some(WaitStatus::Exited(_, 0))))
    })
    .await?
}
