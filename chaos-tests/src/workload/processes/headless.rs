//! A process whose first thread has ended while others go on.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering::SeqCst;
use std::time::Duration;

use ckpt_engine::sys::program::fork::end_thread;
use ckpt_engine::sys::program::map::{Backing, Map};
use nix::sys::signal::kill;
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{getpid, gettid};

use crate::workload::context::Context;
use crate::workload::outcome::{Failure, ensure, same};
use crate::workload::process::{Child, proc_text};

/// With what its threads end, and so the process.
const CODE: i32 = 7;
/// The threads that go on count here.
const COUNTS: [usize; 2] = [0, 1];
const STOP: usize = 2;
const TEXT: &str = "what only its threads have open";

pub(super) fn run(context: &mut Context) -> Result<(), Failure> {
    let map = Arc::new(Map::new(1, Backing::Shared)?);
    let (path, wrong) = (context.path("file"), context.path("wrong"));
    fs::write(&path, TEXT)?;
    let child = Child::start(context, "headless", |_| {
        let file = Arc::new(File::open(&path)?);
        fs::remove_file(&path)?;
        for place in COUNTS {
            let (map, file, wrong) = (Arc::clone(&map), Arc::clone(&file), wrong.clone());
            let thread = std::thread::Builder::new().name(format!("rest {place}"));
            thread.spawn(move || go_on(&map, place, &file, &wrong))?;
        }
        end_thread(CODE)
    })?;
    let directory = Path::new("/proc").join(child.pid.to_string());
    let mut before = [0; 2];
    while context.step(Duration::from_millis(10))? {
        if let Ok(text) = fs::read_to_string(&wrong) {
            return Err(Failure::new(text));
        }
        if context.progress.plant() {
            map.word(COUNTS[1]).store(0, SeqCst);
        }
        kill(child.pid, None)?;
        let counts = COUNTS.map(|place| map.word(place).load(SeqCst));
        let onward = counts.iter().zip(&before).all(|(now, before)| now >= before);
        ensure(onward, || format!("threads went back from {before:?} to {counts:?}"))?;
        before = counts;
        // Not before both threads are there, and the first is not.
        if counts.iter().all(|&count| count > 5) {
            let status = proc_text(directory.join("status"))?;
            let line = |key: &str| status.lines().find_map(|line| line.strip_prefix(key));
            same("its first thread", line("State:").map(str::trim), Some("Z (zombie)"))?;
            same("its threads", line("Threads:").map(str::trim), Some("3"))?;
            let name = proc_text("/proc/self/comm")?;
            same("its name", proc_text(directory.join("comm"))?, name)?;
        }
    }
    ensure(before.iter().all(|&count| count > 0), || "its threads never counted".to_owned())?;
    map.word(STOP).store(1, SeqCst);
    let ended = waitpid(child.pid, None)?;
    child.expect(ended, WaitStatus::Exited(child.pid, CODE))
}

/// Counts until it is told to end, or something is not as it was.
fn go_on(map: &Map, place: usize, file: &File, wrong: &Path) {
    let (process, thread) = (getpid(), gettid());
    let mut turn = 0;
    let look = |turn: u64| {
        same("its process", getpid(), process)?;
        same("its number", gettid(), thread)?;
        let mut text = [0; TEXT.len()];
        file.read_exact_at(&mut text, 0)?;
        same("an open file", &text[..], TEXT.as_bytes())?;
        ensure(process != thread, || "it has become the first thread".to_owned())?;
        same("its count", map.word(place).swap(turn + 1, SeqCst), turn)
    };
    while map.word(STOP).load(SeqCst) == 0 {
        if let Err(failure) = look(turn) {
            // Who waits for it sees at least that it does not go on.
            let _ = fs::write(wrong, failure.to_string());
            return;
        }
        turn += 1;
        std::thread::sleep(Duration::from_millis(2));
    }
    end_thread(CODE)
}
