//! CRIU, where the machine has one that works: dump and restore of the same memory.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use crate::arguments::Common;
use crate::show::outcome::Outcome;
use crate::show::table::{Table, digits};
use crate::stage::{Stage, StageError, system};

/// What one dump and restore came to.
#[derive(Clone, Copy, Debug)]
pub struct DumpedAndRestored {
    /// From the freeze until all is written.
    pub dump_s: f64,
    /// Until it runs again.
    pub restore_s: f64,
    /// What lies on the disk between them.
    pub bytes: u64,
}

/// Whether there is one that says that it can work on this kernel.
pub fn is_here() -> bool {
    let check =
        Command::new("criu").arg("check").stdout(Stdio::null()).stderr(Stdio::null()).status();
    check.is_ok_and(|status| status.success())
}

/// Dumps a program with so many MiB into a folder and restores it.
pub fn dump_and_restore(
    program: &Path,
    mib: usize,
    folder: &Path,
) -> Result<DumpedAndRestored, StageError> {
    let mut child = Command::new("setsid")
        .arg(program)
        .args(["ballast", "--port", "0", "--random-mib", &mib.to_string()])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .map_err(system("start a program to dump"))?;
    // Until all pages are there.
    let pid = i32::try_from(child.id()).expect("a process number fits");
    let deadline = Instant::now() + Duration::from_secs(30);
    while resident_kib(pid) < (mib as u64) << 10 && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(50));
    }
    let images = folder.join("images");
    fs::create_dir_all(&images).map_err(system("make a folder"))?;
    let (at, tree) = (images.display().to_string(), pid.to_string());
    let begun = Instant::now();
    criu(&["dump", "-D", &at, "-t", &tree, "--tcp-established"])?;
    let dump_s = begun.elapsed().as_secs_f64();
    let _ = child.wait();
    let begun = Instant::now();
    criu(&["restore", "-D", &at, "-d", "--tcp-established"])?;
    let restore_s = begun.elapsed().as_secs_f64();
    // The same number, and it is ours to end.
    let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::SIGKILL);
    let entries = fs::read_dir(&images).map_err(system("list images"))?;
    let bytes = entries.flatten().filter_map(|entry| Some(entry.metadata().ok()?.len())).sum();
    Ok(DumpedAndRestored { dump_s, restore_s, bytes })
}

/// The same as a peer of a move, told in the outcome.
pub fn compare(stage: &Stage, common: &Common, outcome: &mut Outcome) -> Result<(), StageError> {
    if !is_here() {
        outcome.notes.push("no working criu on this machine: not compared".to_owned());
        return Ok(());
    }
    let folder = tempfile::tempdir_in("/dev/shm").map_err(system("make a folder in memory"))?;
    let mib = common.pick(1024, 256);
    let done = dump_and_restore(&stage.part, mib, folder.path())?;
    let mut table = Table::new("CRIU, into memory and back", &["MiB", "dump s", "restore s"]);
    table.row([mib.to_string(), digits(done.dump_s), digits(done.restore_s)]);
    outcome.less("criu dump + restore", "ms", &[(done.dump_s + done.restore_s) * 1e3]);
    outcome.tables.push(table);
    Ok(())
}

fn criu(arguments: &[&str]) -> Result<(), StageError> {
    let output = Command::new("criu").args(arguments).output().map_err(system("run criu"))?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
    Err(StageError::Said { program: "criu".to_owned(), said })
}

fn resident_kib(pid: i32) -> u64 {
    let text = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    line.and_then(|line| line.trim().trim_end_matches(" kB").parse().ok()).unwrap_or(0)
}
