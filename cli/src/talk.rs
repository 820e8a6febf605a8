//! What the programs share: parsing as OpenVZ's scripts expect, asking the daemon, and telling
//! the user.

use std::{
    ffi::OsString,
    io::{IsTerminal, Write},
    path::{Path, PathBuf},
    process::ExitCode,
};

use clap::{Args, Parser};
use indicatif::{ProgressBar, ProgressStyle};
use nix::sys::signal::{SigSet, Signal};
use node::api::{Client, Event, Failure, Progress, Request};
use serde::de::DeserializeOwned;

/// The exit status for an option that does not exist or lacks its value.
pub(crate) const BAD_OPTION: u8 = 20;

/// Options of every program.
#[derive(Clone, Debug, Args)]
pub(crate) struct Common {
    /// The daemon's socket.
    #[arg(long, global = true, value_name = "PATH", env = "VZD_SOCKET", hide_env_values = true)]
    pub(crate) socket: Option<PathBuf>,
}

impl Common {
    /// Asks the daemon, showing what happens meanwhile on standard error.
    pub(crate) fn call<T: DeserializeOwned>(&self, request: &Request) -> Result<T, Failure> {
        let mut bar = Bar::default();
        self.connect()?.call(request, &[], &mut |event, _| bar.show(event))
    }

    /// Connects to the daemon.
    pub(crate) fn connect(&self) -> Result<Client, Failure> {
        let path = self.socket.clone().unwrap_or_else(Client::default_socket);
        Client::connect(Path::new(&path))
    }
}

/// Parses the arguments. A mistake is told as clap does, with OpenVZ's exit status.
pub(crate) fn parse<T: Parser>(arguments: Vec<OsString>) -> Result<T, ExitCode> {
    T::try_parse_from(arguments).map_err(|problem| {
        let told = problem.print();
        if problem.use_stderr() || told.is_err() {
            ExitCode::from(BAD_OPTION)
        } else {
            ExitCode::SUCCESS
        }
    })
}

/// Bytes per second; `None` for no limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Rate(pub(crate) Option<u64>);

/// Reads a rate such as `50M`, with vzctl's suffixes.
pub(crate) fn rate(text: &str) -> Result<Rate, String> {
    if text == "unlimited" {
        return Ok(Rate(None));
    }
    let bad = || format!("{text} is no rate; try 50M, 1G (bytes per second) or unlimited");
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let number: u64 = digits.parse().map_err(|_| bad())?;
    let factor = match text[digits.len()..].to_ascii_uppercase().as_str() {
        "" | "B" => 1,
        "K" => 1 << 10,
        "M" => 1 << 20,
        "G" => 1 << 30,
        _ => return Err(bad()),
    };
    let rate = number.checked_mul(factor).filter(|&rate| rate > 0).ok_or_else(bad)?;
    Ok(Rate(Some(rate)))
}

/// Ends a program: prints the failure, if it is one, and chooses the exit status.
pub(crate) fn end(outcome: Result<u8, Failure>) -> ExitCode {
    match outcome {
        Ok(code) => ExitCode::from(code),
        Err(failure) => {
            eprintln!("{}", failure.message);
            if let Some(hint) = &failure.hint {
                eprintln!("hint: {hint}");
            }
            ExitCode::from(u8::try_from(failure.exit).unwrap_or(3))
        }
    }
}

/// Ctrl-C asks the daemon to give up; how that ended is waited for and told.
pub(crate) fn cancel_on_interrupt(client: &Client) -> Result<(), Failure> {
    let failed = |problem: std::io::Error| {
        Failure::new("system", 2, format!("cannot wait for signals: {problem}"))
    };
    let canceller = client.canceller().map_err(failed)?;
    let mut signals = SigSet::empty();
    signals.add(Signal::SIGINT);
    signals.add(Signal::SIGTERM);
    signals.thread_block().map_err(|errno| failed(errno.into()))?;
    std::thread::spawn(move || {
        if signals.wait().is_ok() {
            eprintln!("giving up …");
            // A daemon that has gone away has given up already.
            let _ = canceller.cancel();
        }
    });
    Ok(())
}

/// Prints a line of data. A reader that has gone away is not an error.
pub(crate) fn print(line: &str) {
    let _ = writeln!(std::io::stdout(), "{line}");
}

/// Shows events: a bar on a terminal, plain lines elsewhere.
#[derive(Debug, Default)]
pub(crate) struct Bar {
    bar: Option<(String, ProgressBar)>,
}

impl Bar {
    /// Shows one event.
    pub(crate) fn show(&mut self, event: Event) {
        match event {
            Event::Progress(progress) => self.progress(&progress),
            Event::Log(line) => match &self.bar {
                Some((_, bar)) => bar.suspend(|| eprintln!("{line}")),
                None => eprintln!("{line}"),
            },
            Event::Terminal | Event::Result(_) | Event::Error(_) => (),
        }
    }

    fn progress(&mut self, progress: &Progress) {
        if !std::io::stderr().is_terminal() {
            return;
        }
        if self.bar.as_ref().is_none_or(|(step, _)| *step != progress.step) {
            self.finish();
            let bar = ProgressBar::new(0);
            let form = match (progress.total, progress.unit.as_str()) {
                (Some(_), "bytes") => {
                    "{msg} [{bar:30}] {bytes}/{total_bytes} {binary_bytes_per_sec}"
                }
                (Some(_), _) => "{msg} [{bar:30}] {pos}/{len}",
                (None, "bytes") => "{msg} {spinner} {bytes} {binary_bytes_per_sec}",
                (None, _) => "{msg} {spinner} {pos}",
            };
            bar.set_style(ProgressStyle::with_template(form).expect("the templates are right"));
            bar.set_message(progress.step.clone());
            self.bar = Some((progress.step.clone(), bar));
        }
        if let Some((_, bar)) = &self.bar {
            if let Some(total) = progress.total {
                bar.set_length(total);
            }
            bar.set_position(progress.done);
        }
    }

    fn finish(&mut self) {
        if let Some((_, bar)) = self.bar.take() {
            bar.finish_and_clear();
        }
    }
}

impl Drop for Bar {
    fn drop(&mut self) {
        self.finish();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_have_the_suffixes_of_vzctl() {
        let read = |text| rate(text).ok().map(|rate| rate.0);
        assert_eq!(read("1000"), Some(Some(1000)));
        assert_eq!(read("50M"), Some(Some(50 << 20)));
        assert_eq!(read("2g"), Some(Some(2 << 30)));
        assert_eq!(read("unlimited"), Some(None));
        for bad in ["", "0", "M", "5T5", "-1", "99999999999999999999", "9999999999999999G"] {
            assert_eq!(read(bad), None, "{bad}");
        }
    }
}
