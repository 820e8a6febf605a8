//! POSIX shared memory: files under `/dev/shm`.

use std::fs::{self, File};
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::sync::atomic::Ordering::SeqCst;
use std::time::Duration;

use ckpt_engine::sys::program::map::{Backing, Map};
use nix::unistd::getpid;

use crate::workload::context::Context;
use crate::workload::outcome::{Failure, ensure, same};
use crate::workload::process::Child;

const PAGES: usize = 8;

/// A name under `/dev/shm` that goes with the workload.
struct Name(PathBuf);

impl Name {
    fn new(kind: &str) -> Self {
        Self(PathBuf::from(format!("/dev/shm/selfcheck-{kind}-{}", getpid())))
    }

    fn make(&self) -> Result<(File, Map), Failure> {
        let file = File::options().read(true).write(true).create_new(true).open(&self.0)?;
        file.set_len((PAGES * 4096) as u64)?;
        let map = Map::new(PAGES, Backing::FileShared(file.as_fd()))?;
        Ok((file, map))
    }
}

impl Drop for Name {
    fn drop(&mut self) {
        // It may be gone already.
        let _ = fs::remove_file(&self.0);
    }
}

pub(super) fn memory(context: &mut Context) -> Result<(), Failure> {
    let (named, unnamed) = (Name::new("named"), Name::new("unnamed"));
    let (_, by_name) = named.make()?;
    let (without, mapped) = unnamed.make()?;
    fs::remove_file(&unnamed.0)?;
    let again = Map::new(PAGES, Backing::FileShared(without.as_fd()))?;
    let mut turn = 0;
    while context.step(Duration::from_millis(6))? {
        let word = turn as usize * 97 % mapped.words();
        let before = (turn as usize).checked_sub(mapped.words()).map_or(0, |turn| turn as u64 + 1);
        same("a word with a name", by_name.word(word).swap(turn + 1, SeqCst), before)?;
        same("a word without", mapped.word(word).swap(turn + 1, SeqCst), before)?;
        if context.progress.plant() {
            again.word(word).store(0, SeqCst);
        }
        same("the same word mapped twice", again.word(word).load(SeqCst), turn + 1)?;
        same("names of memory without one", without.metadata()?.nlink(), 0)?;
        let bytes = fs::read(&named.0)?;
        let found = bytes[word * 8..].first_chunk().map(|it| u64::from_ne_bytes(*it));
        same("the word in the file", found, Some(turn + 1))?;
        turn += 1;
    }
    Ok(())
}

pub(super) fn shared(context: &mut Context) -> Result<(), Failure> {
    let name = Name::new("shared");
    let (_, map) = name.make()?;
    let path = name.0.clone();
    let child = Child::start(context, "brother", |stop| {
        let file = File::options().read(true).write(true).open(&path)?;
        let theirs = Map::new(PAGES, Backing::FileShared(file.as_fd()))?;
        while !stop.wait(Duration::from_millis(2))? {
            let asked = theirs.word(0).load(SeqCst);
            theirs.word(600).store(asked, SeqCst);
        }
        Ok(())
    })?;
    let mut answered = 0;
    let mut waited = 0;
    let mut asked = 0;
    while context.step(Duration::from_millis(4))? {
        child.check()?;
        let found = map.word(600).load(SeqCst);
        same("what was asked", map.word(0).load(SeqCst), asked)?;
        if found == asked {
            answered += 1;
            waited = 0;
            asked += 1;
            map.word(0).store(asked, SeqCst);
        } else {
            waited += 1;
            ensure(waited < 2000, || "the brother answers no more".to_owned())?;
            same("an old answer", found + 1, map.word(0).load(SeqCst))?;
        }
        if context.progress.plant() {
            map.word(0).fetch_add(5, SeqCst);
        }
    }
    ensure(answered > 0, || "the brother never answered".to_owned())?;
    child.finish()
}
