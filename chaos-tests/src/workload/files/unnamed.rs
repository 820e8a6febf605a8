//! Files that have lost their names, or never had one.

use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::sync::atomic::Ordering::SeqCst;
use std::time::Duration;

use ckpt_engine::sys::program::descriptor;
use ckpt_engine::sys::program::map::{Backing, Map};
use nix::fcntl::{AtFlags, OFlag};
use nix::sys::stat::Mode;
use nix::unistd::linkat;

use crate::client::record::mix;
use crate::workload::context::Context;
use crate::workload::outcome::{Failure, ensure, same};

fn make(context: &Context, name: &str) -> Result<File, Failure> {
    Ok(File::options().read(true).write(true).create_new(true).open(context.path(name))?)
}

fn link(file: &File) -> Result<String, Failure> {
    let path = fs::read_link(format!("/proc/self/fd/{}", file.as_raw_fd()))?;
    Ok(path.to_string_lossy().into_owned())
}

fn block(number: u64, version: u64) -> Vec<u8> {
    (0..512).flat_map(|word| mix(number << 40 ^ version << 20 ^ word).to_le_bytes()).collect()
}

/// More than fits into what is sent while everything stands still.
const LARGE_BLOCKS: u64 = 18_000;

pub(super) fn large(context: &mut Context) -> Result<(), Failure> {
    let file = make(context, "large")?;
    fs::remove_file(context.path("large"))?;
    for number in 0..LARGE_BLOCKS {
        file.write_all_at(&block(number, 0), number * 4096)?;
    }
    let mut versions = vec![0u64; LARGE_BLOCKS as usize];
    let mut turn = 0;
    while context.step(Duration::from_millis(6))? {
        turn += 1;
        for probe in 0..8 {
            let number = mix(turn * 8 + probe) % LARGE_BLOCKS;
            let mut found = vec![0; 4096];
            file.read_exact_at(&mut found, number * 4096)?;
            let right = found == block(number, versions[number as usize]);
            ensure(right, || format!("block {number} of a deleted file is wrong"))?;
        }
        let number = mix(turn ^ 0xabcd) % LARGE_BLOCKS;
        versions[number as usize] = turn;
        file.write_all_at(&block(number, turn), number * 4096)?;
        if context.progress.plant() {
            (0..LARGE_BLOCKS).try_for_each(|number| file.write_all_at(&[1], number * 4096 + 9))?;
        }
        same("its size", file.metadata()?.len(), LARGE_BLOCKS * 4096)?;
    }
    Ok(())
}

pub(super) fn shared(context: &mut Context) -> Result<(), Failure> {
    let mut first = make(context, "gone")?;
    let mut dup = first.try_clone()?;
    let reader = File::open(context.path("gone"))?;
    let mut appender = File::options().append(true).open(context.path("gone"))?;
    fs::remove_file(context.path("gone"))?;
    let name = link(&first)?;
    let mut length = 0u64;
    while context.step(Duration::from_millis(6))? {
        same("its link", link(&reader)?, name.clone())?;
        same("its names", reader.metadata()?.nlink(), 0)?;
        appender.write_all(&[mix(length) as u8])?;
        length += 1;
        same("its length through another one", reader.metadata()?.len(), length)?;
        first.seek(SeekFrom::Start(length - 1))?;
        same("an offset shared by two numbers", dup.stream_position()?, length - 1)?;
        if context.progress.plant() {
            reader.as_fd();
            dup.seek(SeekFrom::Start(0))?;
            dup.write_all(&[0xee; 1])?;
            first.seek(SeekFrom::Start(0))?;
        }
        let mut byte = [0];
        dup.read_exact(&mut byte)?;
        same("the last byte", byte[0], mix(length - 1) as u8)?;
    }
    Ok(())
}

pub(super) fn mapped(context: &mut Context) -> Result<(), Failure> {
    const PAGES: usize = 8;
    let file = make(context, "mapped")?;
    file.set_len((PAGES * 4096) as u64)?;
    let shared = Map::new(PAGES, Backing::FileShared(file.as_fd()))?;
    let copy = Map::new(PAGES, Backing::FilePrivate(file.as_fd()))?;
    copy.word(9).store(99, SeqCst);
    let again = Map::new(PAGES, Backing::FileShared(file.as_fd()))?;
    fs::remove_file(context.path("mapped"))?;
    drop(file);
    let mut turn = 0;
    while context.step(Duration::from_millis(6))? {
        let word = 512 + turn as usize * 31 % (shared.words() - 512);
        shared.word(word).store(turn, SeqCst);
        if context.progress.plant() {
            copy.word(9).store(1, SeqCst);
        }
        same("a word of a deleted file", again.word(word).load(SeqCst), turn)?;
        same("a word of its private copy", copy.word(9).load(SeqCst), 99)?;
        same("a word never written", shared.word(9).load(SeqCst), 0)?;
        turn += 1;
    }
    Ok(())
}

