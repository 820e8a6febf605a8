//! A `loadclient` on another host, driven line by line.

use std::io::{self, BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, ChildStdout, Command, ExitStatus, Stdio};

use serde::Deserialize;
use serde_json::Value;

use super::report::Report;

/// Why a client gave no report.
#[derive(Debug, thiserror::Error)]
pub enum RemoteError {
    /// It could not be started or spoken to.
    #[error("cannot talk to the client")]
    Pipe(#[source] io::Error),
    /// It has ended.
    #[error("the client has ended")]
    Ended,
    /// What it said is no answer to the question.
    #[error("the client said {said:?}")]
    Answer {
        /// Its words.
        said: String,
        /// Why they are no answer.
        #[source]
        source: serde_json::Error,
    },
}

/// A running client. It is killed when this is dropped.
#[derive(Debug)]
pub struct RemoteLoad {
    child: Child,
    input: Option<ChildStdin>,
    output: BufReader<ChildStdout>,
}

/// What a check of the whole dataset found.
#[derive(Clone, Copy, Debug, Deserialize)]
pub struct Verified {
    /// Keys read.
    pub verified_keys: u64,
    /// Keys whose value was wrong.
    pub wrong: u64,
}

impl RemoteLoad {
    /// Prepares the command for control by pipes. Its standard error stays where it is.
    pub fn prepare(command: &mut Command) {
        command.arg("--control").stdin(Stdio::piped()).stdout(Stdio::piped());
    }

    /// Takes over a client that was started from a prepared command.
    pub fn new(mut child: Child) -> Result<Self, RemoteError> {
        let (input, output) = (child.stdin.take(), child.stdout.take());
        let output = BufReader::new(output.ok_or(RemoteError::Ended)?);
        Ok(Self { child, input, output })
    }

    /// Ends a stretch of time and returns the report on it.
    pub fn mark(&mut self, name: &str) -> Result<Report, RemoteError> {
        self.ask(&format!("mark {name}"))
    }

    /// The report on everything so far.
    pub fn report(&mut self) -> Result<Report, RemoteError> {
        self.ask("report")
    }

    /// Reads the whole dataset.
    pub fn verify(&mut self) -> Result<Verified, RemoteError> {
        self.ask("verify")
    }

    /// Ends the run: the last report, and the client's own opinion as its exit status.
    pub fn stop(mut self) -> Result<(Report, ExitStatus), RemoteError> {
        let report = self.ask("stop")?;
        drop(self.input.take());
        let status = self.child.wait().map_err(RemoteError::Pipe)?;
        Ok((report, status))
    }

    fn ask<T: for<'a> Deserialize<'a>>(&mut self, question: &str) -> Result<T, RemoteError> {
        let input = self.input.as_mut().ok_or(RemoteError::Ended)?;
        writeln!(input, "{question}").map_err(RemoteError::Pipe)?;
        let mut line = String::new();
        if self.output.read_line(&mut line).map_err(RemoteError::Pipe)? == 0 {
            return Err(RemoteError::Ended);
        }
        let answer = serde_json::from_str::<Value>(&line).and_then(serde_json::from_value);
        answer.map_err(|source| RemoteError::Answer { said: line.trim().to_owned(), source })
    }
}

impl Drop for RemoteLoad {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