pub(super) fn temporary(context: &mut Context) -> Result<(), Failure> {
    let flags = OFlag::O_TMPFILE | OFlag::O_RDWR | OFlag::O_CLOEXEC;
    let open = || nix::fcntl::open(&context.folder, flags, Mode::from_bits_truncate(0o640));
    let mut file = File::from(open()?);
    let mut turn = 0u64;
    while context.step(Duration::from_millis(8))? {
        file.write_all(&turn.to_le_bytes())?;
        turn += 1;
        same("its names", file.metadata()?.nlink(), 0)?;
        same("its mode", file.metadata()?.mode() & 0o777, 0o640)?;
        if context.progress.plant() {
            file.set_len(3)?;
        }
        same("its length", file.metadata()?.len(), turn * 8)?;
        if turn.is_multiple_of(100) {
            let name = context.path(&format!("named-{turn}"));
            let path = format!("/proc/self/fd/{}", file.as_raw_fd());
            let here = nix::fcntl::AT_FDCWD;
            linkat(here, path.as_str(), here, &name, AtFlags::AT_SYMLINK_FOLLOW)?;
            let bytes = fs::read(&name)?;
            let numbers = bytes.chunks(8).map(|word| word.try_into().map_or(0, u64::from_le_bytes));
            ensure(numbers.eq(0..turn), || "a file that got a name is wrong".to_owned())?;
            fs::remove_file(&name)?;
            let open = nix::fcntl::open(&context.folder, flags, Mode::from_bits_truncate(0o640));
            file = File::from(open?);
            turn = 0;
        }
    }
    Ok(())
}

pub(super) fn hard_link(context: &mut Context) -> Result<(), Failure> {
    let mut file = make(context, "first")?;
    let other = context.path("second");
    fs::hard_link(context.path("first"), &other)?;
    fs::remove_file(context.path("first"))?;
    let mut length = 0u64;
    while context.step(Duration::from_millis(8))? {
        file.write_all(&[mix(length) as u8])?;
        length += 1;
        if context.progress.plant() {
            let bytes = fs::read(&other)?;
            fs::remove_file(&other)?;
            fs::write(&other, bytes)?;
        }
        let bytes = fs::read(&other)?;
        same("the length under the other name", bytes.len() as u64, length)?;
        let right = bytes.iter().zip(0..).all(|(byte, at)| *byte == mix(at) as u8);
        ensure(right, || "the file under its other name is another".to_owned())?;
        same("one file", fs::metadata(&other)?.ino(), file.metadata()?.ino())?;
    }
    Ok(())
}

pub(super) fn library(context: &mut Context) -> Result<(), Failure> {
    const PAGES: usize = 6;
    let path = context.path("library.so");
    let content = |version: u64| -> Vec<u8> {
        (0..PAGES as u64 * 4096).map(|at| mix(at ^ version << 50) as u8).collect()
    };
    fs::write(&path, content(0))?;
    let mut versions = Vec::new();
    let mut turn = 0u64;
    while context.step(Duration::from_millis(6))? {
        turn += 1;
        if turn % 40 == 1 && versions.len() < 6 {
            // As a package manager does: the new one takes the name of the old one.
            let version = versions.len() as u64;
            versions.push(descriptor::map_program(File::open(&path)?.as_fd(), PAGES)?);
            fs::write(context.path("new"), content(version + 1))?;
            fs::rename(context.path("new"), &path)?;
        }
        let planted = u64::from(context.progress.plant());
        for (version, map) in versions.iter_mut().enumerate() {
            let at = mix(turn) as usize % (PAGES * 4096);
            let expected = mix(at as u64 ^ (version as u64 + planted) << 50) as u8;
            let differs = planted == 1 && expected == map.byte(at);
            ensure(map.byte(at) == expected && !differs, || {
                format!("byte {at} of library version {version} is another version's")
            })?;
            if turn.is_multiple_of(16) {
                map.forget()?;
            }
        }
        let found = fs::read(&path)?;
        ensure(found == content(versions.len() as u64), || {
            "the newest library changed".to_owned()
        })?;
    }
    Ok(())
}
